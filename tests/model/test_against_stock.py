"""Logits, gradients and cached steps equal those of transformers' own class of each family, on the same weights."""

import copy
from typing import Any

import pytest
import torch
from tiny_models import SHAPE, random_ids, randomise, tiny_config
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from hf_decoder import HfDecoderForCausalLM

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}
SPECIALS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
LLAMA = (LlamaConfig, LlamaForCausalLM)
QWEN2 = (Qwen2Config, Qwen2ForCausalLM)
QWEN3 = (Qwen3Config, Qwen3ForCausalLM)
MISTRAL = (MistralConfig, MistralForCausalLM)
SMOLLM3 = (SmolLM3Config, SmolLM3ForCausalLM)
PHI3 = (Phi3Config, Phi3ForCausalLM)
MIXED = ["sliding_attention", "full_attention"]


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 500.0, **parameters}}


def longrope(pairs: int, **parameters: Any) -> dict[str, Any]:
    short = [1.0 + 0.1 * i for i in range(pairs)]
    long = [2.0 + 0.5 * i for i in range(pairs)]
    return rope("longrope", short_factor=short, long_factor=long, original_max_position_embeddings=16, **parameters)


# name -> stock classes, fields of both configs, fields of the stock config alone, fields of ours alone
FAMILIES: dict[str, tuple[tuple[type, type], dict, dict, dict]] = {
    "llama": (LLAMA, {}, {}, {}),
    "llama-untied": (LLAMA, {"tie_word_embeddings": False}, {}, {}),
    "llama-tied": (LLAMA, {"tie_word_embeddings": True}, {}, {}),
    "llama-theta": (LLAMA, rope("default"), {}, {}),
    "llama-linear": (LLAMA, rope("linear", factor=3.0), {}, {}),
    "llama-dynamic": (LLAMA, rope("dynamic", factor=2.0) | {"max_position_embeddings": 16}, {}, {}),
    "llama-yarn": (LLAMA, rope("yarn", factor=4.0, original_max_position_embeddings=16), {}, {}),
    "llama-yarn-all-options": (
        LLAMA,
        rope("yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=16.0, beta_slow=2.0, truncate=False),
        {},
        {},
    ),
    "llama-yarn-attention-factor": (
        LLAMA,
        rope("yarn", factor=4.0, original_max_position_embeddings=16, attention_factor=0.7),
        {},
        {},
    ),
    "llama-longrope": (LLAMA, longrope(6), {}, {}),
    "llama-longrope-factor": (LLAMA, longrope(6, factor=5.0), {}, {}),
    "llama-llama3": (
        LLAMA,
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32),
        {},
        {},
    ),
    "llama-attention-bias": (LLAMA, {"attention_bias": True}, {}, {}),
    "llama-mlp-bias": (LLAMA, {"mlp_bias": True}, {}, {}),
    "llama-head-dim": (LLAMA, {"head_dim": 22}, {}, {}),
    "llama-no-head-dim": (LLAMA, {"head_dim": None}, {}, {}),
    "llama-multi-query": (LLAMA, {"num_key_value_heads": 1}, {}, {}),
    "llama-multi-head": (LLAMA, {"num_key_value_heads": None}, {}, {}),
    "llama-three-groups": (
        LLAMA,
        {"hidden_size": 36, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 6},
        {},
        {},
    ),
    "llama-eps": (LLAMA, {"rms_norm_eps": 0.03}, {}, {}),
    "llama-gelu": (LLAMA, {"hidden_act": "gelu_pytorch_tanh"}, {}, {}),
    "qwen3": (QWEN3, {}, {}, {"qk_norm": True}),
    "qwen3-attention-bias": (QWEN3, {"attention_bias": True}, {}, {"qk_norm": True}),
    "qwen3-mixed-windows": (
        QWEN3,
        {"sliding_window": 5, "layer_types": MIXED},
        {"use_sliding_window": True},
        {"qk_norm": True},
    ),
    "qwen2": (QWEN2, {}, {}, {"attention_bias": "qkv"}),
    "qwen2-mixed-windows": (
        QWEN2,
        {"sliding_window": 5, "layer_types": MIXED[::-1]},
        {"use_sliding_window": True},
        {"attention_bias": "qkv"},
    ),
    "mistral": (MISTRAL, {"sliding_window": 6}, {}, {}),
    "mistral-window-2": (MISTRAL, {"sliding_window": 2}, {}, {}),
    "mistral-no-window": (MISTRAL, {"sliding_window": None}, {}, {}),
    "smollm3": (SMOLLM3, {"no_rope_layers": [1, 0]}, {}, {}),
    "smollm3-windows": (
        SMOLLM3,
        {"no_rope_layers": [0, 1], "sliding_window": 5, "layer_types": MIXED},
        {"use_sliding_window": True},
        {},
    ),
    "phi3": (PHI3, {}, {}, {}),
    "phi3-partial": (PHI3, {**rope("default", partial_rotary_factor=0.5)}, {}, {}),
    "phi3-longrope": (
        PHI3,
        {**longrope(2, partial_rotary_factor=0.5)},
        {"original_max_position_embeddings": 16},
        {},
    ),
    "phi3-window": (PHI3, {"sliding_window": 5}, {}, {}),
}


def unfuse(state: dict[str, torch.Tensor], config: Any) -> dict[str, torch.Tensor]:
    """Phi-3 holds query, key and value in one matrix, and gate and up in another."""
    head_dim = config.hidden_size // config.num_attention_heads
    rows = [config.num_attention_heads * head_dim] + [config.num_key_value_heads * head_dim] * 2
    split = {}
    for name, tensor in state.items():
        if "qkv_proj" in name:
            for kind, part in zip("qkv", tensor.split(rows), strict=True):
                split[name.replace("qkv_proj", f"{kind}_proj")] = part
        elif "gate_up_proj" in name:
            for kind, part in zip(("gate", "up"), tensor.chunk(2), strict=True):
                split[name.replace("gate_up_proj", f"{kind}_proj")] = part
        else:
            split[name] = tensor
    return split


def pair(family: str, attention: str = "eager") -> tuple[Any, HfDecoderForCausalLM]:
    """The stock model and ours with its weights."""
    (config_class, model_class), both, theirs, own = FAMILIES[family]
    shape = {"tie_word_embeddings": False, "rms_norm_eps": 1e-5} | SHAPE | SPECIALS | rope("default") | both
    if model_class is Phi3ForCausalLM:
        del shape["head_dim"]  # always hidden_size / num_attention_heads there
    stock_config = config_class(**shape | theirs)
    stock_config._attn_implementation = attention
    stock = randomise(model_class(stock_config)).eval()
    ours = HfDecoderForCausalLM(tiny_config(**{"head_dim": None} | shape | own, attn_implementation=attention)).eval()
    state = stock.state_dict()
    ours.load_state_dict(unfuse(state, stock_config) if family.startswith("phi3") else state)
    return stock, ours


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_the_stock_class(family: str, attention: str):
    stock, ours = pair(family, attention)
    ids = random_ids(2, 24)
    # past the original context first, then within it, then past it again: dynamic RoPE has to grow and to shrink
    for length in (24, 9, 20):
        theirs = stock(ids[:, :length]).logits
        torch.testing.assert_close(ours(ids[:, :length]).logits, theirs, **TOLERANCE)
        assert theirs.std() > 0.1  # the comparison would say nothing about vanishing logits

    padding = torch.ones(2, 13, dtype=torch.long)
    padding[0, :4] = 0
    positions = (padding.cumsum(-1) - 1).clamp(min=0)
    theirs = stock(ids[:, :13], attention_mask=padding, position_ids=positions).logits
    logits = ours(ids[:, :13], attention_mask=padding, position_ids=positions).logits
    torch.testing.assert_close(logits[padding.bool()], theirs[padding.bool()], **TOLERANCE)


def in_steps(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits of nine tokens, three more, and then one by one."""
    logits, cache = [], None
    for start, stop in ((0, 9), (9, 12), *((i, i + 1) for i in range(12, ids.shape[1]))):
        output = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_steps_equal_the_stock_class(family: str, attention: str):
    """Runs the modules, because autograd is on."""
    stock, ours = pair(family, attention)
    ids = random_ids(2, 22)
    torch.testing.assert_close(in_steps(ours, ids), in_steps(stock, ids), **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_past_the_modules_are_as_near_to_the_truth_as_the_stock_class(family: str, rows: int):
    """Decode steps sum in another order; prefill has the same bits as the modules."""
    stock, ours = pair(family, "sdpa")
    ids = random_ids(rows, 22)
    truth = in_steps(copy.deepcopy(stock).double(), ids)
    theirs, logits = (in_steps(model, ids).double() - truth for model in (stock, ours))
    assert logits.abs().mean() <= 1.25 * theirs.abs().mean()
    torch.testing.assert_close(logits, theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["llama-tied", "llama-untied", "qwen3-attention-bias", "qwen2", "smollm3-windows"])
def test_gradients_equal_the_stock_class(family: str):
    stock, ours = pair(family)
    ids = random_ids(2, 11)
    for model in (stock, ours):
        model(ids, labels=ids).loss.backward()  # eval mode: the loss comes from the logits
    theirs = {name: parameter.grad for name, parameter in stock.named_parameters()}
    assert theirs.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert theirs[name].abs().max() > 1e-6, name
        torch.testing.assert_close(
            parameter.grad, theirs[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@torch.no_grad()
def test_softcapped_logits_follow_gemma_2():
    ours = HfDecoderForCausalLM(tiny_config(final_logit_softcapping=3.0)).eval()
    plain = HfDecoderForCausalLM(tiny_config()).eval()
    randomise(plain)
    ours.load_state_dict(plain.state_dict())
    ids = random_ids(2, 9)
    raw = plain(ids).logits
    # modeling_gemma2: logits / cap, tanh, * cap
    torch.testing.assert_close(ours(ids).logits, torch.tanh(raw / 3.0) * 3.0, **TOLERANCE)
    assert raw.abs().max() > 3.0


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3-mixed-windows", "smollm3-windows", "phi3-partial"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_greedy_generation_equals_the_stock_class(family: str, options: dict):
    stock, ours = pair(family, "sdpa")
    ids = random_ids(2, 9)
    options = {"max_new_tokens": 12, "do_sample": False, **options}
    theirs = stock.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert torch.equal(ours.generate(ids, attention_mask=torch.ones_like(ids), **options), theirs)


@torch.no_grad()
@pytest.mark.parametrize("prompt", [9, 16, 20])
def test_longrope_past_its_switch_gives_the_stock_class_s_text(prompt: int):
    """Past 16 tokens the keys in a cache have other frequencies. Not every version of transformers drops it there."""
    stock, ours = pair("phi3-longrope", "sdpa")
    for seed in range(4):
        ids = random_ids(1, prompt, seed=seed)
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}
        mask = torch.ones_like(ids)
        theirs = stock.generate(ids, attention_mask=mask, use_cache=False, **options)
        assert torch.equal(ours.generate(ids, attention_mask=mask, **options), theirs)
