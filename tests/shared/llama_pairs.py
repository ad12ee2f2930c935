"""Small models of ours, and transformers' Llama with the same weights."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM

SHAPE: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}


def new_model(cls: type = HfDecoderForCausalLM, seed: int = 0, **overrides: Any) -> Any:
    torch.manual_seed(seed)
    return cls(HfDecoderConfig(**SHAPE | overrides))


def stock_model(model: Any) -> LlamaForCausalLM:
    """Llama with the weights of a model that uses only what Llama has."""
    names = (*SHAPE, "head_dim", "tie_word_embeddings", "attention_dropout")
    config = LlamaConfig(**{name: getattr(model.config, name) for name in names})
    config._attn_implementation = model.config._attn_implementation
    stock = LlamaForCausalLM(config).train(model.training)
    stock.load_state_dict(model.state_dict())
    return stock
