"""Greedy text without transformers' loop equals that of the loop; hooks and replaced methods keep the loop."""

import pytest
import torch
from generating import with_hook
from tiny_models import padded, random_ids, tiny_model
from transformers import StaticCache
from transformers.generation import LogitsProcessorList, MaxTimeCriteria, StoppingCriteriaList, stopping_criteria

from hf_decoder import HfDecoderForCausalLM
from hf_decoder.engine.decoding.generation import Decoding
from hf_decoder.engine.decoding.step import DecodingStep

NEW_TOKENS = 10
GREEDY = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def model():
    return tiny_model(attn_implementation="sdpa", qk_norm=True)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The number of new tokens of each call of the model: transformers' loop makes one for every token."""
    lengths = []
    of_call = Decoding.of_call.__func__

    def counted(cls, model, input_ids, *inputs):
        lengths.append(input_ids.shape[1])
        return of_call(cls, model, input_ids, *inputs)

    monkeypatch.setattr(Decoding, "of_call", classmethod(counted))
    return lengths


def by_the_loop(model, ids: torch.Tensor, **settings) -> torch.Tensor:
    """The same by transformers' loop and the modules."""
    return with_hook(model).generate(ids, **GREEDY | settings)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("rows", [1, 3])
def test_texts_end_where_the_loop_ends_them(rows, cache, model, calls):
    ids, mask = padded(rows, 7)
    switch = {"cache_implementation": cache, "disable_compile": True} if cache else {}
    whole = by_the_loop(model, ids, attention_mask=mask)
    assert calls == [7] + [1] * (NEW_TOKENS - 1)
    calls.clear()
    assert model.generate(ids, attention_mask=mask, **GREEDY, **switch).equal(whole)
    assert calls == [7]
    for place in (7, 8, 11, 16):
        for ends in (int(whole[0, place]), whole[:, place].tolist(), whole[:, [7, place]].flatten().tolist()):
            settings = {"attention_mask": mask, "eos_token_id": ends, "pad_token_id": 2}
            expected = by_the_loop(model, ids, **settings)
            calls.clear()
            text = model.generate(ids, **GREEDY | settings, **switch)
            assert text.equal(expected) and text.is_contiguous() and calls == [7]


def test_a_text_goes_on_from_a_cache(model, calls):
    ids, mask = padded(2, 7)
    whole = by_the_loop(model, ids, attention_mask=mask)
    cache = StaticCache(config=model.config, max_cache_len=40)
    settings = {"past_key_values": cache, "disable_compile": True}
    half = model.generate(ids, attention_mask=mask, **GREEDY | {"max_new_tokens": 4}, **settings)
    mask = torch.cat((mask, mask.new_ones(2, 4)), 1)
    calls.clear()
    assert model.generate(half, attention_mask=mask, **GREEDY | {"max_new_tokens": 6}, **settings).equal(whole)
    assert calls == [1]


def hook(model):
    seen = []
    model.register_forward_hook(lambda *inputs: seen.append(1))
    return seen


def replacing(name: str):
    def replace(model):
        seen, method = [], getattr(model, name)
        setattr(model, name, lambda *args, **kwargs: seen.append(1) or method(*args, **kwargs))
        return seen

    return pytest.param(replace, id=name)


METHODS = ["forward", "prepare_inputs_for_generation", "_update_model_kwargs_for_generation"]


def subclass(model):
    seen = []

    class Watched(HfDecoderForCausalLM):
        def forward(self, *args, **kwargs):
            seen.append(1)
            return super().forward(*args, **kwargs)

    Watched.__module__ = "someone.elses"
    model.__class__ = Watched
    return seen


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("change", [hook, *map(replacing, METHODS), subclass])
def test_what_others_hang_on_the_loop_is_called_for_every_token(change, cache, model):
    ids = random_ids(1, 7)
    expected = by_the_loop(model, ids)
    seen = change(model)
    assert model.generate(ids, **GREEDY, cache_implementation=cache).equal(expected)
    assert len(seen) == NEW_TOKENS


@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict_in_generate": True},
        {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(1e9)])},
        {"logits_processor": LogitsProcessorList([lambda ids, scores: scores])},
        {"repetition_penalty": 1.5},
        {"num_beams": 2},
    ],
)
def test_what_the_short_loop_does_not_know_is_left_to_transformers(settings, model, calls):
    ids = random_ids(1, 7)
    model.generate(ids, **GREEDY, **settings)
    assert len(calls) == NEW_TOKENS


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("fails", [0, 4])
@pytest.mark.parametrize("needs_modules", [False, True])
def test_a_token_that_no_step_takes_goes_another_way(rows, cache, fails, needs_modules, model, calls, monkeypatch):
    ids, mask = padded(rows, 7)
    whole = by_the_loop(model, ids, attention_mask=mask)
    ends = int(whole[0, 7])  # the first row has ended before
    settings = {"attention_mask": mask, "eos_token_id": ends if rows > 1 else None}
    expected = by_the_loop(model, ids, **settings)
    taken, step = [], DecodingStep.next_logits

    def failing(self, input_ids, *inputs, **kwargs):
        if input_ids.shape[1] > 1:
            return step(self, input_ids, *inputs, **kwargs)
        taken.append(1)
        # where modules are needed, the model itself asks once more
        misses = (fails, fails + 1) if needs_modules else (fails,)
        return None if len(taken) - 1 in misses else step(self, input_ids, *inputs, **kwargs)

    monkeypatch.setattr(DecodingStep, "next_logits", failing)
    if needs_modules:
        monkeypatch.setattr(DecodingStep, "prompt_logits", lambda self, *inputs: None)
    switch = {"cache_implementation": cache, "disable_compile": True} if cache else {}
    calls.clear()
    assert model.generate(ids, **GREEDY | settings, **switch).equal(expected)
    assert calls == ([7, 1] if needs_modules else [7]) and len(taken) > fails + 1


@pytest.mark.parametrize("cache", [None, "static"])
def test_transformers_says_when_a_text_outgrows_the_positions(cache, calls, monkeypatch):
    said = []
    monkeypatch.setattr(stopping_criteria.logger, "warning_once", said.append)
    for limit, reminds in ((7 + NEW_TOKENS - 2, True), (7 + NEW_TOKENS - 1, False)):
        model = tiny_model(attn_implementation="sdpa", max_position_embeddings=limit)
        said.clear()
        calls.clear()
        model.generate(random_ids(1, 7), **GREEDY, cache_implementation=cache)
        assert any("friendly reminder" in text for text in said) == reminds
        assert len(calls) == (NEW_TOKENS if reminds else 1)


@pytest.mark.parametrize("grad", [True, False])
def test_a_step_keeps_its_gradients_where_they_are_wanted(grad, model):
    ids = random_ids(1, 7)
    with torch.set_grad_enabled(grad), Decoding(model):
        out = model(ids, use_cache=True)
        logits = model(ids[:, :1], past_key_values=out.past_key_values, use_cache=True).logits
    assert logits.requires_grad == grad
