"""Shared by the tests of decode steps: kinds of kernels, models, and the comparison with the modules."""

import copy
from typing import Any, NamedTuple

import pytest
import torch
from tiny_models import random_ids
from tiny_models import tiny_model as eager_model
from transformers import StaticCache

from hf_decoder.engine.decoding.cpp_step import CppStep, is_for_cpp
from hf_decoder.engine.decoding.cuda_graph_step import CudaGraphStep, is_capturable
from hf_decoder.engine.decoding.step import DecodingStep

try:
    from hf_decoder.engine.triton import attention as triton_attention
except ImportError:  # which this system has not
    triton_attention = None  # type: ignore[assignment]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CUDA = torch.cuda.is_available()


class Kind(NamedTuple):
    """Of kernels."""

    step: Any
    covers: Any
    device: str
    half: torch.dtype


TRITON = Kind(CudaGraphStep, is_capturable, "cuda", torch.bfloat16)
if not CUDA:  # the interpreter multiplies matrices of bf16 wrongly
    TRITON = TRITON._replace(device="cpu", half=torch.float16)
NATIVE = Kind(CppStep, is_for_cpp, "cpu", torch.bfloat16)
TRITON_PARAM = pytest.param(
    TRITON, id="triton", marks=pytest.mark.skipif(triton_attention is None, reason="triton is not installed")
)
KINDS = [TRITON_PARAM, pytest.param(NATIVE, id="c++")]
VARIANTS = {
    "plain": {},
    "qk-norm": {"qk_norm": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "multi-query": {"num_key_value_heads": 1},
    "multi-head": {"num_key_value_heads": 4},
    "untied": {"tie_word_embeddings": False},
    "nope": {"no_rope_layers": [1, 0]},
    "partial-rotary": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    "yarn": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
    "softcap": {"final_logit_softcapping": 2.0},
    "wide-heads": {"head_dim": 128, "qk_norm": True},
}


def tiny_model(kind: Kind, dtype: torch.dtype = torch.float32, **overrides):
    return eager_model(attn_implementation="sdpa", **overrides).to(kind.device, dtype)


def padded_ids(kind: Kind, length: int, hidden: int, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and their mask; each row hides one token less than the row before."""
    ids = random_ids(rows, length).to(kind.device)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : max(hidden - row, 0)] = 0
    return ids, mask


@torch.no_grad()
def check_steps(kind: Kind, model, length: int, hidden: int, steps: int = 2, rows: int = 1) -> None:
    """Checks logits and cache of steps after a prompt whose first tokens are hidden."""
    static_step = kind.step(DecodingStep(model), rows)
    ids, mask = padded_ids(kind, length, hidden, rows)
    ours = StaticCache(config=model.config, max_cache_len=length + steps)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model(ids, past_key_values=ours, use_cache=True, attention_mask=mask, position_ids=positions)
    theirs = copy.deepcopy(ours)
    for step in range(steps):
        token = random_ids(rows, 1, seed=step + 1).to(kind.device)
        mask = torch.cat((mask, mask.new_ones(rows, 1)), 1)
        positions = mask.sum(-1, keepdim=True) - 1
        expected = model(
            token, past_key_values=theirs, use_cache=True, attention_mask=mask, position_ids=positions
        ).logits
        assert static_step.begin(ours, mask, positions)
        found = static_step.logits(token)
        tolerance = TOLERANCE[model.dtype]
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())
    for our_layer, their_layer in zip(ours.layers, theirs.layers, strict=True):
        for name in ("keys", "values"):
            expected = getattr(their_layer, name)
            torch.testing.assert_close(
                getattr(our_layer, name), expected, rtol=0, atol=tolerance * expected.abs().max().item()
            )
        assert int(our_layer.cumulative_length) == int(their_layer.cumulative_length) == length + steps


def static(model, ids, mask=None, **settings):
    fixed = {"cache_implementation": "static", "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **(fixed | settings))


def dynamic(model, ids, mask=None, **settings):
    """Text by transformers' loop."""
    out = static(model, ids, mask, cache_implementation=None, **{"return_dict_in_generate": True, **settings})
    return out if "return_dict_in_generate" in settings else out.sequences
