"""Tokenises documents and packs them into blocks of one length, for training and for scoring.

The layout:

- A tokenised document is `<|endoftext|> t1 ... tn <|endoftext|>`. The first marker is context for t1. The last marker
  is the end, which the model must predict too. So n + 1 predictions cover every byte of the text.
- Documents lie end to end, and the closing marker of one is the opening marker of the next (GPT-2's stream). The old
  document predicts the shared marker. Only the new document reads it, because `position_ids` restart at 0 there. So
  documents stay isolated and nothing is scored twice. If bos differs from eos, nothing is shared: documents are
  `bos t1 ... tn eos`, and bos has label -100.
- A block starts with the last token of the previous block as context (label -100, position 0). So the blocks of a text
  score each of its tokens exactly once.

Labels are aligned with `input_ids`: the model shifts them. Rows carry no `attention_mask`, and no collator may add
one: models tell packed documents apart by `position_ids` only when there is no mask, and transformers' own models only
with `use_cache=False`. Use `transformers.default_data_collator`.

Bits per byte = summed loss in nats / ln 2 / `CorpusReport.bytes`, over every scored token of `pack_for_evaluation`.
A mean over batches is another number, because the last block is shorter.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_decoder.data.tokenization import digest_of, split_text

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100

# Characters tokenised at once and tokens packed at once; either takes some hundred MB of memory.
ENCODE_CHARACTERS = 1 << 22
PACK_TOKENS = 1 << 20


@dataclass(frozen=True)
class CorpusReport:
    """Counts documents, bytes, tokens and blocks of a text.

    `bytes`: UTF-8 bytes of the documents. `tokens`: tokens of the documents plus one end marker each. `scored_tokens`:
    the tokens that the blocks score; all of them when packed for evaluation.
    """

    documents: int
    bytes: int
    tokens: int
    blocks: int
    scored_tokens: int

    @classmethod
    def of(cls, tokenized: Dataset, packed: Dataset) -> CorpusReport:
        """Count `tokenized` (from `tokenize`) and what `pack` or `pack_for_evaluation` made of it."""
        num_bytes = tokenized.with_format("numpy", columns=["num_bytes"])["num_bytes"]
        scored = 0
        rows = max(1, PACK_TOKENS // len(packed[0]["labels"])) if len(packed) else 1
        for batch in packed.with_format("arrow", columns=["labels"]).iter(rows):
            labels = _flatten(batch["labels"]).reshape(len(batch), -1)
            scored += int(np.count_nonzero(labels[:, 1:] != IGNORE_INDEX))
        return cls(
            documents=len(tokenized),
            bytes=int(np.sum(num_bytes)),
            tokens=int(np.sum(_lengths(tokenized) - 1)),
            blocks=len(packed),
            scored_tokens=scored,
        )

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / max(1, self.tokens)

    def lines(self) -> list[str]:
        """One line a figure, aligned for printing."""
        return [
            f"documents       {self.documents:>14,}",
            f"bytes           {self.bytes:>14,}",
            f"tokens          {self.tokens:>14,}",
            f"bytes per token {self.bytes_per_token:>14.3f}",
            f"blocks          {self.blocks:>14,}",
            f"scored tokens   {self.scored_tokens:>14,}",
        ]


def tokenize(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, num_proc: int | None = None) -> Dataset:
    """Encode the `text` column: one row per document, columns `input_ids` (int32) and `num_bytes` (UTF-8, int64).

    A row is the opening marker (bos, or eos if there is no bos), the tokens of the text, and eos. Special tokens
    written in a text are plain text. A fast tokenizer uses all cores by itself; `num_proc` starts processes. The disk
    cache of `datasets` keeps the rows under a hash of texts and tokenizer, so the same texts are tokenised once.

    Raises ValueError for a tokenizer without eos token, and for one that produces ids outside its own vocabulary.
    """
    from datasets import Features, List, Value

    key = f"{_digest(dataset)}-{digest_of(tokenizer)}-{'-'.join(map(str, markers_of(tokenizer)))}"
    return dataset.map(
        _encode,
        batched=True,
        batch_size=batch_rows(dataset),
        fn_kwargs={"tokenizer": tokenizer},
        remove_columns=dataset.column_names,
        features=Features({"input_ids": List(Value("int32")), "num_bytes": Value("int64")}),
        num_proc=num_proc,
        cache_file_name=_cache_file(f"tokens-{key}"),
        new_fingerprint=hashlib.sha256(key.encode()).hexdigest()[:16],
        desc="Tokenizing",
    )


def _digest(documents: Dataset) -> str:
    """A hash of all texts, in order."""
    import pyarrow as pa
    import pyarrow.compute as pc

    digest = hashlib.sha256()
    for batch in documents.select_columns("text").with_format("arrow").iter(batch_rows(documents)):
        for chunk in batch["text"].cast(pa.large_binary()).chunks:
            digest.update(pc.binary_length(chunk).to_numpy().tobytes())
            begins = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            if begins[-1] > begins[0]:
                digest.update(memoryview(chunk.buffers()[2])[begins[0] : begins[-1]])
    return digest.hexdigest()[:24]


def _cache_file(name: str) -> str | None:
    """A file in the disk cache of `datasets`; None, which means memory, if the cache cannot be written to."""
    from datasets import config

    folder = os.path.join(config.HF_DATASETS_CACHE, "hf_decoder")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return None
    return os.path.join(folder, f"{name}.arrow") if os.access(folder, os.W_OK) else None


def pack(dataset: Dataset, block_size: int) -> Dataset:
    """Pack the rows of `tokenize` into training blocks of `block_size` tokens, in order.

    Columns `input_ids`, `position_ids`, `labels`, each of length `block_size`, as torch tensors (int64). The tail that
    does not fill a block is dropped.

    Raises ValueError for a block size under 2, and for a text shorter than one block.
    """
    layout = _Layout(dataset, block_size, stride=block_size - 1)
    check_one_block(layout.total, block_size)
    return layout.pack(dataset, (layout.total - block_size) // layout.stride + 1)


def check_one_block(tokens: int, block_size: int) -> None:
    """Raises ValueError for a text whose tokens and markers do not fill one block."""
    if tokens < block_size:
        raise ValueError(
            f"the training text has {tokens} tokens, less than one block of {block_size}; lower block_size or add text"
        )


def pack_for_evaluation(dataset: Dataset, block_size: int, stride: int | None = None) -> Dataset:
    """Pack the rows of `tokenize` into blocks that score every token of every document exactly once.

    Columns as in `pack`. End markers with label -100 fill the last block. A block advances by `stride` tokens and
    scores as many: `block_size - 1` by default. A smaller stride gives each scored token at least
    `block_size - stride` tokens of context (fewer at the start of the text), at `block_size / stride` times the work.

    Raises ValueError when there is no document, for a block size under 2, and for a stride outside 1..block_size - 1.
    """
    if len(dataset) == 0:
        raise ValueError("the validation split has no documents; give a validation file or raise validation_fraction")
    stride = block_size - 1 if stride is None else stride
    layout = _Layout(dataset, block_size, stride)
    blocks = 1 + max(0, -(-(layout.total - block_size) // stride))
    return layout.pack(dataset, blocks)


def batch_rows(dataset: Dataset) -> int:
    """How many rows of `dataset` to hold at once: 1000, or fewer if rows are long."""
    row_bytes = dataset.data.nbytes / max(1, dataset.data.num_rows)
    return int(min(1000, max(1, ENCODE_CHARACTERS // max(1, row_bytes))))


class _Layout:
    """Positions of documents and blocks in the stream of all documents laid end to end.

    `starts[d]` is the position of document d's opening marker; a last entry marks the end.
    """

    def __init__(self, dataset: Dataset, block_size: int, stride: int):
        if block_size < 2:
            raise ValueError(f"block_size {block_size} must be at least 2: a token and the one before it")
        if not 1 <= stride < block_size:
            raise ValueError(f"stride {stride} must lie between 1 and block_size - 1 = {block_size - 1}")
        self.block_size = block_size
        self.stride = stride
        lengths = _lengths(dataset)
        if len(lengths) and lengths.min() < 2:
            raise ValueError("a document has fewer than its two markers; pack takes the rows that tokenize returns")
        # A closing marker that equals the opening one is left to the next document.
        first = dataset[0]["input_ids"] if len(dataset) else [0, 0]
        self.opening, self.closing = int(first[0]), int(first[-1])
        self.shared = int(self.opening == self.closing)
        self.starts = np.concatenate([[0], np.cumsum(lengths - self.shared)])
        self.total = int(self.starts[-1]) + (self.shared if len(lengths) else 0)

    def pack(self, dataset: Dataset, blocks: int) -> Dataset:
        from datasets import Dataset, Features, List, Value
        from datasets.fingerprint import Hasher

        fingerprint = Hasher.hash([dataset._fingerprint, self.block_size, self.stride, blocks])
        # Packed rows go where the documents are: beside them in the disk cache, or to memory.
        cache = None
        if dataset.cache_files:
            folder = os.path.dirname(dataset.cache_files[0]["filename"])
            cache = os.path.join(folder, f"cache-{fingerprint}.arrow")
        column = List(Value("int32"), length=self.block_size)
        packed = Dataset.from_dict({"block": np.arange(blocks)}).map(
            self._rows,
            batched=True,
            batch_size=max(1, PACK_TOKENS // self.block_size),
            fn_kwargs={"documents": dataset.select_columns("input_ids").with_format("arrow")},
            remove_columns=["block"],
            features=Features({"input_ids": column, "position_ids": column, "labels": column}),
            cache_file_name=cache,
            new_fingerprint=fingerprint,
            desc="Packing",
        )
        return packed.with_format("torch")

    def _rows(self, batch: dict[str, list[int]], documents: Dataset) -> dict[str, np.ndarray]:
        first, last = batch["block"][0], batch["block"][-1]
        start = first * self.stride
        stop = last * self.stride + self.block_size
        stream = self._span(documents, start, min(stop, self.total))
        if stop > self.total:
            # Under causal attention no scored token sees the filling.
            filling = np.tile(np.array([[self.closing], [1], [0]], np.int32), stop - self.total)
            stream = np.concatenate([stream, filling], axis=1)
        ids, positions, labels = cut_blocks(stream, self.block_size, self.stride)
        labels[1 if first == 0 else 0 :, : self.block_size - self.stride] = IGNORE_INDEX  # scored in the block before
        return {"input_ids": ids, "position_ids": positions, "labels": labels}

    def _span(self, documents: Dataset, start: int, stop: int) -> np.ndarray:
        """The stream from `start` to `stop`, as `cut_blocks` takes it."""
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        # The last marker of the stream is in the last document's row. No block begins with it.
        last = min(int(np.searchsorted(self.starts, stop - 1, side="right")) - 1, len(documents) - 1)
        rows = _flatten(documents[first : last + 1]["input_ids"])
        within = np.arange(first + 1, last + 1)
        ends = self.starts[within] - self.starts[first] + self.shared * (within - first) - 1
        low = start - self.starts[first]
        high = stop - self.starts[first] + self.shared * (last - first)
        if (rows[ends] != self.closing).any() or (rows[ends + 1] != self.opening).any():
            raise ValueError("documents differ in their markers; pack takes the rows that one tokenizer gave")
        tokens = rows[low:high]
        if self.shared:
            tokens = np.delete(tokens, ends[ends >= low] - low)
        restarts = np.zeros(stop - start, np.int32)
        restarts[self.starts[slice(*np.searchsorted(self.starts, [start, stop]))] - start] = 1
        return np.stack([tokens, restarts, np.ones_like(restarts) if self.shared else 1 - restarts])


def cut_blocks(stream: np.ndarray, block_size: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cuts a stream into blocks that begin `stride` tokens apart.

    `stream` is (3, tokens) int32: ids, whether a document starts there, whether the token is scored. Returns ids,
    positions and labels, each (blocks, block_size). A document that began before the block counts from its start.
    """
    ids, restarts, scored = np.lib.stride_tricks.sliding_window_view(stream, block_size, axis=1)[:, ::stride]
    columns = np.arange(block_size, dtype=np.int32)
    positions = columns - np.maximum.accumulate(np.where(restarts, columns, 0), axis=1)
    labels = np.where(scored, ids, IGNORE_INDEX)
    labels[:, 0] = IGNORE_INDEX
    return np.array(ids), positions, labels


def markers_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """The ids that open and close a document. Raises ValueError for a tokenizer without eos token."""
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos_token to end a document with; set tokenizer.eos_token")
    opening = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return opening, tokenizer.eos_token_id


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[np.ndarray]:
    """The ids of each text (int32), without markers. Special tokens written in a text are plain text.

    Raises ValueError for ids outside the tokenizer's own vocabulary.
    """
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    rows = [np.array(ids, np.int32) for ids in encoded["input_ids"]]
    largest = max((int(row.max()) for row in rows if len(row)), default=0)
    if largest >= len(tokenizer):
        raise ValueError(f"the tokenizer gave id {largest}, past its vocabulary of {len(tokenizer)}; repair it")
    return rows


def _encode(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    opening, closing = markers_of(tokenizer)
    rows: list[list[np.ndarray]] = [[np.array([opening], np.int32)] for _ in batch["text"]]
    for owners, pieces in _groups(batch["text"]):
        for owner, ids in zip(owners, encode_texts(tokenizer, pieces), strict=True):
            rows[owner].append(ids)
    input_ids = [np.concatenate([*row, np.array([closing], np.int32)]) for row in rows]
    return {"input_ids": input_ids, "num_bytes": [len(text.encode("utf-8")) for text in batch["text"]]}


def _groups(texts: list[str]) -> Iterator[tuple[list[int], list[str]]]:
    """Groups pieces of texts, each with the number of its text, to what a tokenizer should get at once."""
    owners: list[int] = []
    pieces: list[str] = []
    characters = 0
    for owner, text in enumerate(texts):
        for piece in split_text(text):
            owners.append(owner)
            pieces.append(piece)
            characters += len(piece)
            if characters >= ENCODE_CHARACTERS:
                yield owners, pieces
                owners, pieces, characters = [], [], 0
    if pieces:
        yield owners, pieces


def _lengths(dataset: Dataset) -> np.ndarray:
    """Tokens of every row of `input_ids`, int64."""
    import pyarrow.compute as pc

    documents = dataset.select_columns("input_ids").with_format("arrow")
    counts = [pc.list_value_length(batch["input_ids"]).to_numpy() for batch in documents.iter(10_000)]
    return np.concatenate(counts).astype(np.int64) if counts else np.zeros(0, np.int64)


def _flatten(column: Any) -> np.ndarray:
    """The values of an arrow list column, one after the other, as one array."""
    chunks = [chunk.flatten().to_numpy() for chunk in column.chunks]
    return chunks[0] if len(chunks) == 1 else np.concatenate(chunks)
