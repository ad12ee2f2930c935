"""Random models of transformers' own classes, one a trait that a checkpoint can have."""

from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn

# No size equals another one, so that a mixed-up dimension cannot go unnoticed.
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "tie_word_embeddings": False,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 500.0, **parameters}}


def longrope(pairs: int, **parameters: Any) -> dict[str, Any]:
    short, long = [1.0 + 0.1 * i for i in range(pairs)], [2.0 + 0.5 * i for i in range(pairs)]
    return rope("longrope", short_factor=short, long_factor=long, original_max_position_embeddings=16, **parameters)


LLAMA3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED}

# name -> family, fields of its config
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-multi-query": ("Llama", {"num_key_value_heads": 1}),
    "llama-odd-ratio": ("Llama", {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3}),
    "llama-head-dim": ("Llama", {"head_dim": 22}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("Llama", rope("linear", factor=3.0)),
    "llama-dynamic": ("Llama", rope("dynamic", factor=2.0) | {"max_position_embeddings": 16}),
    "llama-yarn": ("Llama", YARN),
    "llama-llama3": ("Llama", LLAMA3),
    "llama-longrope": ("Llama", longrope(4)),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 10}),
    "mistral-window": ("Mistral", {"sliding_window": 6}),
    "qwen2": ("Qwen2", {}),
    "qwen2-windows": ("Qwen2", WINDOWS),
    "qwen2-max-window-layers": ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2-yarn": ("Qwen2", YARN),
    "qwen3": ("Qwen3", {"head_dim": 22}),
    "qwen3-tied-bias": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True, "attention_bias": True}),
    "qwen3-windows": ("Qwen3", {"head_dim": 8} | WINDOWS),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2, "tie_word_embeddings": True}),
    "smollm3-windows": ("SmolLM3", {"no_rope_layers": [0, 1, 1]} | WINDOWS),
    "phi3": ("Phi3", {}),
    "phi3-partial": ("Phi3", rope("default", partial_rotary_factor=0.5)),
    "phi3-longrope": (
        "Phi3",
        longrope(2, partial_rotary_factor=0.5) | {"original_max_position_embeddings": 16},
    ),
    "phi3-window": ("Phi3", {"sliding_window": 5}),
}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives every parameter, norms and biases included, a random value that the output feels."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(1 + 0.3 * noise if "norm" in name and name.endswith("weight") else 0.25 * noise)
    return model.eval()


def build(case: str, dtype: torch.dtype = torch.float32) -> Any:
    """The stock model of a case."""
    family, fields = CASES[case]
    config = getattr(transformers, f"{family}Config")(**{**SHAPE, **fields})
    config._attn_implementation = "eager"
    return randomise(getattr(transformers, f"{family}ForCausalLM")(config)).to(dtype)


def ids(*shape: int, vocab_size: int = 61, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's weights files."""
    tensors: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def assert_identical(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name
