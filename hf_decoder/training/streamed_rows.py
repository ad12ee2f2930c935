"""Packs rows of documents while a training runs, from text that need not fit into memory.

Documents and rows have the layout of `packing`. Without shuffling, the rows of a first pass equal those of
`packing.pack`. Rows come in windows: text is tokenised and packed until there are `buffer_size` rows, and these are
drawn in random order. Memory holds one window. A checkpoint holds the reader's state at the start of its window and
the number of rows taken since. A resumed run builds the window again and continues in it.

Each process and each worker of its DataLoader has a reader of its own (see `streaming.Reader`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from hf_decoder.data.packing import cut_blocks, encode_texts, markers_of
from hf_decoder.data.streaming import Mixture, Reader, Segment, Source
from hf_decoder.data.tokenization import split_text
from hf_decoder.training.throughput import MeasuringTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLACE = "stream_place"
_PIECE_CHARACTERS = 1 << 16


class StreamPacker:
    """Packs segments of documents into blocks; tokens that do not fill a block wait for more.

    `opening` and `closing` are the markers of a document. Where they are equal, the closing marker of one document is
    the opening marker of the next.
    """

    def __init__(self, block_size: int, opening: int, closing: int):
        if block_size < 2:
            raise ValueError(f"block_size {block_size} must be at least 2: a token and the one before it")
        self.block_size = block_size
        self._opening, self._closing = opening, closing
        self._waiting: list[np.ndarray] = [np.zeros((3, 0), np.int32)]  # tokens, restarts, scored
        self._length = 0
        self._open = False  # whether a document's end has not been written yet
        self._last: Segment | None = None

    def add(self, segment: Segment, ids: np.ndarray) -> None:
        """Takes the tokens of the next segment."""
        if segment.begins:
            if self._open and self._opening != self._closing:
                self._append([self._closing])
            # An opening marker is scored where it also ends the previous document.
            self._append([self._opening], restarts=True, scored=self._open and self._opening == self._closing)
        elif not segment.follows(self._last):
            if self._open:
                self._append([self._closing], restarts=self._opening == self._closing)
            if len(ids):
                self._append(ids[:1], restarts=True, scored=False)
                ids = ids[1:]
        self._append(ids)
        self._open, self._last = segment.ends, segment

    def _append(self, ids: Any, restarts: bool = False, scored: bool = True) -> None:
        part = np.empty((3, len(ids)), np.int32)
        part[0], part[1], part[2] = ids, restarts, scored
        self._waiting.append(part)
        self._length += len(ids)

    @property
    def blocks(self) -> int:
        """The number of complete blocks."""
        return max(0, (self._length - 1) // (self.block_size - 1))

    def take(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The complete blocks: ids, positions and labels, each (blocks, block_size)."""
        waiting = np.concatenate(self._waiting, axis=1)
        stride, blocks = self.block_size - 1, self.blocks
        self._waiting = [waiting[:, blocks * stride :]]
        self._length -= blocks * stride
        if blocks == 0:
            return tuple(np.zeros((3, 0, self.block_size), np.int32))  # type: ignore[return-value]
        return cut_blocks(waiting[:, : blocks * stride + 1], self.block_size, stride)

    def state(self) -> dict[str, Any]:
        """The waiting tokens, as JSON values."""
        waiting = np.concatenate(self._waiting, axis=1)
        last = self._last
        place = None if last is None else [last.path, last.start, last.stop]
        return {"waiting": waiting.tolist(), "open": self._open, "last": place}

    def load_state(self, state: dict[str, Any]) -> None:
        self._waiting = [np.array(state["waiting"], np.int32).reshape(3, -1)]
        self._length = self._waiting[0].shape[1]
        self._open = state["open"]
        if state["last"] is not None:
            path, start, stop = state["last"]
            self._last = Segment("", path=path, start=start, stop=stop)


class StreamedRows(IterableDataset):
    """Endless rows `input_ids`, `position_ids`, `labels` (block_size,) int64, each with its place in the stream.

    Args:
        parts: the sources of each part of a mixture.
        weights: their shares of bytes.
        buffer_size: rows to shuffle at a time; 0 keeps their order.
        index, count: number of this process, and of all processes.
        seed: of the shuffling.
    """

    def __init__(
        self,
        parts: Sequence[Sequence[Source]],
        weights: Sequence[float],
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        *,
        buffer_size: int = 0,
        index: int = 0,
        count: int = 1,
        seed: int = 0,
    ):
        self._parts, self._weights = parts, weights
        self._tokenizer = tokenizer
        self.block_size = block_size
        self.batch_size = 1  # rows that the data loader takes from one worker before it asks the next one
        self._buffer_size = buffer_size
        self._index, self._count, self._seed = index, count, seed
        self._places: dict[str, dict[str, Any]] = {}
        self._taken = 0

    def resume(self, places: dict[str, dict[str, Any]], rows_taken: int) -> None:
        """Makes iteration continue after the `places` of the workers.

        The first `rows_taken` rows are None, because Trainer skips that many.
        """
        self._places, self._taken = places, rows_taken

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        if info is not None:
            _be_a_worker()
        batches = self._taken // self.batch_size
        mine = batches // workers + (worker < batches % workers)
        for _ in range(mine * self.batch_size):
            yield None
        yield from self._rows(worker, workers, self._places.get(str(worker)))

    def _rows(self, worker: int, workers: int, place: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
        index, count = self._index * workers + worker, self._count * workers
        # Without shuffling, one reader keeps the order of the text.
        seed = self._seed if self._buffer_size else None
        mixture = Mixture([Reader(sources, index, count, seed) for sources in self._parts], self._weights)
        packers = [StreamPacker(self.block_size, *markers_of(self._tokenizer)) for _ in self._parts]
        number, first = 0, 0
        if place is not None:
            window = json.loads(place["window"])
            number, first = window["number"], place["row"]
            mixture.load_state(window["mixture"])
            for packer, state in zip(packers, window["packers"], strict=True):
                packer.load_state(state)
        while True:
            state = json.dumps(
                {"number": number, "mixture": mixture.state(), "packers": [packer.state() for packer in packers]}
            )
            columns = self._window(mixture, packers)
            rows = len(columns[0])
            order = np.arange(rows)
            if self._buffer_size:
                np.random.default_rng([self._seed, index, number]).shuffle(order)
            for done in range(first, rows):
                row = order[done]
                ids, positions, labels = (torch.from_numpy(column[row].astype(np.int64)) for column in columns)
                yield {
                    "input_ids": ids,
                    "position_ids": positions,
                    "labels": labels,
                    PLACE: (worker, state, done + 1),
                }
            number, first = number + 1, 0

    def _window(self, mixture: Mixture, packers: list[StreamPacker]) -> list[np.ndarray]:
        """The next rows: at least `buffer_size`, and at least one."""
        found, rows = [], 0
        while rows < max(1, self._buffer_size):
            chosen = mixture.next_group()
            assert chosen is not None, "readers for training do not end"
            number, group = chosen
            for segment, ids in zip(group, self._encode(group), strict=True):
                packers[number].add(segment, ids)
            found.append(packers[number].take())
            rows += len(found[-1][0])
        return [np.concatenate(column) for column in zip(*found, strict=True)]

    def _encode(self, group: list[Segment]) -> Iterator[np.ndarray]:
        pieces = [list(split_text(segment.text, _PIECE_CHARACTERS)) for segment in group]
        ids = iter(encode_texts(self._tokenizer, [piece for texts in pieces for piece in texts]))
        for texts in pieces:
            yield np.concatenate([next(ids) for _ in texts])


def _be_a_worker() -> None:
    import fsspec.asyn

    # Tokenizers and fsspec keep threads that do not survive a fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    fsspec.asyn.reset_lock()


class PlaceKeeper:
    """Wraps a collator: gives each batch the place of its last row, and leaves out rows that are None."""

    def __init__(self, collate: Any):
        self._collate = collate

    def __call__(self, rows: list[dict[str, Any] | None]) -> dict[str, Any]:
        whole = [row for row in rows if row is not None]
        if not whole:
            return {}
        worker, window, row = whole[-1][PLACE]
        batch = self._collate([{name: row[name] for name in row if name != PLACE} for row in whole])
        # One string, because it passes between processes and devices unchanged.
        return {**batch, PLACE: json.dumps([worker, {"window": window, "row": row}])}


class StreamingTrainer(MeasuringTrainer):
    """Trains on `StreamedRows`: every process reads its own rows, and every checkpoint holds their places.

    Raises:
        ValueError: from the training, for text that cannot be read.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.places: dict[str, dict[str, Any]] = {}
        # First, before the callback that marks a checkpoint as whole.
        self.callback_handler.callbacks.insert(0, _SavePlaces(self))

    def resume(self, checkpoint: str) -> None:
        """Makes the training continue from the places in a checkpoint.

        Raises:
            ValueError: if the checkpoint is not of a streamed run, or of a run with fewer processes.
        """
        folder = Path(checkpoint)
        path = folder / place_file(self.args.process_index)
        if not path.is_file():
            raise ValueError(
                f"{checkpoint} does not say where this process stood in its text: there is no {path.name}"
            )
        self.places = json.loads(path.read_text(encoding="utf-8"))
        steps = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).global_step
        rows: Any = self.train_dataset
        skipped = 0 if self.args.ignore_data_skip else steps * self.args.gradient_accumulation_steps
        rows.resume(dict(self.places), skipped * self._train_batch_size)

    def get_train_dataloader(self) -> Any:
        from accelerate.data_loader import DataLoaderShard

        rows: Any = self.train_dataset
        rows.batch_size = self._train_batch_size
        args = self.args
        # Not prepared by accelerate, which would make every process read the rows of all.
        return DataLoaderShard(
            rows,
            device=args.device,
            batch_size=self._train_batch_size,
            collate_fn=PlaceKeeper(self.data_collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        try:
            batches, items = super().get_batch_samples(*args, **kwargs)
        except ValueError as error:
            # A worker's error arrives as the text of its traceback; the last line is the message.
            raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from error
        for batch in batches:
            worker, place = json.loads(batch.pop(PLACE))
            self.places[str(worker)] = place
        return batches, items


def place_file(process_index: int) -> str:
    """The file of a checkpoint that holds the places of one process."""
    return f"stream_{process_index}.json"


class _SavePlaces(TrainerCallback):
    def __init__(self, trainer: StreamingTrainer):
        self._trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / place_file(args.process_index)).write_text(json.dumps(self._trainer.places), encoding="utf-8")
