"""A tiny model's text by `generate()`, and by its modules alone."""

import copy

import torch
from tiny_models import tiny_model as eager_model

NEW_TOKENS = 10
VARIANTS = {
    "plain": {},
    "qk-norm": {"qk_norm": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "multi-query": {"num_key_value_heads": 1},
    "multi-head": {"num_key_value_heads": 4, "num_attention_heads": 4},
    "untied": {"tie_word_embeddings": False},
    "nope": {"no_rope_layers": [1, 0]},
    "partial-rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "dynamic-rope": {
        "max_position_embeddings": 16,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    },
    "softcap": {"final_logit_softcapping": 2.0},
    "gelu": {"hidden_act": "gelu"},
    "windows": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "short-windows": {"sliding_window": 4},
}


def tiny_model(**overrides):
    return eager_model(attn_implementation="sdpa", **overrides)


def generated(model, ids: torch.Tensor, **settings):
    """Tokens and the logits of each."""
    fixed = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.generate(ids, return_dict_in_generate=True, output_logits=True, **fixed | settings)
    return out.sequences, torch.stack(out.logits, 1)


def with_hook(model):
    """A copy with a hook that does nothing, so that its modules are called."""
    slow = copy.deepcopy(model)
    slow.model.norm.register_forward_hook(lambda module, inputs, output: None)
    return slow


def through_modules(model, ids: torch.Tensor, **settings):
    """The same as `generated`, by the modules."""
    return generated(with_hook(model), ids, **settings)
