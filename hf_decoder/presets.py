"""Named model shapes: data, not branches.

Each entry holds the keyword arguments of `HfDecoderConfig` that fix the shape; the vocabulary size comes from the
tokenizer. Width grows about 64 times as fast as depth and heads are 64 to 128 wide, the ratio that public families
of these sizes share. Below 300M parameters the embeddings are tied: there the table would otherwise be a large part
of the model.
"""

from __future__ import annotations

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
        ValueError: if there is no such preset; the message lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; choose one of: {', '.join(PRESETS)}")
    return dict(PRESETS[name])
