"""Measures how well a tokenizer fits a text: bytes per token against baselines, coverage, longest tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase

from hf_decoder.data.tokenization import SPECIAL_TOKENS, split_text


@dataclass(frozen=True)
class TokenizerReport:
    """Figures of one tokenizer on held-out text.

    `bytes_per_token`: UTF-8 bytes over tokens. `gpt2_bytes_per_token`: the same for a byte-level BPE of the same size
    with GPT-2's split, trained on the same text. `coverage`: share of the characters that are not unknown.
    `vocabulary_used`: share of the tokens, specials aside, that occur. `exact`: whether decoding gives the text back,
    byte for byte.
    """

    tokens: int
    bytes_per_token: float
    gpt2_bytes_per_token: float
    coverage: float
    vocabulary_used: float
    exact: bool
    longest: list[str]

    def lines(self) -> list[str]:
        """One line a figure, aligned for printing."""
        return [
            f"tokens in the vocabulary       {self.tokens:>9,}",
            f"bytes per token                {self.bytes_per_token:>9.3f}",
            f"  GPT-2's split, same size     {self.gpt2_bytes_per_token:>9.3f}",
            f"  single bytes                 {1:>9.3f}",
            f"characters covered             {self.coverage:>9.2%}",
            f"vocabulary used                {self.vocabulary_used:>9.2%}",
            f"decodes to the same text       {'yes' if self.exact else 'no':>9}",
            f"longest tokens: {', '.join(map(repr, self.longest))}",
        ]


def report(
    tokenizer: PreTrainedTokenizerBase, train: Iterable[str], held_out: Sequence[str], longest: int = 12
) -> TokenizerReport:
    """Measures `tokenizer` on `held_out`, beside a baseline trained on `train`.

    Raises:
        ValueError: if `held_out` has no text.
    """
    num_bytes = sum(len(text.encode("utf-8")) for text in held_out)
    if num_bytes == 0:
        raise ValueError("there is no held-out text to measure the tokenizer on")
    characters = sum(map(len, held_out))
    rows = [_ids(tokenizer, text) for text in held_out]
    ids = np.concatenate([np.array(row, np.int64) for row in rows])
    unknown = tokenizer.unk_token_id
    exact = all(tokenizer.decode(row) == text for row, text in zip(rows, held_out, strict=True))
    ordinary = len(tokenizer) - len(set(tokenizer.all_special_ids))
    baseline = train_gpt2_baseline(train, len(tokenizer))
    baseline_tokens = sum(len(baseline.encode(piece).ids) for text in held_out for piece in split_text(text))
    return TokenizerReport(
        tokens=len(tokenizer),
        bytes_per_token=num_bytes / len(ids),
        gpt2_bytes_per_token=num_bytes / baseline_tokens,
        coverage=1 - int((ids == unknown).sum()) / characters if unknown is not None else 1.0,
        vocabulary_used=len(set(ids.tolist()) - set(tokenizer.all_special_ids)) / max(1, ordinary),
        exact=exact,
        longest=longest_tokens(tokenizer, longest),
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    pieces = list(split_text(text))
    encoded = tokenizer(pieces, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return [token for piece in encoded for token in piece]


def longest_tokens(tokenizer: PreTrainedTokenizerBase, count: int) -> list[str]:
    """The longest tokens as text, longest first, without runs of one character."""
    special = set(tokenizer.all_special_ids)
    texts = [str(tokenizer.decode([token])) for token in range(len(tokenizer)) if token not in special]
    texts = [text for text in texts if len(set(text.strip())) > 1]
    return sorted(texts, key=lambda text: (-len(text), text))[:count]


def train_gpt2_baseline(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE with the split of GPT-2 (Radford et al. 2019)."""
    baseline = Tokenizer(models.BPE())
    baseline.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    baseline.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size, 256 + len(SPECIAL_TOKENS)),
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    baseline.train_from_iterator((piece for text in texts for piece in split_text(text)), trainer)
    return baseline
