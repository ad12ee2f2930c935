"""The vLLM plugin. It registers our architecture, and uses vLLM's own class where that computes the same.

vLLM finds `register` by the entry point `vllm.general_plugins` in every process that it starts, so a saved folder runs
with `vllm serve FOLDER` and nothing else. Nothing here imports vLLM until vLLM calls it.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from hf_decoder.interop.families import to_stock
from hf_decoder.model.configuration_hf_decoder import HfDecoderConfig

ARCHITECTURE = "HfDecoderForCausalLM"
# vLLM's general way for every class of transformers that keeps the conditions of `backends.py`.
TRANSFORMERS_BACKEND = "TransformersForCausalLM"
# Stock classes that vLLM has written anew, with the RoPE types that these compute as transformers does.
NATIVE = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
NATIVE_ROPE_TYPES = ("default", "linear", "llama3")


def register() -> None:
    """Enters our architecture into vLLM's table of models; vLLM calls this, more than once in some processes."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        # a name and not the class: importing vLLM's models here would initialise CUDA before vLLM forks
        ModelRegistry.register_model(ARCHITECTURE, f"hf_decoder.interop.vllm_class:{ARCHITECTURE}")


def native_config(config: Any) -> PreTrainedConfig | None:
    """The stock config that vLLM computes by itself as `config` does, or `None` where it must run our own class.

    Left to our class: whatever no stock class expresses, and what vLLM's rewritten classes are not known to compute as
    transformers does (sliding windows, other activations and RoPE types, Qwen3 with a bias on `o_proj`).
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
