"""Reads documents from tables and text files endlessly, and resumes anywhere.

A large text file comes in segments, so that no document has to fit into memory. `datasets.IterableDataset` does the
reading, with one shard per table and per `RANGE_BYTES` of a text file. Its `state_dict` holds the reader's place. A
resumed run reads again from the start of the open shard, and nothing before it.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_decoder.data.documents import hash_share
from hf_decoder.data.reading import check_text_column, explain_table, not_utf8, text_start
from hf_decoder.data.tokenization import LONGEST_PIECE, place_to_cut, split_text

if TYPE_CHECKING:
    from datasets import IterableDataset

RANGE_BYTES = 64 << 20
PIECE_CHARACTERS = 1 << 18
LOOK_BYTES = 1 << 20

# A file may be cut before a line that begins with a visible ASCII character; its tokens do not change.
_VISIBLE = range(0x21, 0x7F)


@dataclass(frozen=True)
class Segment:
    """A part of one document: bytes `start` to `stop` of the file `path`, or characters of a table's row."""

    text: str
    begins: bool = True
    ends: bool = True
    path: str | None = None
    start: int = 0
    stop: int = 0

    def follows(self, other: Segment | None) -> bool:
        """Whether this segment continues the same document where `other` stopped."""
        return other is not None and not self.begins and self.path == other.path and self.start == other.stop


@dataclass(frozen=True)
class Source:
    """One data set of `datasets`: rows of a table, or segments of text files if `column` is None.

    A hash leaves out the `fraction` of its documents that is held out; with `held_out` it leaves out the others.
    """

    data: IterableDataset
    column: str | None
    fraction: float
    name: str
    held_out: bool = False
    builder: str = ""
    files: tuple[Path, ...] = ()


# ---------------------------------------------------------------------------------------------------- text files


def file_segments(
    ranges: list[tuple[str, int, int, int]], fraction: float = 0.0, held_out: bool = False
) -> IterableDataset:
    from datasets import IterableDataset

    options = {"ranges": ranges, "fraction": fraction, "held_out": held_out}
    return IterableDataset.from_generator(_read_ranges, gen_kwargs=options)


def byte_ranges(file: Path, first: int, last: int) -> Iterator[tuple[str, int, int, int]]:
    """Cuts bytes `first` to `last` of a file, without a byte order mark, into ranges (path, start, stop, last)."""
    start = max(first, text_start(file))
    with file.open("rb") as opened:
        while last - start > RANGE_BYTES:
            stop = _line_start(opened, start + RANGE_BYTES, last)
            yield str(file), start, stop, last
            start = stop
    if start < last:
        yield str(file), start, last, last


def _line_start(opened: Any, position: int, last: int) -> int:
    """The first position from `position` on where a line begins with a visible ASCII character; else `last`."""
    opened.seek(position)
    before = b""
    while position < last:
        data = before + opened.read(min(LOOK_BYTES, last - position))
        if len(data) == len(before):
            break  # the file got shorter
        found = data.find(b"\n")
        while 0 <= found < len(data) - 1:
            if data[found + 1] in _VISIBLE:
                return position - len(before) + found + 1
            found = data.find(b"\n", found + 1)
        position += len(data) - len(before)
        before = data[-1:]
    return last


def _read_ranges(ranges: list[tuple[str, int, int, int]], fraction: float, held_out: bool) -> Iterator[dict[str, Any]]:
    for path, start, stop, last in ranges:
        if fraction and (_share_of_file(path) < fraction) != held_out:
            continue
        first = text_start(path)
        for text in _pieces(decoded(path, start, stop)):
            end = start + len(text.encode("utf-8"))
            place = {"path": path, "start": start, "stop": end, "begins": start == first, "ends": end == last}
            yield {"text": text, **place}
            start = end


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """Joins the texts and cuts them again, as `split_text` would cut the whole."""
    waiting = ""
    for text in texts:
        waiting += text
        while len(waiting) > LONGEST_PIECE:
            cut = place_to_cut(waiting, 0, PIECE_CHARACTERS) or len(waiting)
            yield waiting[:cut]
            waiting = waiting[cut:]
    if waiting:
        yield from split_text(waiting, PIECE_CHARACTERS)


def decoded(path: str | Path, start: int, stop: int) -> Iterator[str]:
    """Decodes bytes `start` to `stop` of a file, a megabyte at a time."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with Path(path).open("rb") as file:
        file.seek(start)
        while True:
            data = file.read(min(LOOK_BYTES, stop - start))
            nul = data.find(b"\0")
            if nul >= 0:
                raise ValueError(f"{path} is binary, not text (a zero byte at offset {start + nul}); give UTF-8 text")
            waiting = decoder.getstate()[0]
            try:
                yield decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                wrong = (waiting + data)[error.start]
                raise not_utf8(Path(path), wrong, start - len(waiting) + error.start) from None
            if not data:
                return
            start += len(data)


@functools.lru_cache(maxsize=1 << 16)
def _share_of_file(path: str) -> float:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        file.seek(text_start(path))
        while data := file.read(LOOK_BYTES):
            digest.update(data)
    return hash_share(digest.digest())


# ---------------------------------------------------------------------------------------------------- reading


def check_column(source: Source) -> None:
    """Raises ValueError for a table without rows, or whose text column is missing or holds no text."""
    row = next(_rows(source.data, source), None)
    if row is None:
        raise ValueError(f"{source.name} is empty; it needs at least one character of text")
    text = row.get(str(source.column)) or ""
    check_text_column(list(row), type(text).__name__, str(source.column), source.name)


def _rows(data: IterableDataset, source: Source) -> Iterator[dict[str, Any]]:
    """The rows of a data set one by one; a file that cannot be read is a ValueError of one line.

    Not `iter(data)`, which would split the shards again in a worker of a DataLoader.
    """
    from datasets.exceptions import DatasetsError
    from pyarrow import ArrowException

    try:
        for batch in data.iter(batch_size=1):
            yield {name: values[0] for name, values in batch.items()}
    except (DatasetsError, ArrowException, UnicodeDecodeError) as error:
        raise explain_table(source.builder, list(source.files), source.name, error) from None


class Reader:
    """Reads sources over and over, as the `index`-th of `count` readers that share them.

    Readers divide the shards if `count` divides their number; else each takes every `count`-th row or segment. With a
    `seed`, every pass has another order of shards.

    Raises:
        ValueError: from the iteration, if a whole pass has no text for this reader.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        index: int = 0,
        count: int = 1,
        seed: int | None = None,
        endless: bool = True,
    ):
        self.endless = endless
        self.name = sources[0].name if sources else ""
        self._sources, self._index, self._count, self._seed = sources, index, count, seed
        self._pass, self._source = 0, 0
        self._before: dict[str, Any] | None = None
        self._given = 0

    def state(self) -> dict[str, Any]:
        """The reader's place as JSON values: the state before the current row, and its segments given so far."""
        return {"pass": self._pass, "source": self._source, "data": self._before, "given": self._given}

    def load_state(self, state: dict[str, Any]) -> None:
        """Makes the next iteration begin where `state` was taken."""
        self._pass, self._source = state["pass"], state["source"]
        self._before, self._given = state["data"], state["given"]

    def __iter__(self) -> Iterator[Segment]:
        while True:
            something = self._source > 0 or self._before is not None
            while self._source < len(self._sources):
                for segment in self._read(self._sources[self._source]):
                    something = True
                    yield segment
                self._before = None
                self._source += 1
            if not self.endless:
                return
            if not something:
                raise ValueError(
                    f"{self.name} has no text for reader {self._index + 1} of {self._count}; take fewer processes or "
                    "--dataloader_num_workers"
                )
            self._pass, self._source = self._pass + 1, 0

    def _read(self, source: Source) -> Iterator[Segment]:
        from datasets.distributed import split_dataset_by_node

        data = split_dataset_by_node(source.data, rank=self._index, world_size=self._count)
        data.set_epoch(0 if self._seed is None else (self._seed << 16) + self._pass + 1)
        if self._before is not None:
            data.load_state_dict(self._before)
        given = self._given
        for row in _rows(data, source):
            after = data.state_dict()
            for number, (segment, is_last) in enumerate(_segments(row, source)):
                if number >= given:
                    # After the last segment of a row, the place is after the row.
                    self._before, self._given = (after, 0) if is_last else (self._before, number + 1)
                    yield segment
            self._before, self._given, given = after, 0, 0


def _segments(row: dict[str, Any], source: Source) -> Iterator[tuple[Segment, bool]]:
    """The segments of a row, each with whether it is the last; none if the row has no text for this source."""
    if source.column is None:
        begins, ends = row["begins"], row["ends"]
        yield Segment(row["text"], begins, ends, row["path"], start=row["start"], stop=row["stop"]), True
        return
    text = row.get(source.column)
    if not text or not _is_wanted(text, source):
        return
    start = 0
    for piece in split_text(text, PIECE_CHARACTERS):
        stop = start + len(piece)
        yield Segment(piece, start == 0, stop == len(text), start=start, stop=stop), stop == len(text)
        start = stop


def _is_wanted(text: str, source: Source) -> bool:
    if source.fraction == 0:
        return True
    share = hash_share(hashlib.md5(text.encode("utf-8"), usedforsecurity=False).digest())
    return (share < source.fraction) == source.held_out


class Mixture:
    """Takes turns between readers so that their shares of UTF-8 bytes follow the weights.

    A turn is a group of segments of at least `PIECE_CHARACTERS` characters. A reader that ends drops out.
    """

    def __init__(self, readers: Sequence[Reader], weights: Sequence[float]):
        self._readers = list(readers)
        self._weights = list(weights)
        self.given = [0] * len(readers)
        self._open: dict[int, Iterator[Segment]] = {}
        self._ended: set[int] = set()

    def next_group(self) -> tuple[int, list[Segment]] | None:
        """The number of the next reader and its segments; None when all have ended."""
        while len(self._ended) < len(self._readers):
            left = [number for number in range(len(self._readers)) if number not in self._ended]
            chosen = min(left, key=lambda number: self.given[number] / self._weights[number])
            group = self._read_group(chosen)
            if group:
                return chosen, group
            self._ended.add(chosen)
        return None

    def _read_group(self, number: int) -> list[Segment]:
        if number not in self._open:
            self._open[number] = iter(self._readers[number])
        group, characters = [], 0
        while characters < PIECE_CHARACTERS:
            segment = next(self._open[number], None)
            if segment is None:
                break
            group.append(segment)
            characters += len(segment.text)
            self.given[number] += len(segment.text.encode("utf-8"))
        return group

    def state(self) -> dict[str, Any]:
        """The places of all readers and the bytes that each has given, as JSON values."""
        return json.loads(json.dumps({"given": self.given, "readers": [reader.state() for reader in self._readers]}))

    def load_state(self, state: dict[str, Any]) -> None:
        self.given = list(state["given"])
        for reader, its in zip(self._readers, state["readers"], strict=True):
            reader.load_state(its)
