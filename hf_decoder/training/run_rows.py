"""Makes the rows of a pretraining from text, whole or streamed, and the report before the training starts."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_decoder.data.packing import (
    CorpusReport,
    check_one_block,
    encode_texts,
    markers_of,
    pack,
    pack_for_evaluation,
    tokenize,
)
from hf_decoder.data.sources import TextArguments, load_texts
from hf_decoder.data.streamed_text import StreamedText, open_stream
from hf_decoder.data.tokenization import split_text
from hf_decoder.training.checkpoints import describe_data
from hf_decoder.training.streamed_rows import StreamedRows

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase, TrainingArguments

# Characters of a streamed text that train a tokenizer, and that serve to estimate the number of tokens.
TOKENIZER_CHARACTERS = 50_000_000
SAMPLE_CHARACTERS = 1_000_000


@dataclass(frozen=True)
class StreamReport:
    """Figures of a streamed text before it is read: `bytes` from file sizes, the others from a sample."""

    bytes: int | None
    bytes_per_token: float
    block_size: int
    documents: int | None = None

    @property
    def tokens(self) -> int | None:
        return None if self.bytes is None else round(self.bytes / self.bytes_per_token)

    @property
    def blocks(self) -> int | None:
        return None if self.tokens is None else self.tokens // (self.block_size - 1)

    def lines(self) -> list[str]:
        """One line a figure, aligned for printing."""

        def about(number: int | None) -> str:
            return "not known" if number is None else f"about {number:,}"

        return [
            f"bytes           {about(self.bytes):>20}",
            f"tokens          {about(self.tokens):>20}",
            f"bytes per token {self.bytes_per_token:>20.3f}",
            f"blocks          {about(self.blocks):>20}",
        ]


@dataclass(frozen=True)
class Rows:
    """Rows for training and evaluation; `description` identifies their text."""

    train: Any
    evaluation: Dataset
    held_out: list[str]
    train_report: CorpusReport | StreamReport
    eval_report: CorpusReport
    description: dict[str, Any]

    def lines(self) -> list[str]:
        """The reports of both texts."""
        streamed = isinstance(self.train_report, StreamReport)
        training = ["training text, streamed" if streamed else "training text"]
        training += [f"  {line}" for line in self.train_report.lines()]
        return [*training, "held-out text", *(f"  {line}" for line in self.eval_report.lines())]


def open_text(args: TextArguments) -> DatasetDict | StreamedText:
    """Opens the text that the flags name, whole or streamed. Raises as `load_texts` and `open_stream`."""
    return open_stream(args) if args.streaming else load_texts(args)


def held_out_texts(text: DatasetDict | StreamedText) -> list[str]:
    """The held-out documents."""
    return (text.validation if isinstance(text, StreamedText) else text["validation"])["text"][:]


def training_texts(text: DatasetDict | StreamedText) -> Iterator[str]:
    """The texts to train a tokenizer on: all of them, or the beginning of a stream."""
    if isinstance(text, StreamedText):
        return text.beginning(TOKENIZER_CHARACTERS)
    return (document for batch in text["train"].iter(batch_size=64) for document in batch["text"])


def make_rows(
    texts: DatasetDict, tokenizer: PreTrainedTokenizerBase, block_size: int, num_proc: int | None = None
) -> Rows:
    """Tokenises and packs a text that is in memory. Raises ValueError as `packing.pack`."""
    tokens = {split: tokenize(texts[split], tokenizer, num_proc) for split in ("train", "validation")}
    train = pack(tokens["train"], block_size)
    evaluation = pack_for_evaluation(tokens["validation"], block_size)
    return Rows(
        train,
        evaluation,
        held_out_texts(texts),
        CorpusReport.of(tokens["train"], train),
        CorpusReport.of(tokens["validation"], evaluation),
        describe_data(tokens["train"], block_size),
    )


def make_streamed_rows(
    text: StreamedText,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    buffer_size: int,
    args: TrainingArguments,
) -> Rows:
    """Makes rows while the training runs. Raises ValueError as `packing.pack` and `pack_for_evaluation`."""
    if buffer_size < 0:
        raise ValueError(f"--shuffle_buffer_size {buffer_size} must be 0, for text in order, or more")
    tokens = tokenize(text.validation, tokenizer)
    evaluation = pack_for_evaluation(tokens, block_size)
    train = StreamedRows(
        [part.sources for part in text.parts],
        text.weights,
        tokenizer,
        block_size,
        buffer_size=buffer_size,
        index=args.process_index,
        count=args.world_size,
        seed=args.seed if args.data_seed is None else args.data_seed,
    )
    description = {
        "block_size": block_size,
        "shuffle_buffer_size": buffer_size,
        "dataloader_num_workers": args.dataloader_num_workers,
        "processes": args.world_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "content": hashlib.sha256("\n".join(text.identity).encode()).hexdigest()[:16],
    }
    report = StreamReport(text.num_bytes, _bytes_per_token(text, tokenizer, block_size), block_size)
    return Rows(train, evaluation, held_out_texts(text), report, CorpusReport.of(tokens, evaluation), description)


def _bytes_per_token(text: StreamedText, tokenizer: PreTrainedTokenizerBase, block_size: int) -> float:
    """Bytes per token of the beginning. Raises ValueError if this is the whole text and shorter than a block."""
    texts = list(text.beginning(SAMPLE_CHARACTERS))
    pieces = [piece for text in texts for piece in split_text(text)]
    tokens = sum(map(len, encode_texts(tokenizer, pieces)))
    if sum(map(len, texts)) < SAMPLE_CHARACTERS:
        opening, closing = markers_of(tokenizer)
        # A text short enough for this check has one segment per document.
        check_one_block(tokens + (len(texts) + 1 if opening == closing else 2 * len(texts)), block_size)
    return sum(len(text.encode("utf-8")) for text in texts) / max(1, tokens)


def coverage(report: CorpusReport | StreamReport, rows_seen: int, block_size: int) -> list[str]:
    """Lines that say how much of its text a run sees: tokens, epochs, and the share seen at least once."""
    lines = ["this run, if it takes all its steps", f"  tokens seen     {rows_seen * block_size:>14,}"]
    if report.blocks:
        epochs = rows_seen / report.blocks
        lines += [f"  epochs          {epochs:>14.3f}", f"  share of text   {min(1.0, epochs):>14.1%}"]
    return lines
