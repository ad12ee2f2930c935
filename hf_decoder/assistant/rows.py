"""Brings the rows that the stages read into one folder: from the standard library, or from data sets of the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_decoder.assistant import standard_library
from hf_decoder.assistant.stages import Record, data_key

STANDARD_LIBRARY = "standard_library"
KEYS = ("dataset_name", "dataset_config_name", "split", "max_rows")


def check_data(data: Any, hint: Callable[[str, Sequence[str]], str]) -> None:
    """Raises ValueError for keys that no rows have; `hint` tells the nearest of those there are."""
    if data == STANDARD_LIBRARY:
        return
    if not isinstance(data, Mapping):
        raise ValueError(f"data must be {STANDARD_LIBRARY}, or hold by name what the rows are taken from")
    for name, source in data.items():
        if not isinstance(source, Mapping) or "dataset_name" not in source:
            raise ValueError(f"data, {name}: a dataset_name is needed")
        for key in source:
            if key not in KEYS:
                raise ValueError(f"data, {name}: unknown key {key!r}{hint(str(key), KEYS)}")
        if Path(str(name)).name != name:
            raise ValueError(f"data: {name!r} cannot be the name of a file")


def write_data(data: Any, folder: Path, record: Record) -> Iterator[str]:
    """Writes the rows of a recipe into `folder`, unless they are there; yields a line for each file."""
    key = data_key(data)
    if record.stages.get("data", {}).get("key") == key and folder.is_dir():
        yield "done before"
        return
    if data == STANDARD_LIBRARY:
        counts = standard_library.write_rows(folder)
    else:
        counts = {name: _from_hub(source, folder / f"{name}.parquet") for name, source in data.items()}
    record.note("data", key=key, rows=counts)
    yield from (f"{count:,} rows of {name}" for name, count in counts.items())


def _from_hub(source: Mapping[str, Any], path: Path) -> int:
    """Writes a split of a data set as one parquet file; returns its rows.

    Raises:
        ValueError: if it cannot be had.
    """
    from datasets import load_dataset

    name, split = str(source["dataset_name"]), str(source.get("split") or "train")
    try:
        found: Any = load_dataset(name, source.get("dataset_config_name"), split=split)
    except Exception as error:  # of the network, the Hub, or the files of a stranger
        raise ValueError(f"data set {name}, split {split}, cannot be loaded: {str(error).splitlines()[0]}") from error
    rows = found.select(range(min(len(found), source.get("max_rows") or len(found))))
    path.parent.mkdir(parents=True, exist_ok=True)
    rows.to_parquet(path)
    return len(rows)
