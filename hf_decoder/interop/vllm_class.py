"""The class that vLLM loads for our architecture. Importing this needs vLLM; `vllm_plugin.py` names it there."""

from __future__ import annotations

from typing import Any

from torch import nn
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.utils import init_vllm_registered_model

from hf_decoder.interop.vllm_plugin import TRANSFORMERS_BACKEND, native_config


class HfDecoderForCausalLM(LlamaForCausalLM):
    """Becomes, when vLLM makes one, the class of vLLM that computes the same as the checkpoint's config.

    vLLM asks the class what it can do (LoRA, pipelines, generation) before it makes one; Llama's answers, which are
    those of all candidates, are inherited.
    """

    def __new__(cls, *, vllm_config: Any, prefix: str = "") -> nn.Module:  # type: ignore[misc]
        config = vllm_config.model_config.hf_config
        stock = native_config(config)
        architectures = [TRANSFORMERS_BACKEND] if stock is None else stock.architectures
        return init_vllm_registered_model(
            vllm_config, prefix=prefix, hf_config=config if stock is None else stock, architectures=architectures
        )
