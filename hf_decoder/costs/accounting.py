"""Computes what a model costs: parameters, FLOPs, KV cache, memory, and model FLOPs utilisation (MFU).

Symbols: N parameters, L layers, H query heads, K key/value heads, Q head width, T tokens of context, V vocabulary.
"""

from __future__ import annotations

import platform
import sys
from typing import TYPE_CHECKING, Any

from hf_decoder.costs.devices import cpu_count, cpu_name
from hf_decoder.costs.presets import Shape

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PretrainedConfig

    Config = PretrainedConfig | Shape

BF16_BYTES = 2


def meta_model(config: PretrainedConfig) -> nn.Module:
    """The causal language model of `config` on the meta device: shapes without memory."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def num_parameters(config: Config) -> int:
    """Parameters of the causal language model of `config`; tied embeddings count once."""
    if isinstance(config, Shape):
        return config.num_parameters
    return sum(parameter.numel() for parameter in meta_model(config).parameters())


def matmul_parameters(config: Config) -> int:
    """Weights of linear layers, the LM head included: every token is multiplied by them.

    Embeddings are looked up, so they count only if they are tied and serve as the head.
    """
    if isinstance(config, Shape):
        return config.matmul_parameters
    from torch import nn

    return sum(m.weight.numel() for m in meta_model(config).modules() if isinstance(m, nn.Linear))


def head_dim(config: Config) -> int:
    """Width of an attention head (Q)."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def flops_per_token(config: Config, context_length: int, *, training: bool = True) -> int:
    """Floating-point operations for one token of a sequence of `context_length` tokens.

    6 N + 12 L H Q T for training, a third of it for the forward pass alone (PaLM, arXiv 2204.02311, appendix B). N is
    `matmul_parameters`. A multiply-add counts as two. By convention the causal half of attention that need not be
    computed counts, and recomputation does not. Layers with a sliding window attend to at most that window.
    """
    width = config.num_attention_heads * head_dim(config)
    attention = sum(12 * width * span for span in _attention_spans(config, context_length))
    total = 6 * matmul_parameters(config) + attention
    return total if training else total // 3


def _attention_spans(config: Config, context_length: int) -> list[int]:
    """The most tokens that each layer attends to."""
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [
        min(window, context_length) if window and kind == "sliding_attention" else context_length for kind in kinds
    ]


def kv_bytes_per_token(config: Config, dtype: torch.dtype | None = None) -> int:
    """Bytes that one more token adds to the KV cache: 2 L K Q times the size of `dtype`, bf16 by default.

    A layer with a sliding window stops growing at its window; `kv_cache_bytes` takes that into account.
    """
    return config.num_hidden_layers * _kv_bytes_per_token_and_layer(config, dtype)


def kv_cache_bytes(config: Config, context_length: int, dtype: torch.dtype | None = None) -> int:
    """Bytes of the KV cache of one sequence of `context_length` tokens."""
    return sum(_attention_spans(config, context_length)) * _kv_bytes_per_token_and_layer(config, dtype)


def _kv_bytes_per_token_and_layer(config: Config, dtype: torch.dtype | None) -> int:
    return 2 * config.num_key_value_heads * head_dim(config) * _bytes(dtype)


def _bytes(dtype: torch.dtype | None) -> int:
    """Bytes of one number, bf16 by default."""
    return BF16_BYTES if dtype is None else dtype.itemsize


def serving_bytes(config: Config, context_length: int, dtype: torch.dtype | None = None) -> int:
    """Bytes of the weights and of the KV cache of one sequence; run-time buffers come on top."""
    return num_parameters(config) * _bytes(dtype) + kv_cache_bytes(config, context_length, dtype)


def activation_bytes(config: Config, tokens: int, *, shards: int = 1, checkpointing: bool = False) -> int:
    """Estimates the activations that `tokens` tokens keep for the backward pass under bf16 autocast, without the head.

    Per token and layer, in 2 bytes: inputs and outputs of the norms (four times the width), queries, keys, values and
    attention output, and three times the MLP's width; in 4 bytes, the residuals. This follows Korthikanti et al. 2022
    (arXiv 2205.05198, section 4.1) for attention that keeps no scores. `shards` devices of tensor parallelism divide
    the projections and the MLP. With checkpointing, a layer keeps only its input, and one layer at a time has all of
    it. Uncompiled training with our kernels keeps only twice the MLP's width: it recomputes the product of the gate.
    """
    width = config.hidden_size
    heads = head_dim(config) * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    shared = 2 * (heads + 3 * config.intermediate_size) // shards
    layer = tokens * (2 * 4 * width + shared + 4 * 2 * width)
    if checkpointing:
        return layer + tokens * config.num_hidden_layers * 4 * width
    return layer * config.num_hidden_layers


def training_bytes(config: Config, batch_size: int, block_size: int) -> int:
    """Estimates the peak bytes of mixed-precision AdamW training with `batch_size` x `block_size` tokens.

    16 bytes per parameter (fp32 weight, gradient and two moments; ZeRO, arXiv 1910.02054, section 3.1) plus
    `activation_bytes`. A loss that holds all logits needs more.
    """
    return 16 * num_parameters(config) + activation_bytes(config, batch_size * block_size)


def mfu(tokens_per_second: float, flops_per_token: float, peak_flops_per_second: float) -> float:
    """Model FLOPs utilisation (PaLM, appendix B): the model's FLOP/s as a share of the hardware's peak.

    Raises:
        ValueError: if the peak is not positive.
    """
    if peak_flops_per_second <= 0:
        raise ValueError(f"the hardware's peak must be positive, got {peak_flops_per_second} FLOP/s")
    return tokens_per_second * flops_per_token / peak_flops_per_second


def peak_memory_bytes() -> int | None:
    """The peak resident memory of this process so far, or None if the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def hardware() -> dict[str, Any]:
    """The machine and the versions, to write beside a measurement."""
    import torch
    import transformers

    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        device = f"{count} x {torch.cuda.get_device_name(0)}"
    else:
        device = f"{cpu_name()}, {cpu_count()} cores"
    return {
        "device": device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
