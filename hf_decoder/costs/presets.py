"""Named model shapes.

Each entry holds the keyword arguments of `HfDecoderConfig` that fix the shape; the vocabulary size comes from the
tokenizer. Width grows about 64 times as fast as depth, and heads are 64 to 128 wide, as in public families of these
sizes. Below 300M parameters the embeddings are tied, because they would be a large part of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


def _shape(
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    max_position_embeddings: int,
    *,
    tie_word_embeddings: bool,
    intermediate_size: int | None = None,
) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": num_key_value_heads,
        "max_position_embeddings": max_position_embeddings,
        "tie_word_embeddings": tie_word_embeddings,
        "qk_norm": True,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "nano": _shape(192, 4, 3, 1, 1024, tie_word_embeddings=True),
    "tiny": _shape(320, 6, 5, 1, 1024, tie_word_embeddings=True),
    "30m": _shape(512, 8, 8, 4, 2048, tie_word_embeddings=True),
    "125m": _shape(768, 12, 12, 4, 2048, tie_word_embeddings=True),
    "350m": _shape(1024, 24, 16, 4, 4096, tie_word_embeddings=False),
    "1b": _shape(2048, 20, 16, 4, 4096, tie_word_embeddings=False),
    "3b": _shape(2816, 36, 22, 2, 8192, tie_word_embeddings=False),
    "8b": _shape(4096, 34, 32, 8, 8192, tie_word_embeddings=False, intermediate_size=14336),
}


def get_preset(name: str) -> dict[str, Any]:
    """Returns a copy of the `HfDecoderConfig` keyword arguments of preset `name`.

    Raises:
        ValueError: if there is no such preset; lists the presets.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; choose one of: {', '.join(PRESETS)}")
    return dict(PRESETS[name])


@dataclass(frozen=True)
class Shape:
    """The fields of a preset's config that determine its costs; needs no transformers."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool

    @classmethod
    def of(cls, name: str, vocab_size: int) -> Shape:
        """The shape of preset `name`. Raises ValueError as `get_preset`."""
        shape = get_preset(name)
        if not shape.pop("qk_norm"):
            raise NotImplementedError("the sum of parameters counts the norms of queries and keys")
        width = shape["hidden_size"]
        # The config's default: 8/3 of the width, rounded up to a multiple of 64.
        shape["intermediate_size"] = shape["intermediate_size"] or -(-8 * width // (3 * 64)) * 64
        return cls(vocab_size=vocab_size, head_dim=width // shape["num_attention_heads"], **shape)

    @property
    def matmul_parameters(self) -> int:
        """Parameters of linear layers: queries and output, keys and values, gate, up and down, and the head."""
        heads = 2 * self.num_attention_heads + 2 * self.num_key_value_heads
        layer = self.hidden_size * (heads * self.head_dim + 3 * self.intermediate_size)
        return self.num_hidden_layers * layer + self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All parameters: two norms of the width a layer, two of the heads' width, one at the end, and the table."""
        norms = self.num_hidden_layers * 2 * (self.hidden_size + self.head_dim) + self.hidden_size
        table = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        return self.matmul_parameters + norms + table
