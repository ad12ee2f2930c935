"""The class that vLLM loads for our architecture. `vllm_plugin.py` registers its name; importing it needs vLLM."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import init_vllm_registered_model

from hf_decoder.interop.vllm_plugin import TRANSFORMERS_BACKEND, native_config


class HfDecoderForCausalLM(LlamaForCausalLM):
    """Creates an instance of the vLLM class that computes the same as the checkpoint's config.

    vLLM first asks the class what it supports (LoRA, pipelines, generation). It inherits Llama's answers, which hold
    for all candidates.
    """

    def __new__(cls, *, vllm_config: Any, prefix: str = "") -> nn.Module:  # type: ignore[misc]
        config = vllm_config.model_config.hf_config
        stock = native_config(config)
        architectures = [TRANSFORMERS_BACKEND] if stock is None else stock.architectures
        return init_vllm_registered_model(
            vllm_config, prefix=prefix, hf_config=config if stock is None else stock, architectures=architectures
        )
