"""Extending keys and values in place equals joining them, and earlier states stay as they were."""

import copy

import pytest
import torch
from tiny_models import padded, random_ids, tiny_model
from transformers import DynamicCache

from hf_decoder.engine.decoding import growing_cache
from hf_decoder.engine.decoding.growing_cache import GrowingCache
from hf_decoder.model.modeling_hf_decoder import CACHE_NAME

NEW_TOKENS = 30
KINDS = {
    "full": {"qk_norm": True},
    "multi-query": {"num_key_value_heads": 1},
    "mixed": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
}
WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "beams": {"num_beams": 3},
    "prompt-lookup": {"prompt_lookup_num_tokens": 2},  # of one row
}


@pytest.fixture
def in_place(monkeypatch) -> dict[int, torch.UntypedStorage]:
    """Tiny caches are extended in place as well; collects the buffers, each half as large again as what it holds."""
    made: dict[int, torch.UntypedStorage] = {}
    update = GrowingCache.update

    def recorded(self, *inputs):
        now = update(self, *inputs)
        for storage in (x.untyped_storage() for x in now if x.untyped_storage().nbytes() > x.nbytes):
            made.setdefault(storage.data_ptr(), storage)
        return now

    monkeypatch.setattr(growing_cache, "LEAST_BYTES", 0)
    monkeypatch.setattr(growing_cache, "ROOM_SHARE", 2)
    monkeypatch.setattr(GrowingCache, "update", recorded)
    return made


def written(model, ids: torch.Tensor, **settings):
    torch.manual_seed(0)
    fixed = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, return_dict_in_generate=True, output_scores=True, **fixed | settings)


def filled(length: int) -> DynamicCache:
    torch.manual_seed(0)
    cache = DynamicCache()
    cache.update(torch.randn(2, 3, length, 4), torch.randn(2, 3, length, 4), 0)
    return cache


@pytest.mark.parametrize(
    "way, rows", [(way, rows) for way in WAYS for rows in (1, 3) if (way, rows) != ("prompt-lookup", 3)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_those_of_joined_caches(kind: str, rows: int, way: str, in_place, monkeypatch):
    model = tiny_model(attn_implementation="sdpa", **KINDS[kind])
    ids, mask = padded(rows, 9)
    settings = {"attention_mask": mask, **WAYS[way]}
    out = written(model, ids, **settings)
    assert bool(in_place) != (way == "beams")  # beam search reorders the rows after each step
    monkeypatch.setattr(growing_cache, "LEAST_BYTES", 2**40)
    expected = written(model, ids, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(out.scores, expected.scores, strict=True))
    for ours, theirs in zip(out.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert ours.keys.untyped_storage().nbytes() <= theirs.keys.untyped_storage().nbytes()
        assert ours.values.untyped_storage().nbytes() <= theirs.values.untyped_storage().nbytes()


def test_a_cache_goes_on_from_call_to_call(in_place, monkeypatch):
    model = tiny_model(attn_implementation="sdpa", max_position_embeddings=128)
    more = random_ids(2, 20)

    def conversation() -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        text = written(model, more, **{CACHE_NAME: cache}).sequences
        return written(model, torch.cat((text, more), 1), **{CACHE_NAME: cache}).sequences

    text = conversation()
    assert len(in_place) >= 8  # keys and values of two layers, in two calls
    monkeypatch.setattr(growing_cache, "LEAST_BYTES", 2**40)
    assert torch.equal(text, conversation())


@torch.no_grad()
def test_what_others_hold_stays_as_it_was(in_place):
    cache, joined, room = filled(4), filled(4), GrowingCache()
    held = []
    for step in range(40):
        if step in (10, 11, 25):  # speculative decoding crops tokens
            held.append((cache.layers[0].keys, cache.layers[0].keys.clone()))
            cache.crop(-2)
            joined.crop(-2)
        if step == 18:  # a second text with the same beginning
            aside, aside_room = copy.copy(cache), GrowingCache()
            aside.layers = [copy.copy(cache.layers[0])]
            for _ in range(5):
                aside_room.update(aside, torch.full((2, 3, 1, 4), -1.0), torch.full((2, 3, 1, 4), -1.0), 0)
        new = torch.randn(2, 2, 3, 1, 4)
        keys, values = room.update(cache, *new, 0)
        expected_keys, expected_values = joined.update(*new, 0)
        assert torch.equal(keys, expected_keys) and torch.equal(values, expected_values)
        assert cache.layers[0].keys is keys and cache.layers[0].values is values
        held.append((keys, keys.clone()))
    assert all(torch.equal(now, then) for now, then in held)
    assert len(in_place) >= 8


@torch.no_grad()
def test_room_grows_with_the_text_and_goes_at_the_end(in_place, monkeypatch):
    monkeypatch.setattr(growing_cache, "ROOM_SHARE", 8)
    cache, room = filled(40), GrowingCache()
    for _ in range(80):
        room.update(cache, torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 4), 0)
    layer = cache.layers[0]
    assert 2 * 4 < len(in_place) < 2 * 12  # an eighth of 40 to 120 tokens at a time
    assert layer.keys.nbytes < layer.keys.untyped_storage().nbytes() <= 1.15 * layer.keys.nbytes
    then = layer.keys.clone(), layer.values.clone()
    room.end()
    assert torch.equal(layer.keys, then[0]) and torch.equal(layer.values, then[1])
    assert layer.keys.untyped_storage().nbytes() == layer.keys.nbytes
    assert layer.values.untyped_storage().nbytes() == layer.values.nbytes


def test_gradients_have_keys_of_their_own(in_place):
    cache, room = filled(4), GrowingCache()
    new = torch.randn(2, 3, 1, 4, requires_grad=True)
    sums = [room.update(cache, new, new, 0)[0].pow(2).sum() for _ in range(3)]
    sum(sums).backward()
    torch.testing.assert_close(new.grad, 12 * new.detach())  # 1, 2 and 3 times 2 new
    assert not in_place


@torch.no_grad()
@pytest.mark.parametrize("is_large", [True, False])
def test_only_what_costs_more_than_the_calls_is_extended_in_place(is_large):
    width = growing_cache.LEAST_BYTES // 64 // (1 if is_large else 2)  # of 16 tokens in fp32
    cache, room = DynamicCache(), GrowingCache()
    cache.update(torch.ones(1, 1, 16, width), torch.ones(1, 1, 16, width), 0)
    for _ in range(2):
        keys, _ = room.update(cache, torch.ones(1, 1, 1, width), torch.ones(1, 1, 1, width), 0)
    assert keys.shape[2] == 18
    assert (keys.untyped_storage().nbytes() > keys.nbytes) == is_large
