"""Text from files, folders and the Hub, as documents: `datasets` with the columns `text` and `source`.

What is one document: a text file, whole (`.txt`, `.md`, source code, anything without a table's suffix); a row of a
table (`.jsonl`, `.json`, `.parquet`, `.csv`) or of a dataset of the Hub. Each file may be gzipped (`.gz`). Text is
taken as it is, byte for byte; empty documents are left out.

A folder is read recursively: every file with a usual text suffix, and `.jsonl` and `.parquet` tables. Hidden files are
passed over, and so are `.json` and `.csv`, which are settings or results in most folders: name those files to read
them.

How text is held out when there is no validation file: a document whose hash falls below `validation_fraction` is
held out, so the split is the same everywhere and equal documents never stand on both sides. Where documents are too
few for that (fewer than `MIN_DOCUMENTS_TO_SPLIT`), the last part of the text is held out, cut at a line border.

How documents become tokens and blocks is the subject of `packing`, whose names this module offers as well.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import hashlib
import os
import shutil
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from .packing import CorpusReport, batch_rows, pack, pack_for_evaluation, tokenize

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features

__all__ = [
    "CorpusReport",
    "load_standard_library",
    "load_text",
    "pack",
    "pack_for_evaluation",
    "standard_library_files",
    "tokenize",
]

# Of the stable hashes, MD5 leaves the largest file of the standard library (pydoc_data/topics.py, prose and 6% of all
# bytes) in training; held out, it would be more than half of what is scored.
VALIDATION_FRACTION = 0.05
MIN_DOCUMENTS_TO_SPLIT = 20

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

# Test packages and what is installed or generated on one machine only.
_LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_LEFT_OUT_MODULES = ("_sysconfigdata", "sitecustomize", "usercustomize")

PathLike = str | os.PathLike[str]


def standard_library_files() -> list[Path]:
    """The Python source files of the running interpreter's standard library, sorted by relative path.

    Without test packages, installed packages, modules that the machine's own build generated, and files that are not
    UTF-8. Raises ValueError where the library comes without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if _LEFT_OUT_FOLDERS.isdisjoint(relative.parts) and not path.name.startswith(_LEFT_OUT_MODULES):
            try:
                path.read_bytes().decode("utf-8")
            except (UnicodeDecodeError, OSError):
                continue
            files.append(path)
    if not files:
        raise ValueError(f"no Python sources of the standard library in {root}; name a train_file or dataset_name")
    return files


def load_standard_library(validation_fraction: float = VALIDATION_FRACTION) -> DatasetDict:
    """The standard library as documents, one per non-empty file, split by a hash of the relative path (`source`).

    Returns `train` and `validation`, whole files each, the same on every machine with the same Python (3.11: 37 of 730
    files and 5.1% of the bytes are held out).
    """
    from datasets import Dataset

    _check_fraction(validation_fraction)
    root = Path(sysconfig.get_path("stdlib"))
    documents: dict[str, list[str]] = {"text": [], "source": []}
    for path in standard_library_files():
        text = path.read_bytes().decode("utf-8")
        if text:
            documents["text"].append(text)
            documents["source"].append(path.relative_to(root).as_posix())
    return _hold_out(Dataset.from_dict(documents, _features()), documents["source"], validation_fraction)


def load_text(
    train_file: PathLike | Sequence[PathLike] | None = None,
    validation_file: PathLike | Sequence[PathLike] | None = None,
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    text_column: str = "text",
    validation_fraction: float = VALIDATION_FRACTION,
    encoding: str | None = None,
) -> DatasetDict:
    """Documents from files or folders (`train_file`), or from a dataset of the Hub (`dataset_name`).

    Returns `train` and `validation`: the validation file, or the dataset's own validation split, or else
    `validation_fraction` of the documents held out of the rest; with a fraction of 0, `train` alone. `text_column`
    names the column of tables and datasets that holds the text. `encoding` is that of the files that are not UTF-8.

    Raises FileNotFoundError for a path or dataset that does not exist, and ValueError for arguments that contradict
    each other and for files without text: empty, binary, not UTF-8 and not in `encoding` either, not readable as their
    suffix says, or without the column.
    """
    from datasets import DatasetDict

    if (train_file is None) == (dataset_name is None):
        raise ValueError("give either train_file or dataset_name, one of the two")
    _check_fraction(validation_fraction)
    check_encoding(encoding)
    if train_file is not None:
        splits = {"train": load_files(train_file, "train_file", text_column, encoding)}
    else:
        splits = _load_hub(str(dataset_name), dataset_config_name, text_column)
    if validation_file is not None:
        splits["validation"] = load_files(validation_file, "validation_file", text_column, encoding)
    if "validation" in splits:
        return DatasetDict(train=splits["train"], validation=splits["validation"])
    return _hold_out(splits["train"], _texts(splits["train"]), validation_fraction)


def _features() -> Features:
    from datasets import Features, Value

    # A plain arrow string column ends at 2 GiB a batch, and a single document may be longer.
    return Features({"text": Value("large_string"), "source": Value("string")})


def _check_fraction(validation_fraction: float) -> None:
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction {validation_fraction} must be at least 0 and less than 1")


# ---------------------------------------------------------------------------------------------------- reading


def load_files(
    paths: PathLike | Sequence[PathLike], argument: str, text_column: str = "text", encoding: str | None = None
) -> Dataset:
    """The documents of files and folders; `argument` is the flag that named them. Raises as `load_text`."""
    from datasets import Dataset, concatenate_datasets
    from datasets.exceptions import DatasetGenerationError

    texts, tables, name = find_files(paths, argument)
    parts = []
    if texts:
        # Size and time make the disk cache of `datasets` notice an edited file.
        stamped = [(str(file), source, file.stat().st_size, file.stat().st_mtime_ns) for file, source in texts]
        options: dict[str, Any] = {"files": stamped, "encoding": encoding}
        try:
            parts.append(Dataset.from_generator(_read_documents, features=_features(), gen_kwargs=options))
        except DatasetGenerationError as error:
            raise (error.__cause__ or error) from None
        except ValueError as error:
            # What `datasets` says when a generator yields nothing.
            raise ValueError(f"{argument} {name} is empty; it needs at least one character of text") from error
    for builder, files in tables.items():
        table, table_name = load_table(builder, files, encoding)
        source = files[0].name if len(files) == 1 else builder
        try:
            parts.append(_documents(table, text_column, table_name, source))
        except UnicodeDecodeError as error:  # JSON is not looked at closely before
            raise explain_table(builder, files, table_name, error) from None
    return _require_text(concatenate_datasets(parts), f"{argument} {name}")


def find_files(
    paths: PathLike | Sequence[PathLike], argument: str
) -> tuple[list[tuple[Path, str]], dict[str, list[Path]], str]:
    """The text files below `paths`, each with its `source`; the tables by their builder; and the paths in words."""
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
    """The files that `path` stands for, each with its `source`: the name of a file, the path inside a folder."""
    if path.is_file():
        yield path, path.name
        return
    if not path.is_dir():
        raise FileNotFoundError(f"{argument} {path} does not exist; a dataset of the Hub is named with dataset_name")
    found = False
    for file in sorted(path.rglob("*"), key=lambda file: file.relative_to(path).as_posix()):
        relative = file.relative_to(path)
        known = _suffix(file) in TEXT_SUFFIXES or _suffix(file) in _FOLDER_TABLE_SUFFIXES
        if known and file.is_file() and not any(part.startswith(".") for part in relative.parts):
            found = True
            yield file, relative.as_posix()
    if not found:
        raise ValueError(f"{argument} {path} has no text files; it needs .txt, .md, .py, .jsonl, .parquet ...")


def _suffix(path: Path) -> str:
    """The suffix that tells the format: `.gz` is looked through."""
    name = path.name.lower()
    return Path(name.removesuffix(".gz")).suffix


def _read_documents(files: list[tuple[str, str, int, int]], encoding: str | None) -> Iterator[dict[str, str]]:
    for path, source, _, _ in files:
        text = read_text(Path(path), encoding)
        if text:
            yield {"text": text, "source": source}


def read_text(path: Path, encoding: str | None = None) -> str:
    """The text of a UTF-8 file, gzipped if its name ends in `.gz`; ValueError for anything that is not such a file.

    What is not UTF-8 is read in `encoding`, if there is one.
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
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise not_utf8(path, data[error.start], error.start) from None


def not_utf8(path: Path, byte: int, offset: int) -> ValueError:
    """What there is to say of a file with such a byte."""
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
    """Value and offset of the first byte of a file that is not UTF-8, read piece by piece; None if it is all UTF-8."""
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
    if not path.name.lower().endswith(".gz"):
        with path.open("rb") as file:
            yield file
        return
    try:
        with gzip.open(path) as unpacked:
            yield cast(BinaryIO, unpacked)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is not a whole gzip file ({error}); compress it again") from None


def plain_file(path: Path, encoding: str | None = None) -> Path:
    """`path` if it is plain UTF-8; for one that is gzipped or in `encoding`, a copy in the cache of `datasets`.

    Whether a file is UTF-8 is looked into only where there is an encoding to take instead.
    """
    from datasets import config

    foreign = encoding is not None and find_invalid_byte(path) is not None
    if not path.name.lower().endswith(".gz") and not foreign:
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
    builder: str, paths: list[Path], encoding: str | None = None, *, streaming: bool = False
) -> tuple[Any, str]:
    """The rows of tables of one kind, as `datasets` reads them, and the name to give the table in messages."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError
    from datasets.utils import logging

    name = str(paths[0]) if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
    # Escaped, because the builders take names for patterns.
    files = []
    for path in paths:
        file = plain_file(path, None if builder == "parquet" else encoding)
        if file.stat().st_size == 0:
            raise ValueError(f"{path} is empty; it needs at least one row")
        files.append(glob.escape(str(file)))
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what it logs on the way to an error, the error says
    try:
        return load_dataset(builder, data_files=files, split="train", streaming=streaming), name
    except (DatasetsError, ValueError, OSError) as error:
        raise explain_table(builder, paths, name, error) from error
    finally:
        logging.set_verbosity(verbosity)


def explain_table(builder: str, paths: list[Path], name: str, error: BaseException) -> ValueError:
    """What to say of tables that cannot be read: bytes that are not UTF-8, or the reader's own words."""
    for path in paths if builder != "parquet" else []:
        found = find_invalid_byte(path)
        if found is not None:
            return not_utf8(path, *found)
    return ValueError(f"{name} cannot be read as {builder}: {_reason(error)}")


def _load_hub(dataset_name: str, dataset_config_name: str | None, text_column: str) -> dict[str, Dataset]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    name = f"dataset {dataset_name}" + (f" ({dataset_config_name})" if dataset_config_name else "")
    try:
        loaded = load_dataset(dataset_name, dataset_config_name)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name} is not on the Hub, nor a folder here: {_reason(error)}") from error
    except (DatasetsError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(f"{name} cannot be loaded: {_reason(error)}") from error
    if "train" not in loaded:
        raise ValueError(f"{name} has no train split; its splits are {', '.join(loaded)}")
    return {
        split: _require_text(_documents(loaded[split], text_column, name, dataset_name), f"{name}, split {split},")
        for split in ("train", "validation")
        if split in loaded
    }


def _documents(table: Dataset, text_column: str, name: str, source: str) -> Dataset:
    """The non-empty texts of a table, with their row as source."""
    if text_column not in table.column_names:
        columns = ", ".join(table.column_names)
        raise ValueError(f"{name} has no column {text_column!r}; its columns are {columns}: name one as text_column")
    kind = getattr(table.features[text_column], "dtype", type(table.features[text_column]).__name__)
    if kind not in ("string", "large_string"):
        raise ValueError(f"column {text_column!r} of {name} holds {kind}, not text; name another one as text_column")
    return table.select_columns([text_column]).map(
        _keep_text,
        batched=True,
        batch_size=batch_rows(table),
        with_indices=True,
        fn_kwargs={"text_column": text_column, "source": source},
        remove_columns=[text_column],
        features=_features(),
        desc="Reading",
    )


def _keep_text(batch: dict[str, list[Any]], rows: list[int], text_column: str, source: str) -> dict[str, list[str]]:
    kept = [(text, f"{source}:{row}") for text, row in zip(batch[text_column], rows, strict=True) if text]
    return {"text": [text for text, _ in kept], "source": [row for _, row in kept]}


def _require_text(documents: Dataset, name: str) -> Dataset:
    if len(documents) == 0:
        raise ValueError(f"{name} is empty; it needs at least one character of text")
    return documents


def _reason(error: BaseException) -> str:
    """The innermost cause of an error, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# ---------------------------------------------------------------------------------------------------- splitting


def _hold_out(documents: Dataset, keys: Iterable[str], fraction: float) -> DatasetDict:
    """Hold out the documents whose key hashes below `fraction`, or the text's tail where that leaves a side empty."""
    from datasets import DatasetDict

    if fraction == 0:
        return DatasetDict(train=documents)
    if len(documents) >= MIN_DOCUMENTS_TO_SPLIT:
        sides: tuple[list[int], list[int]] = [], []
        for index, key in enumerate(keys):
            share = int.from_bytes(hashlib.md5(key.encode("utf-8"), usedforsecurity=False).digest()[:8], "big") / 2**64
            sides[share < fraction].append(index)
        if sides[0] and sides[1]:
            return DatasetDict(train=documents.select(sides[0]), validation=documents.select(sides[1]))
    return _split_tail(documents, fraction)


def _split_tail(documents: Dataset, fraction: float) -> DatasetDict:
    """Hold out the last `fraction` of all characters; the document that this cuts in two is cut at a line border."""
    from datasets import Dataset, DatasetDict

    total = sum(map(len, _texts(documents)))
    left = total - max(1, round(total * fraction))
    sides: dict[str, dict[str, list[str]]] = {name: {"text": [], "source": []} for name in ("train", "validation")}
    for text, source in zip(_texts(documents), documents["source"], strict=True):
        cut = min(max(left, 0), len(text))
        left -= len(text)
        if 0 < cut < len(text):
            # The last line border before the cut, unless that more than doubles the share.
            border = text.rfind("\n", 0, cut) + 1
            cut = border if cut - border <= len(text) - cut else cut
        for name, part in (("train", text[:cut]), ("validation", text[cut:])):
            if part:
                sides[name]["text"].append(part)
                sides[name]["source"].append(source)
    if not sides["train"]["text"]:
        raise ValueError(f"{total} characters are too few to hold some out for validation; give a validation_file")
    return DatasetDict({name: Dataset.from_dict(side, documents.features) for name, side in sides.items()})


def _texts(documents: Dataset) -> Iterator[str]:
    for batch in documents.select_columns("text").iter(batch_rows(documents)):
        yield from batch["text"]
