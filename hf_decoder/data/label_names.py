"""Collects class names from rows, saves them beside an adapter, and matches labels with them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

LABELS_FILE = "id2label.json"


def label_map(labels: Sequence[Any], names: Sequence[str] | None = None) -> dict[str, int]:
    """Label name -> class id: `names` in their order, or the distinct labels, sorted (as numbers if all are numbers).

    Raises:
        ValueError: for fewer than two classes, a name that comes twice, or labels outside `names`.
    """
    found = {str(label) for label in labels}
    if names is None:
        numeric = all(label.lstrip("-").isdigit() for label in found)
        names = sorted(found, key=int) if numeric else sorted(found)
    if len(set(names)) != len(names):
        raise ValueError(f"the label names {', '.join(names)} hold one twice")
    outside = [str(label) for label in labels if str(label) not in set(names)]
    if outside:
        raise ValueError(
            f"{len(outside):,} of {len(labels):,} labels are outside the label map, first {outside[0]!r}; "
            f"the map has: {', '.join(names)}"
        )
    if len(names) < 2:
        raise ValueError(f"classification needs at least two classes, and there is only {', '.join(names) or 'none'}")
    return {name: index for index, name in enumerate(names)}


def name_classes(labels: Iterable[str], names: Mapping[int, str], source: str) -> list[str]:
    """Maps each label to a class name. A label is a name, or a class id if no name is a number.

    Raises:
        ValueError: for a label that is neither, naming it, the rows' `source` and the names.
    """
    known = {} if any(map(_is_number, names.values())) else {str(index): name for index, name in names.items()}
    known |= {name: name for name in names.values()}
    labels = list(labels)
    unknown = sorted({label for label in labels if label not in known})
    if unknown:
        raise ValueError(
            f"{source} has the label {unknown[0]!r}, which the model does not know; "
            f"its labels: {', '.join(names.values())}"
        )
    return [known[label] for label in labels]


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def save_label_names(folder: str | Path, names: Mapping[int, str]) -> None:
    """Writes the names of an adapter's classes beside it."""
    text = json.dumps({str(index): name for index, name in names.items()}, ensure_ascii=False, indent=2) + "\n"
    (Path(folder) / LABELS_FILE).write_text(text, encoding="utf-8")


def read_label_names(adapter: str | Path) -> dict[int, str] | None:
    """Reads class id -> name from beside an adapter in a folder or on the Hub; None if it has no such file.

    Raises:
        ValueError: if the file is damaged.
    """
    path = cached_file(
        str(adapter),
        LABELS_FILE,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return None
    try:
        names = json.loads(Path(path).read_text(encoding="utf-8"))
        return {int(index): str(name) for index, name in names.items()}
    except (ValueError, AttributeError) as error:
        raise ValueError(f'{path} is damaged ({error}); it must hold {{"0": "a name", "1": "a name"}}') from None
