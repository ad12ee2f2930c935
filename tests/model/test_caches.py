"""Every cache gives what one pass over the whole text gives."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_models import random_ids, tiny_config, tiny_model
from transformers import DynamicCache, LlamaForCausalLM, QuantizedCache, StaticCache
from transformers.cache_utils import Cache

from hf_decoder import HfDecoderForCausalLM
from hf_decoder.model.modeling_hf_decoder import CACHE_NAME

KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "mixed": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "qk_norm": True},
    "sliding": {"sliding_window": 4, "no_rope_layers": [0, 1]},
}
LENGTH = 90
CACHES: dict[str, Callable[[Any], Cache | None]] = {
    "own": lambda config: None,
    "dynamic": lambda config: DynamicCache(config=config),
    "dynamic-without-config": lambda config: DynamicCache(),
    "static": lambda config: StaticCache(config=config, max_cache_len=LENGTH),
    "static-roomy": lambda config: StaticCache(config=config, max_cache_len=2 * LENGTH),
}
# where the text is cut: one token at a time; a long prompt first (in tiles); pieces; all at once
CUTS: dict[str, list[int]] = {
    "steps": [1] * 20,
    "prompt-and-steps": [70, *[1] * 10],
    "pieces": [9, 1, 66, 3, 1],
    "long-pieces": [2, 80],
    "once": [85],
}


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_uncached(kind: str, cuts: str, cache: str, attention: str):
    model = tiny_model(attn_implementation=attention, **KINDS[kind])
    ids = random_ids(4, sum(CUTS[cuts]))
    expected = model(ids, use_cache=False).logits
    past, start, logits = CACHES[cache](model.config), 0, []
    for size in CUTS[cuts]:
        output = model(ids[:, start : start + size], past_key_values=past, use_cache=True)
        assert past is None or output.past_key_values is past
        past, start = output.past_key_values, start + size
        logits.append(output.logits)
        assert past.get_seq_length() == start
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_cached_equals_uncached_with_left_padding(kind: str, cache: str, attention: str):
    model = tiny_model(attn_implementation=attention, **KINDS[kind])
    ids = random_ids(3, 30)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    mask[1, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    past, logits, start = CACHES[cache](model.config), [], 0
    for size in (17, 1, 1, 8, 1, 1, 1):
        stop = start + size
        output = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=past,
            use_cache=True,
        )
        past, start = output.past_key_values, stop
        logits.append(output.logits)
    found = torch.cat(logits, 1)
    for row in range(3):
        real = mask[row].bool()
        alone = model(ids[row, real][None], use_cache=False).logits[0]
        torch.testing.assert_close(found[row, real], alone, rtol=0, atol=2e-5)


@torch.no_grad()
def test_the_cache_has_the_name_that_transformers_gives_it():
    stock = inspect.signature(LlamaForCausalLM.forward).parameters
    assert CACHE_NAME in stock
    assert CACHE_NAME == "past_key_values" or CACHE_NAME in inspect.signature(HfDecoderForCausalLM.forward).parameters
    model, ids = tiny_model(), random_ids(2, 9)
    expected = model(ids).logits[:, -1]
    for name in {CACHE_NAME, "past_key_values"}:
        given = DynamicCache(config=model.config)
        first = model(ids[:, :8], use_cache=True, **{name: given})
        assert first[CACHE_NAME] is given
        second = model(ids[:, 8:], use_cache=True, **{name: given})
        torch.testing.assert_close(second.logits[:, -1], expected, rtol=0, atol=2e-5)
        tokens = model.generate(ids, max_new_tokens=3, do_sample=False, **{name: DynamicCache(config=model.config)})
        assert torch.equal(tokens, model.generate(ids, max_new_tokens=3, do_sample=False, use_cache=False))
    if CACHE_NAME == "cache":
        with pytest.raises(ValueError, match="past_key_values"):
            model(ids, cache=DynamicCache(), past_key_values=DynamicCache())


@torch.no_grad()
def test_windowed_layers_hold_no_more_than_their_window():
    model = tiny_model(**KINDS["mixed"])
    past = model(random_ids(1, 40)).past_key_values
    past = model(random_ids(1, 1), past_key_values=past).past_key_values
    assert [layer.keys.shape[-2] for layer in past.layers] == [4, 41]  # the fifth token of the window is the query
    assert past.layers[1].keys.shape == (1, model.config.num_key_value_heads, 41, model.config.head_dim)


@torch.no_grad()
def test_a_cache_can_be_cut_back_and_reordered():
    model = tiny_model()
    ids = random_ids(2, 20)
    past = model(ids).past_key_values
    past.crop(-6)
    again = model(ids[:, 14:], past_key_values=past)
    torch.testing.assert_close(again.logits, model(ids).logits[:, 14:], rtol=0, atol=2e-5)
    past.batch_select_indices(torch.tensor([1, 1, 0]))
    new = random_ids(3, 1, seed=9)
    whole = torch.cat([ids[[1, 1, 0]], new], 1)
    found = model(new, past_key_values=past).logits
    torch.testing.assert_close(found[:, 0], model(whole).logits[:, -1], rtol=0, atol=2e-5)


@torch.no_grad()
def test_base_model_and_head_share_the_cache():
    model = tiny_model()
    ids = random_ids(1, 10)
    past = model.model(ids[:, :6]).past_key_values
    found = model(ids[:, 6:], past_key_values=past).logits
    torch.testing.assert_close(found, model(ids).logits[:, 6:], rtol=0, atol=2e-5)


@pytest.mark.slow  # quanto builds its kernels first
@torch.no_grad()
def test_quantized_cache():
    model = tiny_model(head_dim=64)
    past = QuantizedCache("quanto", config=model.config, nbits=4, residual_length=4)
    ids = random_ids(1, 12)
    logits = [model(ids[:, i : i + 1], past_key_values=past).logits for i in range(12)]
    expected = model(ids).logits
    error = (torch.cat(logits, 1) - expected).norm() / expected.norm()
    assert 0 < error < 0.3


@torch.no_grad()
@pytest.mark.skipif(not torch.cuda.is_available(), reason="transformers offloads caches with CUDA streams")
def test_offloaded_cache():
    model = tiny_model().to("cuda")
    ids = random_ids(1, 12).to("cuda")
    past: Cache = DynamicCache(config=tiny_config(), offloading=True)
    logits = [model(ids[:, i : i + 1], past_key_values=past).logits for i in range(12)]
    torch.testing.assert_close(torch.cat(logits, 1), model(ids).logits, rtol=0, atol=1e-4)
