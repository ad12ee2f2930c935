"""Tiny random models and inputs that tests share."""

from typing import Any

import torch
from torch import nn

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.engine.cpp.build import find_compiler

# No size equals another one, so that a mixed-up dimension cannot go unnoticed.
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
}

# the engine's own ways, where `settings.ways` may pin them
CPP = dict.fromkeys(("norm", "rotation", "gate", "loss"), "C++" if find_compiler() else "torch")
OUR_WAYS = {"attention": "tiles of 64", **CPP}
WINDOWS = {"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"]}
ATTENTION_KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "windows": WINDOWS,
    "only-windows": {"sliding_window": 4},
    "qk-norm-nope": {"qk_norm": True, "no_rope_layers": [1, 0]},
    "multi-query-bias": {"num_key_value_heads": 1, "attention_bias": True},
}


def tiny_config(**overrides: Any) -> HfDecoderConfig:
    attention = overrides.pop("attn_implementation", "eager")
    config = HfDecoderConfig(**SHAPE | {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2} | overrides)
    config._attn_implementation = attention
    return config


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter, norms and biases included, a random value that changes the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        value = 1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.25 * noise
        parameter.data.copy_(value)
    return model


def tiny_model(cls: type = HfDecoderForCausalLM, seed: int = 0, **overrides: Any) -> Any:
    return randomise(cls(tiny_config(**overrides)), seed).eval()


def random_ids(*shape: int, seed: int = 0, low: int = 3, high: int = SHAPE["vocab_size"]) -> torch.Tensor:
    """Random ids without special tokens."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def padded(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and their mask: each row hides two tokens more than the one before."""
    ids, mask = random_ids(rows, length), torch.ones(rows, length, dtype=torch.long)
    for row in range(1, rows):
        mask[row, : 2 * row] = 0
    return ids, mask
