"""Finds and opens text files, tables and data sets of the Hub; errors are one line each."""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import hashlib
import io
import json
import lzma
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from hf_decoder.safety.terminal import first_line

PathLike = str | os.PathLike[str]

# A compressed file may unpack to `MOST_GROWTH` times its size, or to `FREE_BYTES`. Text shrinks to a third or a tenth,
# one line repeated to a hundredth.
MOST_GROWTH, FREE_BYTES = 200, 16 << 20
# A parquet file may store any number of equal rows, or of equal items of a list in one row, once.
MOST_ROWS_A_BYTE, FREE_ROWS = 64, 1 << 20

# Suffix -> builder of `datasets`.
TABLE_SUFFIXES = {".jsonl": "json", ".ndjson": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
_FOLDER_TABLE_SUFFIXES = {".jsonl", ".ndjson", ".parquet"}
# fmt: off
TEXT_SUFFIXES = frozenset({
    ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".adoc", ".html", ".htm", ".xml", ".log", ".srt",
    ".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".kt", ".scala", ".go", ".rs", ".swift",
    ".cs", ".js", ".jsx", ".ts", ".tsx", ".vue", ".css", ".scss", ".php", ".rb", ".pl", ".lua", ".sh", ".sql",
    ".r", ".jl", ".hs", ".ml", ".ex", ".erl", ".clj", ".lisp", ".scm", ".f90",
})
# fmt: on


def _open_zstd(path: Path) -> Any:
    try:
        from compression import zstd  # Python 3.14
    except ModuleNotFoundError:
        raise ValueError(
            f"{path} is compressed with zstd, which is not read here; unpack it: zstd -d {path}"
        ) from None
    return zstd.open(path)


COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstd,
}
NAMES = {"gz": "gzip", "bz2": "bzip2"}


def find_files(
    paths: PathLike | Sequence[PathLike], argument: str
) -> tuple[list[tuple[Path, str]], dict[str, list[Path]], str]:
    """The text files below `paths`, each with its `source`; the tables by builder; and a name for all of them."""
    given = [Path(path) for path in ([paths] if isinstance(paths, (str, os.PathLike)) else paths)]
    if not given:
        raise ValueError(f"{argument} is an empty list; name at least one file or folder")
    texts: list[tuple[Path, str]] = []
    tables: dict[str, list[Path]] = {}
    for path in given:
        for file, source in _walk(path, argument):
            builder = TABLE_SUFFIXES.get(_suffix(file))
            if builder is None:
                texts.append((file, source))
            else:
                tables.setdefault(builder, []).append(file)
    return texts, tables, ", ".join(str(path) for path in given)


def _walk(path: Path, argument: str) -> Iterator[tuple[Path, str]]:
    """The files of `path`, each with its `source`: its name, or its path inside a folder."""
    if path.is_file():
        yield path, path.name
        return
    if not path.is_dir():
        raise FileNotFoundError(f"{argument} {path} does not exist; a dataset of the Hub is named with dataset_name")
    found, others = False, Counter[str]()
    for file in sorted(path.rglob("*"), key=lambda file: file.relative_to(path).as_posix()):
        relative = file.relative_to(path)
        if not file.is_file() or any(part.startswith(".") for part in relative.parts):
            continue
        if _suffix(file) in TEXT_SUFFIXES or _suffix(file) in _FOLDER_TABLE_SUFFIXES:
            found = True
            yield file, relative.as_posix()
        else:
            others[_suffix(file) or "no suffix"] += 1
    if not found:
        raise ValueError(f"{argument} {path} has no text files; it needs .txt, .md, .py, .jsonl, .parquet ...")
    if others:
        kinds = ", ".join(f"{count:,} with {suffix}" for suffix, count in others.most_common(5))
        warn(f"{argument} {path}: {others.total():,} files are not read ({kinds}); a file that is named itself is")


def warn(line: str) -> None:
    """Says once what is left out of the text."""
    from transformers.utils import logging

    logging.get_logger("transformers").warning_once(line)


def plain_name(path: Path) -> str:
    """The name of a file in lower case, without the suffix of its compression."""
    name = path.name.lower()
    return name[: -len(path.suffix)] if path.suffix.lower() in COMPRESSIONS else name


def _suffix(path: Path) -> str:
    """The suffix that tells the format, without the suffix of a compression."""
    return Path(plain_name(path)).suffix


def read_text(path: Path, encoding: str | None = None) -> str:
    """Reads a UTF-8 file, unpacked if its name says so, without a byte order mark.

    `encoding` is for a file that is not UTF-8. Raises ValueError for a file that is no text.
    """
    with _open(path) as file:
        data = file.read()
    if encoding is not None and (b"\0" in data or not _is_utf8(data)):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError as error:
            at = f"byte 0x{data[error.start]:02x} at offset {error.start}"
            raise ValueError(f"{path} is neither UTF-8 nor {encoding} ({at}); give another --encoding") from None
        data = text.encode("utf-8", "surrogatepass")
    nul = data.find(b"\0")
    if nul >= 0:
        raise ValueError(f"{path} is binary, not text (a zero byte at offset {nul}); give UTF-8 text")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise not_utf8(path, data[error.start], error.start) from None


def text_start(path: PathLike) -> int:
    """The byte at which the text of a plain UTF-8 file begins: after a byte order mark, or 0."""
    mark = codecs.BOM_UTF8
    with open(path, "rb") as file:
        return len(mark) if file.read(len(mark)) == mark else 0


def not_utf8(path: Path, byte: int, offset: int) -> ValueError:
    """The error for a file with a byte that is not UTF-8."""
    return ValueError(
        f"{path} is not UTF-8 (byte 0x{byte:02x} at offset {offset}); convert it with iconv -f cp1252 -t UTF-8, or "
        "give pretrain its encoding: --encoding cp1252"
    )


def check_encoding(encoding: str | None) -> None:
    """Raises ValueError for an encoding that Python does not know."""
    try:
        codecs.lookup(encoding or "utf-8")
    except LookupError:
        raise ValueError(f"--encoding {encoding!r} is unknown; give cp1252, latin-1, utf-16, ...") from None


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def find_invalid_byte(path: Path) -> tuple[int, int] | None:
    """Value and offset of the first byte of a file that is not UTF-8; None if all are. Reads a megabyte at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    done = 0
    with _open(path) as file:
        while True:
            data = file.read(1 << 20)
            waiting = decoder.getstate()[0]
            try:
                decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                return (waiting + data)[error.start], done - len(waiting) + error.start
            if not data:
                return None
            done += len(data)


@contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    unpack = COMPRESSIONS.get(path.suffix.lower())
    if unpack is None:
        with path.open("rb") as file:
            yield file
        return
    try:
        with unpack(path) as unpacked:
            yield cast(BinaryIO, _Unpacked(unpacked, path))
    except (gzip.BadGzipFile, lzma.LZMAError, EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # without a number: bz2's error for other files
            raise
        kind = path.suffix[1:].lower()
        raise ValueError(f"{path} is not a whole {NAMES.get(kind, kind)} file ({error}); compress it again") from None


class _Unpacked(io.RawIOBase):
    """A reader of a compressed file that stops at `MOST_GROWTH` times the file's size."""

    def __init__(self, unpacked: Any, path: Path):
        self._unpacked, self._path, self._read = unpacked, path, 0
        self._most = max(FREE_BYTES, MOST_GROWTH * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._unpacked.readinto(buffer)
        self._read += count
        if self._read > self._most:
            raise ValueError(
                f"{self._path} unpacks to more than {MOST_GROWTH} times its {self._path.stat().st_size:,} bytes, "
                "as no text does; unpack it yourself if you trust it"
            )
        return count


def plain_file(path: Path, encoding: str | None = None) -> Path:
    """`path`, or an unpacked UTF-8 copy in the cache of `datasets` if it is compressed or in `encoding`."""
    from datasets import config

    foreign = encoding is not None and find_invalid_byte(path) is not None
    if path.suffix.lower() not in COMPRESSIONS and not foreign:
        return path
    stat = path.stat()
    key = hashlib.md5(
        repr((str(path.resolve()), stat.st_size, stat.st_mtime_ns, foreign and encoding)).encode(),
        usedforsecurity=False,
    )
    target = Path(config.HF_DATASETS_CACHE) / "unpacked" / (key.hexdigest() + _suffix(path))
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        try:
            with _open(path) as source, part.open("wb") as sink:
                plain = codecs.EncodedFile(source, "utf-8", encoding) if foreign else source
                shutil.copyfileobj(plain, sink, 1 << 20)
            part.replace(target)
        except UnicodeDecodeError:
            raise ValueError(f"{path} is neither UTF-8 nor {encoding}; give another --encoding") from None
        finally:
            part.unlink(missing_ok=True)
    return target


def load_table(
    builder: str,
    paths: list[Path],
    encoding: str | None = None,
    *,
    text_column: str | None = None,
    streaming: bool = False,
) -> tuple[Any, str]:
    """The rows of tables of one kind, as `datasets` reads them, and a name for messages.

    `datasets` cannot read JSON lines with a column of several types, or one that begins late in the file. Then
    `text_column` is read alone.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from datasets.utils import logging

    name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    # Escaped, because the builders take names as patterns.
    plain = [plain_file(path, None if builder == "parquet" else encoding) for path in paths]
    for path, file in zip(paths, plain, strict=True):
        if file.stat().st_size == 0:
            raise ValueError(f"{path} is empty; it needs at least one row")
        if builder == "parquet":
            check_rows(file, path)
    files = [glob.escape(str(file)) for file in plain]
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the error repeats what it logs
    try:
        return load_dataset(builder, data_files=files, split="train", streaming=streaming), name
    except (DatasetsError, ValueError, OSError) as error:
        alone = None if streaming or builder != "json" else _column_alone(plain, text_column)
        if alone is None:
            raise explain_table(builder, paths, name, error) from error
        warn(f"{name}: columns other than {text_column!r} are not read: they hold values of several types")
        return alone, name
    finally:
        logging.set_verbosity(verbosity)


def _column_alone(files: Sequence[Path], column: str | None) -> Any:
    """The texts of one column of JSON lines as a table; None if they are not texts, or the lines are not JSON."""
    from datasets import Dataset, Features, Value

    texts: list[Any] = []
    try:
        for file in files:
            with file.open(encoding="utf-8-sig") as lines:
                texts += [json.loads(line).get(column) for line in lines if line.strip()]
    except (ValueError, AttributeError):
        return None
    if not any(texts) or not all(isinstance(text, str | None) for text in texts):
        return None
    return Dataset.from_dict({column: texts}, Features({column: Value("large_string")}))


def check_rows(file: Path, path: Path) -> None:
    """Raises ValueError for a parquet file that claims more rows or bytes than a file of its size can hold."""
    from pyarrow import ArrowException
    from pyarrow.parquet import read_metadata

    try:
        metadata = read_metadata(file)
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        columns = [[group.column(index).num_values for index in range(group.num_columns)] for group in groups]
    except (ArrowException, OSError):
        return  # the reader says what is wrong
    packed = file.stat().st_size
    rows = max(metadata.num_rows, sum(max(values, default=0) for values in columns))
    size = sum(group.total_byte_size for group in groups)
    if rows > max(FREE_ROWS, MOST_ROWS_A_BYTE * packed) or size > max(FREE_BYTES, MOST_GROWTH * packed):
        raise ValueError(
            f"{path} has {rows:,} rows or items of lists, of {size:,} bytes, in a file of {packed:,} bytes, as no "
            "text has"
        )


def explain_table(builder: str, paths: list[Path], name: str, error: BaseException) -> ValueError:
    """The error for tables that cannot be read: the byte that is not UTF-8, or the reader's own message."""
    for path in paths if builder != "parquet" else []:
        found = find_invalid_byte(path)
        if found is not None:
            return not_utf8(path, *found)
    return ValueError(f"{name} cannot be read as {builder}: {first_line(error)}")


def bytes_of_text(builder: str, path: Path, text_column: str) -> int | None:
    """Estimates how many bytes of text a table holds without reading it; None if that cannot be told."""
    if builder == "parquet":
        from pyarrow.parquet import read_metadata

        metadata = read_metadata(path)
        groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
        chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
        return sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema == text_column)
    with path.open("rb") as file:
        lines = file.readlines(1 << 20)
    try:
        texts = [json.loads(line).get(text_column) or "" for line in lines]
    except (ValueError, AttributeError):
        return None  # not one object a line
    share = sum(len(text.encode("utf-8")) for text in texts) / max(1, sum(map(len, lines)))
    return round(path.stat().st_size * share)


def load_hub(dataset_name: str, dataset_config_name: str | None, *, streaming: bool = False) -> tuple[Any, str]:
    """The splits of a data set of the Hub, or of a folder laid out like one, and a name for messages."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name = f"dataset {dataset_name}" + (f" ({dataset_config_name})" if dataset_config_name else "")
    try:
        loaded: Any = load_dataset(dataset_name, dataset_config_name, streaming=streaming)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name} is not on the Hub, nor a folder here: {first_line(error)}") from error
    except (DatasetsError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"{name} cannot be loaded: {first_line(error)}") from error
    if "train" not in loaded:
        raise ValueError(f"{name} has no train split; its splits are {', '.join(loaded)}")
    return loaded, name


def check_text_column(columns: Sequence[str], kind: str, text_column: str, name: str) -> None:
    """Raises ValueError if a table has no such column, or its `kind` is not text."""
    if text_column not in columns:
        raise ValueError(
            f"{name} has no column {text_column!r}; its columns are {', '.join(columns)}: name one as text_column"
        )
    if kind not in ("string", "large_string", "str"):
        raise ValueError(f"column {text_column!r} of {name} holds {kind}, not text; name another one as text_column")
