"""The decode steps with kernels of their own, in Triton and in C++, give what the modules give.

Without CUDA Triton's kernels are interpreted, on a CPU.
"""

import copy

import pytest
import torch
from static_steps import (
    CUDA,
    KINDS,
    NATIVE,
    TRITON,
    TRITON_PARAM,
    VARIANTS,
    check_steps,
    dynamic,
    padded_ids,
    static,
    tiny_model,
    triton_attention,
)
from tiny_models import random_ids
from transformers import GenerationMixin, StaticCache, TextStreamer
from transformers.generation import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.engine.decoding import cuda_graph_step, step
from hf_decoder.engine.decoding.step import DecodingStep
from hf_decoder.model.modeling_hf_decoder import CACHE_NAME


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs them one after the other."""
    if triton_attention is not None and not CUDA:
        monkeypatch.setattr(cuda_graph_step, "MIN_BLOCKS", 1)
        monkeypatch.setattr(triton_attention, "SPLITS", 1)
    monkeypatch.setattr(cuda_graph_step, "STEPS_AHEAD", 3)


@pytest.mark.kernels
@pytest.mark.parametrize("precision", ["full", "half"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_modules(kind, variant, precision):
    dtype = kind.half if precision == "half" else torch.float32
    check_steps(kind, tiny_model(kind, dtype, **VARIANTS[variant]), length=9, hidden=0)


@pytest.mark.kernels
@pytest.mark.parametrize(("length", "hidden"), [(1, 0), (5, 3), (31, 30), (70, 20), (70, 69)])
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_and_padding(kind, monkeypatch, length, hidden):
    if kind is TRITON:  # over several programs
        monkeypatch.setattr(triton_attention, "KEYS_PER_SPLIT", 16)
        monkeypatch.setattr(triton_attention, "SPLITS", 4)
        monkeypatch.setattr(cuda_graph_step, "BLOCK_KEYS", {torch.float32: 16})
    check_steps(kind, tiny_model(kind), length, hidden)


REAL, SMALL = [(576, 9, 3, 1536), (2048, 16, 4, 5632)], [(96, 3, 1, 320)]
# the interpreter would take minutes for real sizes
TO_THE_TRUTH = [(NATIVE, size, length) for size in REAL[:1] + SMALL for length in (40, 300)] + [
    (TRITON, size, length) for size in (REAL if CUDA else SMALL) for length in ([40, 300, 1000] if CUDA else [40, 300])
]


@pytest.mark.parametrize(("kind", "size", "length"), TO_THE_TRUTH)
def test_half_precision_is_as_near_to_the_truth_as_the_modules(kind, size, length):
    if kind is TRITON:
        pytest.importorskip("triton")
    hidden_size, heads, groups, inner = size
    config = HfDecoderConfig(
        vocab_size=1000,
        hidden_size=hidden_size,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=groups,
    )
    torch.manual_seed(0)
    with torch.device(kind.device):
        model = HfDecoderForCausalLM(config).eval().to(kind.half)
        ids = torch.randint(1000, (1, length + 1))
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        expected = exact(ids, logits_to_keep=1).logits
        logits = []
        for static_step in (None, kind.step(DecodingStep(model))):
            cache = StaticCache(config=config, max_cache_len=length + 8)
            model(ids[:, :-1], past_key_values=cache, use_cache=True)
            if static_step is None:
                logits.append(model(ids[:, -1:], past_key_values=cache, use_cache=True).logits)
            else:
                assert static_step.begin(cache, torch.ones_like(ids), None)
                logits.append(static_step.logits(ids[:, -1:]))
    theirs, ours = ((found.double() - expected).norm() / expected.norm() for found in logits)
    assert 0 < ours < 1.2 * theirs, (ours.item(), theirs.item())


@pytest.mark.parametrize("kind", [TRITON_PARAM])
def test_rows_longer_than_a_block(kind, monkeypatch):
    monkeypatch.setattr(cuda_graph_step, "WHOLE_ROW", 16)
    monkeypatch.setattr(cuda_graph_step, "BLOCK", 16)
    check_steps(kind, tiny_model(kind, qk_norm=True), length=5, hidden=1)


@pytest.mark.kernels
@pytest.mark.parametrize("blocks", [3, 30])
@pytest.mark.parametrize("kind", [TRITON_PARAM])
def test_rows_of_a_block(kind, monkeypatch, blocks):
    monkeypatch.setattr(cuda_graph_step, "MIN_BLOCKS", blocks)
    check_steps(kind, tiny_model(kind, attention_bias=True), length=5, hidden=0, steps=1)


@pytest.mark.parametrize(
    "overrides",
    [
        {"hidden_act": "gelu"},
        {"sliding_window": 4},
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_kernels_do_not_compute_is_left_to_the_modules(kind, overrides):
    has_windows = "sliding_window" in overrides
    assert kind.covers(DecodingStep(tiny_model(kind, **overrides))) == (has_windows and kind is not TRITON)
    assert kind.covers(DecodingStep(tiny_model(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_other_types_are_left_to_the_modules(kind):
    for part in ("mlp.up_proj", "input_layernorm"):
        model = tiny_model(kind)
        model.model.layers[0].get_submodule(part).to(torch.float16)
        assert not kind.covers(DecodingStep(model)), part
    apart = tiny_model(kind)
    weight = apart.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()
    assert not kind.covers(DecodingStep(apart))


@pytest.fixture
def runs(kind, monkeypatch) -> list[bool]:
    """Records of each token by kernels whether they chose it. Without CUDA Triton's are made to be taken."""
    taken: list[bool] = []
    logits, greedy = kind.step.logits, kind.step.greedy

    def recorded_greedy(self, text, made, *rest):
        written = greedy(self, text, made, *rest)
        taken.extend([True] * (0 if written is None else written - made))
        return written

    monkeypatch.setattr(kind.step, "logits", lambda self, ids: taken.append(False) or logits(self, ids))
    monkeypatch.setattr(kind.step, "greedy", recorded_greedy)
    if kind is TRITON and not CUDA:
        monkeypatch.setattr(step, "has_kernels", lambda x: True)

        def may_compile(self, kwargs: dict, config) -> bool:  # as on CUDA
            return type(kwargs.get(CACHE_NAME)) is StaticCache and not config.disable_compile

        monkeypatch.setattr(GenerationMixin, "_valid_auto_compile_criteria", may_compile)
    return taken


@pytest.mark.kernels
@pytest.mark.parametrize("hidden", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_chosen_by_the_kernels(kind, runs, hidden):
    model = tiny_model(kind)
    ids, mask = padded_ids(kind, 7, hidden)
    expected = dynamic(model, ids, mask, max_new_tokens=10)
    assert not runs
    assert static(model, ids, mask, max_new_tokens=10).equal(expected)
    assert runs == [True] * 9
    # a second text, with a cache of another size: the same step, new buffers
    runs.clear()
    assert static(model, ids, mask, max_new_tokens=3).equal(expected[:, :10])
    assert static(model, ids, mask, max_new_tokens=1).equal(expected[:, :8])
    assert runs == [True] * 2


@pytest.mark.parametrize("place", [0, 1, 3, 4, 5, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_text_ends_with_its_first_end_token(kind, runs, place):
    model = tiny_model(kind)
    ids, mask = padded_ids(kind, 7, 0)
    whole = dynamic(model, ids, mask, max_new_tokens=10)
    end = int(whole[0, 7 + place])
    expected = dynamic(model, ids, mask, max_new_tokens=10, eos_token_id=[end, 60])
    cache = StaticCache(config=model.config, max_cache_len=40)
    settings = {"cache_implementation": None, "past_key_values": cache}
    assert static(model, ids, mask, max_new_tokens=10, eos_token_id=[end, 60], **settings).equal(expected)
    assert int(cache.layers[0].cumulative_length) == expected.shape[1] - 1
    # and goes on from where it ended
    mask = torch.ones_like(expected)
    more = static(model, expected, mask, max_new_tokens=3, **settings)
    assert more.equal(dynamic(model, expected, mask, max_new_tokens=3))


@pytest.mark.kernels
@pytest.mark.parametrize("first", [0, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_goes_on_from_a_cache_by_all_its_ids_or_the_new_ones(kind, runs, monkeypatch, first):
    model = tiny_model(kind)
    text = random_ids(1, 9).to(kind.device)
    found = []
    for captures in (True, False):
        if not captures:
            monkeypatch.setattr(DecodingStep, "on_static_cache", lambda self, rows: None)
        cache = StaticCache(config=model.config, max_cache_len=20)
        with torch.no_grad():
            model(text[:, :6], past_key_values=cache, use_cache=True)
        settings = {"cache_implementation": None, "past_key_values": cache, "max_new_tokens": 4}
        mask = torch.ones_like(text) if first else None
        found.append(model.generate(text[:, first:], attention_mask=mask, do_sample=False, pad_token_id=0, **settings))
    assert found[0].equal(found[1]) and found[0].shape[1] == 13 - first


class NoMoreThan(StoppingCriteria):
    """A stopping criterion of a user: ends a text at this many tokens."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length, device=input_ids.device)


@pytest.mark.kernels
@pytest.mark.parametrize("kind", KINDS)
def test_everything_else_keeps_the_loop_of_transformers(kind, runs):
    model = tiny_model(kind)
    ids, mask = padded_ids(kind, 7, 2)
    tokens: list[torch.Tensor] = []

    class Streamer(TextStreamer):
        def __init__(self):
            pass

        def put(self, value):
            tokens.append(value)

        def end(self):
            pass

    cases = {
        "sampling": {"do_sample": True},
        "streamer": {"streamer": Streamer()},
        "dictionary": {"return_dict_in_generate": True, "output_scores": True},
        "criterion": {"stopping_criteria": StoppingCriteriaList([NoMoreThan(10)])},
        "processor": {"logits_processor": LogitsProcessorList([lambda ids, scores: -scores])},
        "penalty": {"repetition_penalty": 1.7},
    }
    for name, settings in cases.items():
        runs.clear()
        torch.manual_seed(0)
        expected = dynamic(model, ids, mask, max_new_tokens=4, **settings)
        torch.manual_seed(0)
        found = static(model, ids, mask, max_new_tokens=4, **settings)
        if name == "dictionary":
            torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=1e-4, atol=1e-4)
            found, expected = found.sequences, expected.sequences
        assert found.equal(expected), name
        assert runs == [False] * (found.shape[1] - 8), name
    assert len(tokens) == 2 * 5


@pytest.mark.parametrize("kind", [TRITON_PARAM])
def test_several_rows_and_a_user_who_wants_no_compiler_go_through_the_modules(kind, runs, monkeypatch):
    model = tiny_model(kind)
    compiled = []
    monkeypatch.setattr(model, "get_compiled_call", lambda config: compiled.append(1) or model.__call__)
    ids = random_ids(2, 7).to(kind.device)
    assert static(model, ids, max_new_tokens=3).equal(dynamic(model, ids, max_new_tokens=3))
    assert compiled
    one = ids[:1]
    assert static(model, one, max_new_tokens=3, disable_compile=True).equal(dynamic(model, one, max_new_tokens=3))
    assert not runs


@pytest.mark.kernels
@pytest.mark.parametrize("kind", KINDS)
def test_two_texts_in_turn_keep_their_places(kind, runs):
    model = tiny_model(kind)
    step = DecodingStep(model)
    static_step = kind.step(step)
    first, second = random_ids(1, 5).to(kind.device), random_ids(1, 8, seed=1).to(kind.device)
    caches, logits = [], []
    with torch.no_grad():
        for ids in (first, second):
            caches.append(StaticCache(config=model.config, max_cache_len=12))
            model(ids[:, :-2], past_key_values=caches[-1], use_cache=True)
        for column in (-2, -1):
            for ids, cache in zip((first, second), caches, strict=True):
                seen = ids[:, : ids.shape[1] + column + 1]
                assert static_step.begin(cache, torch.ones_like(seen), None)
                logits.append(static_step.logits(seen[:, -1:]))
        torch.testing.assert_close(logits[2], model(first).logits[:, -1:], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits[3], model(second).logits[:, -1:], rtol=1e-4, atol=1e-4)


@pytest.mark.kernels
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_moved_are_read_where_they_are(kind, runs):
    model = tiny_model(kind)
    ids = random_ids(1, 5).to(kind.device)
    first = static(model, ids, max_new_tokens=3)
    step = DecodingStep.of(model)
    first_step = step.on_static_cache(1)
    assert step.on_static_cache(1) is first_step
    for parameter in model.parameters():  # as `model.to(device)` does it: the same parameter, memory of its own
        parameter.data = parameter.data * 1.5
    second = static(model, ids, max_new_tokens=3)
    assert step.on_static_cache(1) is not first_step
    assert second.equal(dynamic(model, ids, max_new_tokens=3)) and not second.equal(first)
    model.to(torch.float64)
    assert step.on_static_cache(1) is None


@pytest.mark.kernels
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_made_in_inference_mode_serves_outside_of_it(kind, runs):
    model = tiny_model(kind)
    ids = random_ids(1, 5).to(kind.device)
    with torch.inference_mode():
        first = static(model, ids, max_new_tokens=3)
    assert static(model, ids, max_new_tokens=3, repetition_penalty=1.0001).equal(first)
    assert static(model, ids, max_new_tokens=3).equal(first)
    assert runs == [True, True, False, False, True, True]


@pytest.mark.parametrize("kind", KINDS)
def test_masks_with_holes_are_refused(kind):
    model = tiny_model(kind)
    static_step = kind.step(DecodingStep(model))
    cache = StaticCache(config=model.config, max_cache_len=8)
    ids = random_ids(1, 5).to(kind.device)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    for mask in ([1, 1, 0, 1, 1, 1], [0, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 0], [0] * 6):
        assert not static_step.begin(cache, torch.tensor([mask], device=kind.device), None)


@pytest.mark.parametrize("kind", [pytest.param(NATIVE, id="c++")])
@pytest.mark.parametrize("rows", [2, 5, 8])
def test_greedy_texts_of_several_rows_end_by_themselves(runs, kind, rows):
    model = tiny_model(kind)
    ids, mask = padded_ids(kind, 7, 4, rows)
    whole = dynamic(model, ids, mask, max_new_tokens=12)
    assert static(model, ids, mask, max_new_tokens=12).equal(whole)
    assert runs == [True] * 11
    texts = []
    for ends in ([int(whole[0, 9])], whole[:, 10].unique().tolist()):  # of the first row, and of all
        settings = {"max_new_tokens": 12, "eos_token_id": ends, "pad_token_id": 3}
        texts.append(static(model, ids, mask, **settings))
        assert texts[-1].equal(dynamic(model, ids, mask, **settings)) and texts[-1].is_contiguous()
    assert (texts[0][0, 10:] == 3).all() and texts[1].shape[1] <= 11
    assert static(model, ids[:1], max_new_tokens=2).equal(dynamic(model, ids[:1], max_new_tokens=2))
