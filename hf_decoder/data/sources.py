"""Loads the text that the flags name: files, folders, data sets, and mixtures of files by weight."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset, DatasetDict


@dataclass
class TextArguments:
    """Which text the model is trained and measured on."""

    train_file: list[str] | None = field(
        default=None,
        metadata={
            "help": "Text to train on: .txt, .md, .jsonl, .csv, .parquet, each also .gz, .bz2, .xz; or a folder. "
            "Several are joined; with weights, a.txt:0.7 b.jsonl:0.3, they are mixed in these shares of bytes."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Held-out text, of the same kinds."})
    dataset_name: str | None = field(default=None, metadata={"help": "Data set of the Hub, in place of --train_file."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Its configuration.", "rare": True})
    text_column: str = field(default="text", metadata={"help": "The column or key that holds the text.", "rare": True})
    encoding: str | None = field(
        default=None,
        metadata={"help": "Encoding of the text files that are not UTF-8, for example cp1252.", "rare": True},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the text while training, for text larger than memory."}
    )
    validation_split_percentage: float = field(
        default=5.0,
        metadata={"help": "Share of the documents to hold out when there is no validation set.", "rare": True},
    )


def load_texts(args: TextArguments) -> DatasetDict:
    """Loads the documents: `train` and `validation`, columns `text` and `source`.

    Raises:
        ValueError: for flags that contradict each other, and as `documents.load_text`.
    """
    from hf_decoder.data.documents import load_standard_library, load_text

    if not args.train_file and args.dataset_name is None:
        if args.validation_file is not None:
            raise ValueError(f"--validation_file {args.validation_file} needs a --train_file beside it")
        return load_standard_library()
    if not 0 < args.validation_split_percentage < 100:
        raise ValueError(
            f"--validation_split_percentage {args.validation_split_percentage} must lie between 0 and 100; "
            "without held-out text there is nothing to measure"
        )
    options: dict[str, Any] = {
        "validation_file": args.validation_file,
        "text_column": args.text_column,
        "validation_fraction": args.validation_split_percentage / 100,
        "encoding": args.encoding,
    }
    weighted = weighted_files(args.train_file or [])
    if any(weight is not None for _, weight in weighted):
        if args.dataset_name is not None:
            raise ValueError("give either --train_file or --dataset_name, one of the two")
        return _load_mixture(weighted, options)
    return load_text(
        train_file=[path for path, _ in weighted] or None,
        dataset_name=args.dataset_name,
        dataset_config_name=args.dataset_config_name,
        **options,
    )


def weighted_files(names: str | Sequence[str]) -> list[tuple[str, float | None]]:
    """Splits `path:weight`; a bare path, or one that exists with its colon, has no weight.

    Raises:
        ValueError: for a weight that is not positive, and if only some files have weights.
    """
    found: list[tuple[str, float | None]] = []
    for name in [names] if isinstance(names, str) else names:
        path, colon, tail = name.rpartition(":")
        try:
            weight = float(tail) if colon and path and not os.path.exists(name) else None
        except ValueError:
            weight = None
        if weight is not None and not 0 < weight < float("inf"):
            raise ValueError(f"--train_file {name}: the weight {tail} must be positive")
        found.append((name, None) if weight is None else (path, weight))
    bare = [path for path, weight in found if weight is None]
    if bare and len(bare) < len(found):
        raise ValueError(f"--train_file {bare[0]} has no weight, others have; write it as {bare[0]}:0.5")
    return found


def _load_mixture(weighted: Sequence[tuple[str, float | None]], options: dict[str, Any]) -> DatasetDict:
    from datasets import DatasetDict, concatenate_datasets

    from hf_decoder.data.documents import load_text

    loaded = [load_text(train_file=path, **options) for path, _ in weighted]
    validation = [texts["validation"] for texts in loaded]
    return DatasetDict(
        train=mix([texts["train"] for texts in loaded], [weight or 0.0 for _, weight in weighted]),
        validation=validation[0] if options["validation_file"] else concatenate_datasets(validation),
    )


def mix(parts: Sequence[Dataset], weights: Sequence[float]) -> Dataset:
    """Mixes the documents of all parts so that their shares of UTF-8 bytes follow the weights, to a document.

    Every document is used. A part that is too small for its share starts again from its beginning. Parts are spread
    evenly over the whole.
    """
    import numpy as np
    from datasets import concatenate_datasets

    sizes = [_document_bytes(part) for part in parts]
    shares = np.array(weights, float) / np.sum(weights)
    total = max(part.sum() / share for part, share in zip(sizes, shares, strict=True))
    rows, places, first = [], [], 0
    for part, share in zip(sizes, shares, strict=True):
        wanted = total * share
        rounds = int(np.ceil(wanted / part.sum() - 1e-9))
        ends = np.cumsum(np.tile(part, rounds))
        count = int(np.argmin(np.abs(ends - wanted))) + 1  # the whole document nearest to the share
        count = max(count, len(part))
        rows.append(first + np.arange(count) % len(part))
        places.append((ends[:count] - np.tile(part, rounds)[:count] / 2) / ends[count - 1])
        first += len(part)
    order = np.argsort(np.concatenate(places), kind="stable")
    return concatenate_datasets(list(parts)).select(np.concatenate(rows)[order])


def _document_bytes(documents: Dataset) -> np.ndarray:
    import numpy as np
    import pyarrow.compute as pc

    from hf_decoder.data.packing import batch_rows

    batches = documents.select_columns("text").with_format("arrow").iter(batch_rows(documents))
    return np.concatenate([pc.binary_length(batch["text"]).to_numpy() for batch in batches]).astype(np.int64)


def names_of(args: TextArguments) -> list[str]:
    """The names of the files or data set, without folders and weights; none for the standard library."""
    if args.train_file:
        return [Path(path).name for path, _ in weighted_files(args.train_file)]
    return [Path(args.dataset_name).name] if args.dataset_name else []
