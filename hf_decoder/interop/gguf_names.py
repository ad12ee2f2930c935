"""Maps architectures, tensor names and pre-tokenizers between GGUF and our model, in both directions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from hf_decoder.data.tokenization import LLAMA_CPP_PRE_TOKENIZER, QWEN2_SPLIT
from hf_decoder.interop.families import BuiltConfig


@dataclass(frozen=True)
class Architecture:
    """A graph of llama.cpp, to be read, and to be written with one of these biases.

    `permuted` says that it rotates neighbouring dimensions where we rotate halves, `fused` that it stacks matrices.
    """

    qk_norm: bool
    attention_biases: tuple[bool | str, ...]
    permuted: bool = False
    fused: bool = False


ARCHITECTURES = {
    "llama": Architecture(qk_norm=False, attention_biases=(False, True), permuted=True),
    "qwen2": Architecture(qk_norm=False, attention_biases=("qkv",)),
    "qwen3": Architecture(qk_norm=True, attention_biases=(False,)),
    "phi3": Architecture(qk_norm=False, attention_biases=(), fused=True),
}
# Fields that all graphs fix.
FIXED: dict[str, Any] = {"hidden_act": "silu", "mlp_bias": False, "final_logit_softcapping": None}
# RoPE types -> the parameters besides theta that the file holds.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "yarn": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
# The file holds llama3's frequencies as factors in a tensor, and their parameters under a key of ours.
# Meta's models have these, and a factor that is the largest in the tensor.
ROPE_FREQUENCIES = "rope_freqs.weight"
META_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LONG_FACTORS = {"short_factor": "rope_factors_short.weight", "long_factor": "rope_factors_long.weight"}
ROPE_KEY = "hf_decoder.rope_parameters"

MODULES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LAYER_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# What a graph that stacks them has in the place of several of ours.
FUSED = {
    "attn_qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "ffn_up": ("mlp.gate_proj", "mlp.up_proj"),
}

LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_OWN_SPLIT = LLAMA3_SPLIT.replace("{1,3}", "")
# llama.cpp's names of byte-level pre-tokenizers -> the expressions that split text in that way. A tokenizer is rebuilt
# with the first.
SPLITS = {LLAMA_CPP_PRE_TOKENIZER: (QWEN2_SPLIT, QWEN2_OWN_SPLIT), "llama-bpe": (LLAMA3_SPLIT,)}
GPT2, SMOLLM = "gpt-2", "smollm"  # ByteLevel's own expression, alone and after single digits

# Token types of GGUF.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def to_gguf(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    module, _, kind = name.rpartition(".")
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    if match is None:
        return f"{MODULES[module]}.{kind}"
    return f"blk.{match[1]}.{LAYER_MODULES[match[2]]}.{kind}"


def to_ours(name: str) -> str | None:
    """`blk.3.ffn_up.weight` -> `model.layers.3.mlp.up_proj.weight`; None for a name without a counterpart."""
    module, _, kind = name.rpartition(".")
    match = re.fullmatch(r"blk\.(\d+)\.(.+)", module)
    prefix, table, leaf = (
        ("", MODULES, module) if match is None else (f"model.layers.{match[1]}.", LAYER_MODULES, match[2])
    )
    ours = {theirs: own for own, theirs in table.items()}.get(leaf)
    return None if ours is None else f"{prefix}{ours}.{kind}"


def fused_parts(name: str, config: BuiltConfig) -> dict[str, int]:
    """Our names whose rows a tensor of a graph that stacks them holds, with the number of each; none of any other."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(\w+)", name)
    if match is None or match[2] not in FUSED:
        return {}
    heads, groups = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    rows = (heads, groups, groups) if match[2] == "attn_qkv" else (config.intermediate_size,) * 2
    ours = (f"model.layers.{match[1]}.{part}.{match[3]}" for part in FUSED[match[2]])
    return dict(zip(ours, rows, strict=True))


def permuted_heads(name: str, config: BuiltConfig) -> int | None:
    """The number of heads in the rows of a query or key projection; None for any other tensor."""
    if ".q_proj." in name:
        return config.num_attention_heads
    return config.num_key_value_heads if ".k_proj." in name else None


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorders each head from (a0 .. an, b0 .. bn) to (a0, b0, .. an, bn), so that RoPE rotates neighbours."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def separate(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `interleave`."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)
