"""The vLLM plugin. It registers our architecture, and uses vLLM's own class where that computes the same.

vLLM calls `register` in each of its processes by the entry point `vllm.general_plugins`, so `vllm serve FOLDER` runs a
saved folder. Nothing here imports vLLM before that call.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from hf_decoder.interop.families import to_stock
from hf_decoder.model.configuration_hf_decoder import HfDecoderConfig

ARCHITECTURE = "HfDecoderForCausalLM"
# vLLM's class for any transformers model that meets the conditions of `backends.py`.
TRANSFORMERS_BACKEND = "TransformersForCausalLM"
# Stock classes that vLLM has rewritten, and the RoPE types that these compute as transformers does.
NATIVE = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
NATIVE_ROPE_TYPES = ("default", "linear", "llama3")


def register() -> None:
    """Registers our architecture with vLLM, which may call this several times in a process."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # A name, not the class: importing vLLM's models here would start CUDA before vLLM forks.
        ModelRegistry.register_model(ARCHITECTURE, f"hf_decoder.interop.vllm_class:{ARCHITECTURE}")


def native_config(config: Any) -> PreTrainedConfig | None:
    """The stock config that vLLM's own class computes as `config` says, or None where vLLM must run our class.

    Our class runs what no stock class expresses, and what vLLM's classes are not known to compute like transformers:
    sliding windows, other activations and RoPE types, Qwen3 with a bias on `o_proj`.
    """
    if not isinstance(config, HfDecoderConfig):
        return None
    built: Any = config
    if "sliding_attention" in built.layer_types or built.hidden_act != "silu":
        return None
    if built.rope_parameters["rope_type"] not in NATIVE_ROPE_TYPES or (built.qk_norm and built.attention_bias):
        return None
    try:
        family, stock = to_stock(built)
    except ValueError:
        return None
    return stock if family.model_class in NATIVE else None
