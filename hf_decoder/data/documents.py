"""Loads text from files, folders and the Hub as documents: `datasets` with the columns `text` and `source`.

What is one document: a text file, whole (`.txt`, `.md`, source code, anything without a table's suffix); a row of a
table (`.jsonl`, `.json`, `.parquet`, `.csv`) or of a dataset of the Hub. Each file may be compressed (`.gz`, `.bz2`,
`.xz`). Text is taken as it is, byte for byte; empty documents are left out.

A folder is read recursively: every file with a usual text suffix, and `.jsonl` and `.parquet` tables. Hidden files are
passed over, and so are `.json` and `.csv`, which are settings or results in most folders: name those files to read
them.

How text is held out when there is no validation file: a document whose hash falls below `validation_fraction` is
held out, so the split is the same everywhere and equal documents never stand on both sides. Where documents are too
few for that (fewer than `MIN_DOCUMENTS_TO_SPLIT`), the last part of the text is held out, cut at a line border.

How documents become tokens and blocks is the subject of `packing`, whose names this module offers as well.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_decoder.data.packing import CorpusReport, batch_rows, pack, pack_for_evaluation, tokenize
from hf_decoder.data.reading import (
    PathLike,
    check_encoding,
    check_text_column,
    explain_table,
    find_files,
    load_hub,
    load_table,
    read_text,
)

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, Features

__all__ = [
    "CorpusReport",
    "load_standard_library",
    "load_text",
    "pack",
    "pack_for_evaluation",
    "read_text",
    "standard_library_files",
    "tokenize",
]

# Of the stable hashes, MD5 leaves the largest file of the standard library (pydoc_data/topics.py, prose and 6% of all
# bytes) in training; held out, it would be more than half of what is scored.
VALIDATION_FRACTION = 0.05
MIN_DOCUMENTS_TO_SPLIT = 20

# Test packages and what is installed or generated on one machine only.
_LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_LEFT_OUT_MODULES = ("_sysconfigdata", "sitecustomize", "usercustomize")


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
        table, table_name = load_table(builder, files, encoding, text_column=text_column)
        source = files[0].name if len(files) == 1 else builder
        try:
            parts.append(_documents(table, text_column, table_name, source))
        except UnicodeDecodeError as error:  # JSON is not looked at closely before
            raise explain_table(builder, files, table_name, error) from None
    return _require_text(concatenate_datasets(parts), f"{argument} {name}")


def _read_documents(files: list[tuple[str, str, int, int]], encoding: str | None) -> Iterator[dict[str, str]]:
    for path, source, _, _ in files:
        text = read_text(Path(path), encoding)
        if text:
            yield {"text": text, "source": source}


def _load_hub(dataset_name: str, dataset_config_name: str | None, text_column: str) -> dict[str, Dataset]:
    loaded, name = load_hub(dataset_name, dataset_config_name)
    return {
        split: _require_text(_documents(loaded[split], text_column, name, dataset_name), f"{name}, split {split},")
        for split in ("train", "validation")
        if split in loaded
    }


def _documents(table: Dataset, text_column: str, name: str, source: str) -> Dataset:
    """The non-empty texts of a table, with their row as source."""
    feature = table.features.get(text_column)
    check_text_column(table.column_names, getattr(feature, "dtype", type(feature).__name__), text_column, name)
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


# ---------------------------------------------------------------------------------------------------- splitting


def _hold_out(documents: Dataset, keys: Iterable[str], fraction: float) -> DatasetDict:
    """Hold out the documents whose key hashes below `fraction`, or the text's tail where that leaves a side empty."""
    from datasets import DatasetDict

    if fraction == 0:
        return DatasetDict(train=documents)
    if len(documents) >= MIN_DOCUMENTS_TO_SPLIT:
        sides: tuple[list[int], list[int]] = [], []
        for index, key in enumerate(keys):
            digest = hashlib.md5(key.encode("utf-8"), usedforsecurity=False).digest()
            sides[hash_share(digest) < fraction].append(index)
        if sides[0] and sides[1]:
            return DatasetDict(train=documents.select(sides[0]), validation=documents.select(sides[1]))
    return _split_tail(documents, fraction)


def hash_share(digest: bytes) -> float:
    """Where a hash lies between 0 and 1. A document whose share is below the fraction to hold out is held out."""
    return int.from_bytes(digest[:8], "big") / 2**64


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
