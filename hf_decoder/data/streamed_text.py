"""Splits text larger than memory into training text and held-out text.

The split is that of `documents`. Two things differ: only the first `HELD_OUT_BYTES` of the held-out text are kept, and
files that are compressed or not UTF-8 are first unpacked into the disk cache of `datasets`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_decoder.data.documents import MIN_DOCUMENTS_TO_SPLIT, load_files
from hf_decoder.data.reading import (
    bytes_of_text,
    check_encoding,
    find_files,
    load_hub,
    load_table,
    plain_file,
    text_start,
)
from hf_decoder.data.sources import TextArguments, weighted_files
from hf_decoder.data.streaming import (
    LOOK_BYTES,
    Mixture,
    Reader,
    Segment,
    Source,
    byte_ranges,
    check_column,
    decoded,
    file_segments,
)

if TYPE_CHECKING:
    from datasets import Dataset

HELD_OUT_BYTES = 1 << 20


@dataclass(frozen=True)
class Part:
    """Sources that are read in turn, over and over; `weight` is their share of the bytes in a mixture."""

    sources: tuple[Source, ...]
    weight: float = 1.0
    num_bytes: int | None = None


@dataclass(frozen=True)
class StreamedText:
    """The training text in parts, and the held-out documents; `identity` tells this text from others."""

    parts: tuple[Part, ...]
    validation: Dataset
    identity: list[str]

    @property
    def num_bytes(self) -> int | None:
        """About how many bytes the training text has; None if only reading it would tell."""
        sizes = [part.num_bytes for part in self.parts]
        return None if None in sizes else sum(size or 0 for size in sizes)

    def once(self) -> Iterator[Segment]:
        """Reads the training text once, mixed by weight while all parts last."""
        mixture = Mixture([Reader(part.sources, endless=False) for part in self.parts], self.weights)
        while (chosen := mixture.next_group()) is not None:
            yield from chosen[1]

    def beginning(self, characters: int) -> Iterator[str]:
        """The texts of `once` up to `characters`."""
        for segment in self.once():
            yield segment.text
            characters -= len(segment.text)
            if characters <= 0:
                return

    @property
    def weights(self) -> list[float]:
        return [part.weight for part in self.parts]


def open_stream(args: TextArguments) -> StreamedText:
    """Opens the text that the flags name for reading.

    Raises:
        FileNotFoundError: for a path or data set that does not exist.
        ValueError: as `sources.load_texts`; and if nothing can be held out.
    """
    if not args.train_file and args.dataset_name is None:
        raise ValueError("--streaming needs a --train_file or --dataset_name; the standard library fits into memory")
    if args.train_file and args.dataset_name is not None:
        raise ValueError("give either --train_file or --dataset_name, one of the two")
    if not 0 < args.validation_split_percentage < 100:
        raise ValueError(
            f"--validation_split_percentage {args.validation_split_percentage} must lie between 0 and 100; "
            "without held-out text there is nothing to measure"
        )
    check_encoding(args.encoding)
    fraction = args.validation_split_percentage / 100
    given = None
    if args.validation_file is not None:
        given = load_files(args.validation_file, "validation_file", args.text_column, args.encoding)
        fraction = 0.0
    if args.dataset_name is not None:
        return _open_hub(args, fraction, given)
    weighted = weighted_files(args.train_file or [])
    if weighted[0][1] is None:
        groups = [([path for path, _ in weighted], 1.0)]
    else:
        groups = [([path], weight or 0.0) for path, weight in weighted]
    parts, held_out, identity = [], [], []
    for paths, weight in groups:
        part, documents = _open_files(paths, weight, fraction, args, HELD_OUT_BYTES // len(groups))
        parts.append(part)
        held_out += documents
        identity += [f"{weight:g}", *(_identity(file) for source in part.sources for file in source.files)]
    return StreamedText(tuple(parts), _dataset(held_out) if given is None else given, identity)


def _open_files(
    paths: Sequence[str], weight: float, fraction: float, args: TextArguments, held_out_bytes: int
) -> tuple[Part, list[dict[str, str]]]:
    """One part of the training text, and the documents held out of it."""
    texts, tables, name = find_files(paths, "train_file")
    files = [plain_file(file, args.encoding) for file, _ in texts]
    files = [file for file in files if file.stat().st_size > text_start(file)]
    sources = []
    size: int | None = 0
    for builder, found in tables.items():
        table, table_name = load_table(builder, found, args.encoding, streaming=True)
        sources.append(Source(table, args.text_column, fraction, table_name, builder=builder, files=tuple(found)))
        check_column(sources[-1])
        plain = [plain_file(file, None if builder == "parquet" else args.encoding) for file in found]
        sizes = [bytes_of_text(builder, file, args.text_column) for file in plain]
        size = None if size is None or None in sizes else size + sum(each or 0 for each in sizes)
    cut: tuple[int, int] | None = None
    if fraction and files and not tables and len(files) < MIN_DOCUMENTS_TO_SPLIT:
        cut = _tail(files, fraction)
    ends = [_end(number, file, cut) for number, file in enumerate(files)]
    ranges = [entry for file, end in zip(files, ends, strict=True) for entry in byte_ranges(file, 0, end)]
    if ranges:
        data = file_segments(ranges, 0.0 if cut else fraction)
        sources.insert(0, Source(data, None, 0.0, name, files=tuple(files)))
    if not sources:
        raise ValueError(f"train_file {name} is empty; it needs at least one character of text")
    if size is not None:
        own = sum(max(0, end - text_start(file)) for file, end in zip(files, ends, strict=True))
        size = round((size + own) * (1.0 if cut else 1 - fraction))
    part = Part(tuple(sources), weight, size)
    if not fraction:
        return part, []
    if cut is not None:
        rest = [(file, end) for file, end in zip(files, ends, strict=True) if end < file.stat().st_size]
        tail = [entry for file, end in rest for entry in byte_ranges(file, end, file.stat().st_size)]
        return part, list(_until(Reader([Source(file_segments(tail), None, 0.0, name)]), held_out_bytes))
    documents = list(_until(Reader(_held_out(sources, ranges, fraction)), held_out_bytes))
    if len(tables) and len(files) < MIN_DOCUMENTS_TO_SPLIT and _fewer(part, MIN_DOCUMENTS_TO_SPLIT):
        raise ValueError(f"{name} has fewer than {MIN_DOCUMENTS_TO_SPLIT} documents; give a --validation_file")
    if not documents:
        raise ValueError(f"no document of {name} falls to the held-out side; give a --validation_file")
    return part, documents


def _open_hub(args: TextArguments, fraction: float, given: Dataset | None) -> StreamedText:
    loaded, name = load_hub(str(args.dataset_name), args.dataset_config_name, streaming=True)
    own = given is None and "validation" in loaded
    train = Source(loaded["train"], args.text_column, 0.0 if own else fraction, name)
    check_column(train)
    if own:
        validation = Source(loaded["validation"], args.text_column, 0.0, f"{name}, split validation,")
        check_column(validation)
        held_out = list(_until(Reader([validation]), HELD_OUT_BYTES))
        if not held_out:
            raise ValueError(f"{validation.name} is empty; it needs at least one character of text")
    elif given is None:
        held_out = list(_until(Reader(_held_out([train], [], fraction)), HELD_OUT_BYTES))
        if not held_out:
            raise ValueError(f"no document of {name} falls to the held-out side; give a --validation_file")
    identity = [
        str(args.dataset_name),
        str(args.dataset_config_name),
        *_files_of(str(args.dataset_name), args.dataset_config_name),
    ]
    return StreamedText((Part((train,)),), _dataset(held_out) if given is None else given, identity)


def _dataset(documents: list[dict[str, str]]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_list(documents)


def _files_of(dataset_name: str, dataset_config_name: str | None) -> list[str]:
    """Identifies the files of a data set; files of the Hub by their names, which contain the commit."""
    from datasets import load_dataset_builder

    files = load_dataset_builder(dataset_name, dataset_config_name).config.data_files or {}
    names = [str(name) for name in files.get("train", [])]
    return [_identity(Path(name)) if Path(name).is_file() else name for name in names]


def _identity(file: Path) -> str:
    """Identifies a file by its size and a hash of both ends, without reading all of it."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        digest = hashlib.md5(opened.read(LOOK_BYTES), usedforsecurity=False)
        opened.seek(max(0, size - LOOK_BYTES))
        digest.update(opened.read())
    return f"{size}-{digest.hexdigest()[:16]}"


def _tail(files: list[Path], fraction: float) -> tuple[int, int]:
    """Where the last `fraction` of all characters begins: number of the file, and byte in it.

    As in `documents`, the cut moves back to a line border unless that more than doubles the share.
    """
    lengths = [sum(map(len, decoded(file, text_start(file), file.stat().st_size))) for file in files]
    left = sum(lengths) - max(1, round(sum(lengths) * fraction))
    number = 0
    while left > lengths[number]:
        left -= lengths[number]
        number += 1
    first = border = cut = size = text_start(files[number])  # in bytes of the file
    done = border_at = 0  # in characters
    for text in decoded(files[number], first, files[number].stat().st_size):
        head = text[: max(0, left - done)]
        newline = head.rfind("\n") + 1
        if newline:
            border, border_at = size + len(head[:newline].encode("utf-8")), done + newline
        cut = size + len(head.encode("utf-8"))
        if left - done <= len(text):
            break
        done += len(text)
        size += len(text.encode("utf-8"))
    if left < lengths[number] and left - border_at <= lengths[number] - left:
        cut = border
    if number == 0 and cut == first:
        raise ValueError(
            f"{sum(lengths)} characters are too few to hold some out for validation; give a validation_file"
        )
    return number, cut


def _end(number: int, file: Path, cut: tuple[int, int] | None) -> int:
    """The byte at which the training text of a file ends."""
    if cut is None or number < cut[0]:
        return file.stat().st_size
    return cut[1] if number == cut[0] else 0


def _held_out(sources: Sequence[Source], ranges: list[tuple[str, int, int, int]], fraction: float) -> list[Source]:
    """Sources that read the held-out documents."""
    tables = [replace(source, held_out=True) for source in sources if source.column is not None]
    texts = [Source(file_segments(ranges, fraction, held_out=True), None, 0.0, sources[0].name)] if ranges else []
    return texts + tables


def _until(reader: Reader, num_bytes: int) -> Iterator[dict[str, str]]:
    """The first `num_bytes` bytes of documents; the last one is cut."""
    text = ""
    reader.endless = False
    for segment in reader:
        text += segment.text
        size = len(text.encode("utf-8"))
        if segment.ends or size >= num_bytes:
            kept = text.encode("utf-8")[:num_bytes].decode("utf-8", "ignore")
            yield {"text": kept, "source": Path(segment.path).name if segment.path else reader.name}
            num_bytes -= size
            text = ""
        if num_bytes <= 0:
            return


def _fewer(part: Part, documents: int) -> bool:
    seen = sum(1 for _, segment in zip(range(documents), Reader(part.sources, endless=False), strict=False))
    return seen < documents
