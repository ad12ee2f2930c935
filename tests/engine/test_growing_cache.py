"""Extending keys and values in place equals joining them, and earlier states stay as they were."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_models import padded, random_ids, tiny_model
from transformers import DynamicCache

from hf_decoder.engine import settings as engine_settings
from hf_decoder.engine.cpp.build import find_compiler
from hf_decoder.engine.decoding import growing_cache
from hf_decoder.engine.decoding.cpp_step import CppStep
from hf_decoder.engine.decoding.growing_cache import GrowingCache
from hf_decoder.model.modeling_hf_decoder import CACHE_NAME

NEW_TOKENS = 30
KINDS = {
    "full": {"qk_norm": True},
    "multi-query": {"num_key_value_heads": 1},
    "mixed": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "windows": {"sliding_window": 12},  # longer than the prompt
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
    # beam search reorders the rows after each step, and windows leave tokens behind
    assert bool(in_place) != (way == "beams" or kind == "windows")
    monkeypatch.setattr(growing_cache, "LEAST_BYTES", 2**40)
    expected = written(model, ids, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(out.scores, expected.scores, strict=True))
    for ours, theirs in zip(out.past_key_values.layers, expected.past_key_values.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
        assert ours.keys.untyped_storage().nbytes() <= theirs.keys.untyped_storage().nbytes()
        assert ours.values.untyped_storage().nbytes() <= theirs.values.untyped_storage().nbytes()


@pytest.fixture
def in_cpp(monkeypatch) -> list[int]:
    """Growing caches are for the C++ step; collects a one for each of its tokens."""
    calls: list[int] = []
    run = CppStep._run
    monkeypatch.setattr(CppStep, "_run", lambda self, chooses: calls.append(1) or run(self, chooses))
    with engine_settings.override(ways={"growing cache": "C++"}):
        yield calls


IN_CPP = pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")


@IN_CPP
@pytest.mark.parametrize(
    "way, rows", [(way, rows) for way in WAYS for rows in (1, 3) if (way, rows) != ("prompt-lookup", 3)]
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_step_in_cpp_writes_the_texts_of_joined_caches(kind: str, rows: int, way: str, in_cpp, monkeypatch):
    monkeypatch.setattr(growing_cache, "LEAST_ROOM", 7)  # buffers are filled and made anew
    model = tiny_model(attn_implementation="sdpa", **KINDS[kind])
    ids, mask = padded(rows, 9)
    settings = {"attention_mask": mask, **WAYS[way]}
    out = written(model, ids, **settings)
    # not for it: windows of which a crop may bring tokens back, and three beams of three rows
    is_cropped = way == "prompt-lookup" and kind in ("mixed", "windows")
    assert bool(in_cpp) != (is_cropped or (way == "beams" and rows == 3 and CppStep.max_rows < 9))
    if way in ("greedy", "sampled"):
        assert len(in_cpp) in (0, NEW_TOKENS - 1)
    with engine_settings.override(all=False):
        expected = written(model, ids, **settings)
    assert torch.equal(out.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(out.scores), torch.stack(expected.scores), rtol=0, atol=1e-4)
    for ours, theirs in zip(out.past_key_values.layers, expected.past_key_values.layers, strict=True):
        for mine, other in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
            assert not in_cpp or mine.untyped_storage().nbytes() == mine.nbytes


@IN_CPP
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_plain_greedy_text_is_written_in_cpp(kind, rows, in_cpp, monkeypatch):
    monkeypatch.setattr(growing_cache, "LEAST_ROOM", 7)  # the text is written in several parts
    model = tiny_model(attn_implementation="sdpa", **KINDS[kind])
    ids, mask = padded(rows, 9)
    settings = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 2}
    with engine_settings.override(all=False):
        whole = model.generate(ids, eos_token_id=None, **settings)
    assert model.generate(ids, eos_token_id=None, **settings).equal(whole)
    assert len(in_cpp) == NEW_TOKENS - 1
    for place in (9, 12, 20, 38):
        ends = whole[:, place].tolist()
        for end in (ends, ends[0]):
            cache = DynamicCache(config=model.config)
            text = model.generate(ids, eos_token_id=end, **settings, **{CACHE_NAME: cache})
            with engine_settings.override(all=False):
                assert text.equal(model.generate(ids, eos_token_id=end, **settings))
            assert cache.get_seq_length() == text.shape[1] - 1


@IN_CPP
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("pad", [-5, 10**9])
def test_no_token_for_padding_that_the_model_lacks_is_read(pad, cache, in_cpp):
    model = tiny_model(attn_implementation="sdpa")
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": pad, "cache_implementation": cache}
    text = model.generate(random_ids(2, 5), eos_token_id=None, **settings)
    assert len(in_cpp) == 7  # no row ends
    with pytest.raises(ValueError, match="vocabulary"):
        model.generate(text[:, :5], eos_token_id=int(text[0, 6]), **settings)
    assert model.generate(text[:1, :5], eos_token_id=int(text[0, 6]), **settings).equal(text[:1, :7])


@IN_CPP
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True}, {"num_beams": 2}])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["full", "mixed", "windows"])
def test_short_prompts_are_taken_in_cpp(kind, rows, sampling, in_cpp, layers):
    model = tiny_model(attn_implementation="sdpa", **KINDS[kind])
    ids, mask = padded(rows, 9)
    hole = mask.clone()
    hole[0, 6] = 0
    for seen, takes in ((mask, True), (hole, False), *([(None, True)] if rows == 1 else [])):
        layers.clear()
        in_cpp.clear()
        with engine_settings.override(ways={"growing cache": "C++", "short prompt": "C++"}):
            out = written(model, ids, attention_mask=seen, **sampling)
        assert not layers and bool(in_cpp) == takes
        with engine_settings.override(all=False):
            expected = written(model, ids, attention_mask=seen, **sampling)
        assert out.sequences.equal(expected.sequences)
        for ours, theirs in zip(out.past_key_values.layers, expected.past_key_values.layers, strict=True):
            # a window of transformers' own is a view of one token more
            assert ours.keys.untyped_storage().nbytes() == ours.keys.nbytes or not (takes or kind == "full")
            kept = torch.ones(len(ours.keys), ours.keys.shape[2])  # what padding holds is free
            if kept.shape[1] > 12:  # windows have left the padding behind
                kept[:, :9] = (torch.ones_like(ids) if seen is None else seen).repeat_interleave(len(kept) // rows, 0)
            found, wanted = (layer.keys * kept[:, None, :, None] for layer in (ours, theirs))
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@IN_CPP
def test_what_the_step_in_cpp_does_not_take_goes_on_as_ever(in_cpp):
    model = tiny_model(attn_implementation="sdpa")
    ids, mask = padded(1, 9)
    mask[0, 6] = 0  # a hole
    with engine_settings.override(ways={}):
        expected = written(model, ids, attention_mask=mask).sequences
    assert written(model, ids, attention_mask=mask).sequences.equal(expected) and not in_cpp
    with torch.autocast("cpu", torch.bfloat16):
        written(model, ids)
    with engine_settings.override(kernels=False):
        written(model, ids)
    with torch.no_grad():  # a loop of someone's own keeps no buffers
        cache = model(ids).past_key_values
        for _ in range(3):
            model(ids[:, :1], past_key_values=cache)
    assert not in_cpp


@IN_CPP
def test_threads_and_conversations_share_the_step_in_cpp(in_cpp):
    model = tiny_model(attn_implementation="sdpa", max_position_embeddings=256)

    def conversation(seed: int) -> torch.Tensor:
        cache, text = DynamicCache(config=model.config), random_ids(1, 7, seed=seed)
        for turn in range(3):
            text = written(model, torch.cat((text, random_ids(1, 5, seed=turn)), 1), **{CACHE_NAME: cache}).sequences
        return text

    with engine_settings.override(ways={}):
        expected = [conversation(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(conversation, range(4)))
    assert in_cpp and all(map(torch.equal, found, expected))


@IN_CPP
def test_a_window_of_the_cache_that_is_not_the_models_is_left_to_the_modules(in_cpp):
    model = tiny_model(attn_implementation="sdpa", sliding_window=6)
    other = tiny_model(attn_implementation="sdpa", sliding_window=4)
    for config in (other.config, tiny_model().config):
        written(model, random_ids(1, 9), **{CACHE_NAME: DynamicCache(config=config)})
        assert bool(in_cpp) == (config.sliding_window is None)  # a cache of all tokens holds those of a window, too
        with engine_settings.override(all=False):
            expected = written(model, random_ids(1, 9), **{CACHE_NAME: DynamicCache(config=config)}).sequences
        assert written(model, random_ids(1, 9), **{CACHE_NAME: DynamicCache(config=config)}).sequences.equal(expected)


@IN_CPP
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_that_was_made_early_is_filled(kind, in_cpp):
    model = tiny_model(attn_implementation="sdpa", **KINDS[kind])

    def text() -> torch.Tensor:
        cache, config = DynamicCache(config=model.config), model.config
        cache.early_initialization(1, config.num_key_value_heads, config.head_dim, torch.float32, torch.device("cpu"))
        return written(model, random_ids(1, 1), **{CACHE_NAME: cache}).sequences

    found = text()
    with engine_settings.override(all=False):
        assert text().equal(found)


@torch.no_grad()
def test_a_token_that_torch_has_written_is_not_written_over(in_place):
    cache, room = filled(4), GrowingCache([None])
    for token in range(6):
        buffers = room.buffers(cache, torch.float32)
        assert buffers.length == cache.get_seq_length() == 4 + token
        if token % 2:
            room.update(cache, torch.randn(2, 3, 1, 4), torch.randn(2, 3, 1, 4), 0)
        else:
            room.extend(cache, buffers)


@IN_CPP
def test_a_long_text_with_a_window_keeps_a_window_in_memory(in_cpp):
    model = tiny_model(attn_implementation="sdpa", sliding_window=20, max_position_embeddings=512)
    most, extend = [], GrowingCache.extend

    def measured(self, cache, buffers, tokens=1):
        most.append(max(pair[0].shape[2] for pair in buffers.pairs))
        return extend(self, cache, buffers, tokens)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GrowingCache, "extend", measured)
        out = written(model, random_ids(1, 50), max_new_tokens=300)
    assert len(in_cpp) == 299 and max(most) <= 19 + growing_cache.LEAST_ROOM
    with engine_settings.override(all=False):
        assert written(model, random_ids(1, 50), max_new_tokens=300).sequences.equal(out.sequences)


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
