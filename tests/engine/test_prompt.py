"""Prefill without the modules gives their logits with any cache, and calls none of them."""

import pytest
import torch
from generating import VARIANTS, generated, through_modules, tiny_model, with_hook
from tiny_models import OUR_WAYS, padded, random_ids
from torch import nn
from transformers import DynamicCache

from hf_decoder.engine import precision
from hf_decoder.engine.decoding import generation
from hf_decoder.engine.decoding.step import DecodingStep
from hf_decoder.engine.route import Route
from hf_decoder.engine.switches import settings

ONE = {"max_new_tokens": 1}


def check(model, ids: torch.Tensor, layers: list[int], atol: float = 2e-5, **settings) -> None:
    layers.clear()
    tokens, logits = generated(model, ids, **ONE | settings)
    assert not layers
    expected, truth = through_modules(model, ids, **ONE | settings)
    assert layers
    assert tokens.equal(expected)
    torch.testing.assert_close(logits, truth, rtol=0, atol=atol)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_of_the_modules(variant: str, cache: str | None, layers):
    ids, mask = padded(3, 9)
    switch = {"cache_implementation": cache, "disable_compile": True} if cache else {}
    model = tiny_model(**VARIANTS[variant])
    check(model, ids[:1], layers, **switch)
    check(model, ids, layers, attention_mask=mask, **switch)


@pytest.mark.parametrize("variant", ["plain", "qk-norm", "partial-rotary", "gelu", "windows"])
def test_long_prompts_in_tiles_and_cpp(variant: str, layers):
    model = tiny_model(**{"max_position_embeddings": 512, **VARIANTS[variant]})
    with settings.override(ways=OUR_WAYS):
        check(model, random_ids(2, 300), layers, atol=1e-4)


@pytest.mark.parametrize(
    ("tokens", "settings"), [(1, {}), (9, {"prefill_chunk_size": 4})], ids=["one token", "in chunks"]
)
def test_other_lengths(tokens: int, settings: dict, layers):
    check(tiny_model(), random_ids(1, tokens), layers, **settings)


@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 3}, {"num_beams": 3}], ids=["candidates", "beams"])
def test_searches(settings: dict, layers):
    ids, fixed = random_ids(1, 9), {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model = tiny_model()
    tokens = model.generate(ids, **fixed, **settings)
    assert not layers
    assert tokens.equal(with_hook(model).generate(ids, **fixed, **settings)) and layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, {"prompt_lookup_num_tokens": 3}], ids=["greedy", "candidates"])
def test_under_autocast(settings: dict, dtype: torch.dtype, layers):
    """Bit-equal to the modules: no weights are packed or transposed."""
    ids, mask = padded(1 if settings else 3, 9)
    fixed = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    model = tiny_model(qk_norm=True).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        tokens = model.generate(ids, attention_mask=mask, **fixed, **settings)
        assert not layers
        assert tokens.equal(with_hook(model).generate(ids, attention_mask=mask, **fixed, **settings)) and layers


def test_without_a_cache():
    """Positions without a mask might mark documents, so only those with a mask bypass the modules."""
    model, ids = tiny_model(), random_ids(2, 9)
    tokens, logits = generated(model, ids, use_cache=False)
    expected, truth = through_modules(model, ids, use_cache=False)
    assert tokens.equal(expected)
    torch.testing.assert_close(logits, truth, rtol=0, atol=2e-5)


def test_a_cache_that_no_step_extends(layers):
    """Its single tokens bypass the modules too."""

    class Cache(DynamicCache):
        pass

    model, ids = tiny_model(), random_ids(2, 9)
    tokens, logits = generated(model, ids, past_key_values=Cache(config=model.config))
    assert not layers
    expected, truth = through_modules(model, ids)
    assert tokens.equal(expected)
    torch.testing.assert_close(logits, truth, rtol=0, atol=2e-5)


def test_a_text_that_goes_on(layers):
    """From a cache that holds a part of it."""
    model, ids = tiny_model(), random_ids(1, 12)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :7], past_key_values=cache, use_cache=True)
    layers.clear()
    _, logits = generated(model, ids, past_key_values=caches[0], **ONE)
    assert not layers
    _, truth = through_modules(model, ids, past_key_values=caches[1], **ONE)
    torch.testing.assert_close(logits, truth, rtol=0, atol=2e-5)
    assert caches[0].get_seq_length() == 12


@pytest.mark.parametrize("is_fast", [True, False], ids=["fast", "in fp32"])
@pytest.mark.parametrize("tokens", [5, 12])
def test_half_precision_is_no_further_from_the_truth_than_the_modules_are(
    tokens: int, is_fast: bool, layers, monkeypatch
):
    monkeypatch.setitem(precision.FAST_HALF_PRECISION, torch.bfloat16, is_fast)
    model, ids = tiny_model().bfloat16(), random_ids(3, tokens)
    exact = tiny_model()
    exact.load_state_dict(model.state_dict())
    truth = generated(exact, ids, **ONE)[1]
    logits = generated(model, ids, **ONE)[1].float()
    assert not layers
    slow = through_modules(model, ids, **ONE)[1].float()
    assert (logits - truth).abs().max() <= 1.5 * (slow - truth).abs().max()


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="weights are packed on AVX-512 alone")
def test_a_few_tokens_are_multiplied_with_packed_weights(monkeypatch):
    """Candidates, mostly. Packing normally starts after two steps; here at once."""
    monkeypatch.setitem(precision.FAST_HALF_PRECISION, torch.bfloat16, True)
    monkeypatch.setattr(generation, "STEPS_BEFORE_PACKING", 0)
    packed, pack = [], DecodingStep.packed
    monkeypatch.setattr(DecodingStep, "packed", lambda self: packed.append(1) or pack(self))
    exact = tiny_model(attention_bias=True, max_position_embeddings=128)
    model = tiny_model(attention_bias=True, max_position_embeddings=128).bfloat16()
    exact.load_state_dict(model.state_dict())
    for rows, tokens, expected in ((1, 9, 1), (2, 32, 1), (2, 33, 0), (1, 1, 0)):
        ids = random_ids(rows, tokens)
        packed.clear()
        logits = generated(model, ids, **ONE)[1].float()
        assert sum(packed) == expected
        truth, slow = generated(exact, ids, **ONE)[1], through_modules(model, ids, **ONE)[1].float()
        assert (logits - truth).abs().max() <= 1.5 * (slow - truth).abs().max()
    packed.clear()
    with settings.override(kernels=False):
        generated(model, random_ids(1, 9), cache_implementation="static", **ONE)
    assert not packed  # a graph of a single row follows, which reads weights as they are
    fixed = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    repeats = random_ids(1, 4).repeat(1, 5)
    tokens = model.generate(repeats, prompt_lookup_num_tokens=3, **fixed)
    assert packed == [1] and tokens.shape[1] == 44


@pytest.mark.parametrize("tokens", [5, 12])
def test_int8_weights(tokens: int, layers):
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_model()
    torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
    check(model, random_ids(2, tokens), layers, atol=1e-4)


@pytest.mark.parametrize("is_plain", [True, False])
def test_it_runs_below_autograd_where_weights_are_plain(is_plain: bool, monkeypatch):
    below, rotate = [], Route.attend

    class Quantized(torch.Tensor):
        pass

    def recorded(*inputs, **settings):
        key = torch._C.DispatchKey.AutogradFunctionality
        below.append(torch._C._dispatch_tls_is_dispatch_key_excluded(key))
        return rotate(*inputs, **settings)

    monkeypatch.setattr(Route, "attend", recorded)
    model = tiny_model()
    if not is_plain:
        down = model.model.layers[1].mlp.down_proj
        down.weight = nn.Parameter(down.weight.detach().as_subclass(Quantized), requires_grad=False)
    generated(model, random_ids(1, 5), **ONE)
    assert below == [is_plain] * 2  # once a layer


def test_a_token_out_of_range_is_named(layers):
    with pytest.raises(ValueError, match="the vocabulary ends at"):
        generated(tiny_model(), torch.full((1, 5), 10_000))


@pytest.mark.parametrize("what", ["hidden states", "embeddings"])
def test_what_needs_the_modules_has_them(what: str, layers):
    model, ids = tiny_model(), random_ids(1, 5)
    if what == "embeddings":
        model.generate(inputs_embeds=model.model.embed_tokens(ids), max_new_tokens=1, pad_token_id=0)
    else:
        generated(model, ids, **ONE, output_hidden_states=True)
    assert layers == [5, 5]
