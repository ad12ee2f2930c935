"""The steps by kernels of their own, in Triton and in C++, give what the modules give.

Without CUDA Triton's kernels are interpreted, on a CPU.
"""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
import torch
from tiny_models import random_ids
from tiny_models import tiny_model as eager_model
from transformers import GenerationMixin, StaticCache, TextStreamer
from transformers.generation import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.model import (
    captured_step_hf_decoder,
    decoding_hf_decoder,
    native_source_hf_decoder,
    native_step_hf_decoder,
    parts_hf_decoder,
)
from hf_decoder.model.captured_step_hf_decoder import CapturedStep, is_capturable
from hf_decoder.model.decoding_hf_decoder import DecodingStep
from hf_decoder.model.native_step_hf_decoder import NativeStep, is_for_native

try:
    from hf_decoder.model import triton_decoding_hf_decoder
except ImportError:  # which this system has not
    triton_decoding_hf_decoder = None  # type: ignore[assignment]

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CUDA = torch.cuda.is_available()


class Kind(NamedTuple):
    """Of kernels."""

    step: Any
    covers: Any
    device: str
    half: torch.dtype


TRITON = Kind(CapturedStep, is_capturable, "cuda", torch.bfloat16)
if not CUDA:  # the interpreter multiplies matrices of bf16 wrongly
    TRITON = TRITON._replace(device="cpu", half=torch.float16)
NATIVE = Kind(NativeStep, is_for_native, "cpu", torch.bfloat16)
TRITON_PARAM = pytest.param(
    TRITON, id="triton", marks=pytest.mark.skipif(triton_decoding_hf_decoder is None, reason="triton is not installed")
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


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The interpreter runs them one after the other."""
    if triton_decoding_hf_decoder is not None and not CUDA:
        monkeypatch.setattr(captured_step_hf_decoder, "MIN_BLOCKS", 1)
        monkeypatch.setattr(triton_decoding_hf_decoder, "SPLITS", 1)
    monkeypatch.setattr(captured_step_hf_decoder, "STEPS_AHEAD", 3)


def padded_ids(kind: Kind, length: int, hidden: int, rows: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Of several rows each hides one token less than the one before."""
    ids = random_ids(rows, length).to(kind.device)
    mask = torch.ones_like(ids)
    for row in range(rows):
        mask[row, : max(hidden - row, 0)] = 0
    return ids, mask


@torch.no_grad()
def check_steps(kind: Kind, model, length: int, hidden: int, steps: int = 2, rows: int = 1) -> None:
    """The logits and the cache of steps after a prompt whose first tokens are hidden."""
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
        assert static_step.begin(ours, mask, None)
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


@pytest.mark.parametrize("precision", ["full", "half"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_those_of_the_modules(kind, variant, precision):
    dtype = kind.half if precision == "half" else torch.float32
    check_steps(kind, tiny_model(kind, dtype, **VARIANTS[variant]), length=9, hidden=0)


@pytest.mark.parametrize(("length", "hidden"), [(1, 0), (5, 3), (31, 30), (70, 20), (70, 69)])
@pytest.mark.parametrize("kind", KINDS)
def test_lengths_and_padding(kind, monkeypatch, length, hidden):
    if kind is TRITON:  # over several programs
        monkeypatch.setattr(triton_decoding_hf_decoder, "KEYS_PER_SPLIT", 16)
        monkeypatch.setattr(triton_decoding_hf_decoder, "SPLITS", 4)
        monkeypatch.setattr(captured_step_hf_decoder, "BLOCK_KEYS", {torch.float32: 16})
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
    monkeypatch.setattr(captured_step_hf_decoder, "WHOLE_ROW", 16)
    monkeypatch.setattr(captured_step_hf_decoder, "BLOCK", 16)
    check_steps(kind, tiny_model(kind, qk_norm=True), length=5, hidden=1)


@pytest.mark.parametrize("blocks", [3, 30])
@pytest.mark.parametrize("kind", [TRITON_PARAM])
def test_rows_of_a_block(kind, monkeypatch, blocks):
    monkeypatch.setattr(captured_step_hf_decoder, "MIN_BLOCKS", blocks)
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
    assert not kind.covers(DecodingStep(tiny_model(kind, **overrides)))
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
    """Records of each step by kernels whether it chose a token. Without CUDA Triton's are made to be taken."""
    taken: list[bool] = []
    run = kind.step._run

    def recorded(self, chooses: bool) -> None:
        taken.append(chooses)
        run(self, chooses)

    monkeypatch.setattr(kind.step, "_run", recorded)
    if kind is TRITON and not CUDA:
        monkeypatch.setattr(decoding_hf_decoder, "has_kernels", lambda x: True)
        monkeypatch.setattr(
            GenerationMixin, "_valid_auto_compile_criteria", lambda self, kwargs, config: not config.disable_compile
        )
    return taken


def static(model, ids, mask=None, **settings):
    fixed = {"cache_implementation": "static", "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **(fixed | settings))


def dynamic(model, ids, mask=None, **settings):
    return static(model, ids, mask, cache_implementation=None, **settings)


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
    """Ends a text at this many tokens, in a way of its own."""

    def __init__(self, length: int):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length, device=input_ids.device)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", ["layers", "head"])
def test_int8_weights_are_multiplied_as_they_are(dtype, quantized):
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_model(NATIVE, dtype, attention_bias=True, tie_word_embeddings=False)
    torchao.quantize_(model.model if quantized == "layers" else model, torchao.Int8WeightOnlyConfig())
    assert is_for_native(DecodingStep(model))
    check_steps(NATIVE, model, length=9, hidden=2)


@pytest.mark.parametrize("precision", ["full", "half", "int8"])
@pytest.mark.parametrize("rows", [2, 3, 7, 8])
def test_several_rows(rows, precision):
    model = tiny_model(NATIVE, NATIVE.half if precision == "half" else torch.float32, qk_norm=True, mlp_bias=True)
    if precision == "int8":
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model.model, torchao.Int8WeightOnlyConfig())
    check_steps(NATIVE, model, length=9, hidden=5, rows=rows)


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
        assert texts[-1].equal(dynamic(model, ids, mask, **settings))
    assert (texts[0][0, 10:] == 3).all() and texts[1].shape[1] <= 11
    assert static(model, ids[:1], max_new_tokens=2).equal(dynamic(model, ids[:1], max_new_tokens=2))


def test_more_rows_than_the_function_is_for_are_left_to_the_compiler(monkeypatch):
    model = tiny_model(NATIVE)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(1) or function)
    ids = random_ids(NativeStep.max_rows + 1, 5)
    assert static(model, ids, max_new_tokens=3).equal(dynamic(model, ids, max_new_tokens=3))
    assert compiled
    with pytest.raises(ValueError, match="takes 8 rows at most, not 9"):
        NativeStep(DecodingStep(model), 9)


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_threads_share_a_step(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_steps(NATIVE, tiny_model(NATIVE, num_key_value_heads=1, qk_norm=True), length=5, hidden=0)
    finally:
        torch.set_num_threads(before)


def test_room_is_in_fp32_whatever_the_default_is():
    model = tiny_model(NATIVE, torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert NativeStep(DecodingStep(model))._room.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_what_is_no_number_is_chosen_as_argmax_chooses_it():
    model = tiny_model(NATIVE, tie_word_embeddings=False)
    ids = random_ids(1, 5)
    model.lm_head.weight.data[[20, 40]] = float("nan")
    assert static(model, ids, max_new_tokens=3)[0, 5:].tolist() == [20] * 3
    model.lm_head.weight.data[:] = 1.0
    assert static(model, ids, max_new_tokens=3)[0, 6:].tolist() == [0] * 2  # the first token is torch's


def test_a_token_out_of_range_is_named():
    model = tiny_model(NATIVE)
    cache = StaticCache(config=model.config, max_cache_len=12)
    ids = random_ids(1, 5)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    ids = torch.cat((ids, torch.tensor([[10**6]])), 1)
    with pytest.raises(ValueError, match="vocabulary ends at"):
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, do_sample=False)


def test_without_a_compiler_the_step_runs_uncompiled(monkeypatch):
    def fail(*inputs, **options):
        raise RuntimeError("no C++ compiler found")

    monkeypatch.setattr(native_step_hf_decoder, "_function", fail)
    monkeypatch.setattr(torch, "compile", lambda *inputs, **options: fail)
    said = []
    monkeypatch.setattr(decoding_hf_decoder.logger, "warning", said.append)
    model = tiny_model(NATIVE)
    ids = random_ids(1, 5)
    for _ in range(2):
        assert static(model, ids, max_new_tokens=3).equal(dynamic(model, ids, max_new_tokens=3))
    assert said and len(said) == len(set(said)) and all("no C++ compiler found" in text for text in said)


def test_texts_in_several_threads_are_those_of_one():
    model = tiny_model(NATIVE)
    prompts = [random_ids(1, 4 + seed, seed=seed) for seed in range(4)]
    expected = [dynamic(model, ids, max_new_tokens=20) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: static(model, ids, max_new_tokens=20), prompts * 3))
    assert all(one.equal(other) for one, other in zip(found, expected * 3, strict=True))


@pytest.fixture
def prompts(monkeypatch) -> list[tuple[int, int]]:
    """Records of the prompts that the function takes, which it may of any precision."""
    taken = []
    prompt = NativeStep.prompt

    def recorded(self, input_ids, *rest):
        logits = prompt(self, input_ids, *rest)
        if logits is not None:
            taken.append(tuple(input_ids.shape))
        return logits

    monkeypatch.setattr(NativeStep, "prompt", recorded)
    monkeypatch.setattr(native_step_hf_decoder, "_prompt_lines", lambda step: 512)
    return taken


@torch.no_grad()
def check_prompt(model, rows: int, tokens: int, hidden: int = 0, before: int = 0) -> None:
    """The last logits and the cache of a prompt, which goes on after `before` tokens."""
    step = NativeStep(DecodingStep(model), rows)
    ids, mask = padded_ids(NATIVE, before + tokens, hidden, rows)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    ours = StaticCache(config=model.config, max_cache_len=before + tokens + 3)
    theirs = StaticCache(config=model.config, max_cache_len=before + tokens + 3)
    if before:
        for cache in (ours, theirs):
            first = {"attention_mask": mask[:, :before], "position_ids": positions[:, :before]}
            model(ids[:, :before], past_key_values=cache, use_cache=True, **first)
    rest = {"attention_mask": mask, "position_ids": positions[:, before:]}
    expected = model(ids[:, before:], past_key_values=theirs, use_cache=True, **rest).logits[:, -1:]
    found = step.prompt(ids[:, before:], ours, mask, positions[:, before:])
    # in half precision the modules round after every map, for each of the tokens: see the truth below
    tolerance = TOLERANCE[model.dtype] * (1 if model.dtype == torch.float32 else 5)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())
    seen = mask[:, None, :, None].bool()
    for our_layer, their_layer in zip(ours.layers, theirs.layers, strict=True):
        assert int(our_layer.cumulative_length) == int(their_layer.cumulative_length) == before + tokens
        for name in ("keys", "values"):
            a, b = (getattr(layer, name)[:, :, : before + tokens] * seen for layer in (our_layer, their_layer))
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())
    # the step after it finds all in its place
    token = random_ids(rows, 1, seed=5)
    mask = torch.cat((mask, mask.new_ones(rows, 1)), 1)
    expected = model(
        token, past_key_values=theirs, use_cache=True, attention_mask=mask, position_ids=mask.sum(-1, keepdim=True) - 1
    ).logits
    assert step.begin(ours, mask, None)
    torch.testing.assert_close(step.logits(token), expected, rtol=0, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("precision", ["full", "half"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_are_those_of_the_modules(variant, precision):
    dtype = NATIVE.half if precision == "half" else torch.float32
    check_prompt(tiny_model(NATIVE, dtype, **VARIANTS[variant]), rows=1, tokens=15)


@pytest.mark.parametrize("before", [0, 6])
@pytest.mark.parametrize(("rows", "tokens", "hidden"), [(1, 2, 0), (1, 40, 3), (2, 4, 0), (3, 21, 11), (8, 9, 8)])
@pytest.mark.parametrize("cached_bytes", [1, 1 << 18])
def test_prompts_of_all_sizes(rows, tokens, hidden, before, cached_bytes, monkeypatch):
    """Products in tiles of one line and output, and of several; the last ones cut short."""
    source = native_source_hf_decoder.SOURCE.replace("CACHED_BYTES (1 << 18)", f"CACHED_BYTES {cached_bytes}")
    assert f"CACHED_BYTES {cached_bytes}" in source
    monkeypatch.setattr(native_source_hf_decoder, "SOURCE", source)
    function = native_step_hf_decoder._function.__wrapped__()
    monkeypatch.setattr(native_step_hf_decoder, "_function", lambda: function)
    check_prompt(tiny_model(NATIVE, qk_norm=True, attention_bias=True), rows, tokens, hidden, before)


@pytest.mark.parametrize("length", [40, 300])
def test_prompts_in_half_precision_are_as_near_to_the_truth_as_the_modules(length):
    config = HfDecoderConfig(
        vocab_size=1000,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    torch.manual_seed(0)
    model = HfDecoderForCausalLM(config).eval().bfloat16()
    ids = torch.randint(1000, (1, length))
    with torch.no_grad():
        expected = copy.deepcopy(model).double()(ids, logits_to_keep=1).logits
        theirs = model(ids, logits_to_keep=1).logits
        cache = StaticCache(config=config, max_cache_len=length)
        ours = NativeStep(DecodingStep(model)).prompt(ids, cache, None, None)
    errors = [float((found.double() - expected).norm() / expected.norm()) for found in (ours, theirs)]
    assert 0 < errors[0] < 1.2 * errors[1], errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_of_int8_weights(dtype):
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_model(NATIVE, dtype, attention_bias=True)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    check_prompt(model, rows=1, tokens=15)


class Collected(TextStreamer):
    def __init__(self):
        self.ids: list[int] = []

    def put(self, value):
        self.ids += value.flatten().tolist()

    def end(self):
        pass


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True},
    "dictionary": {"return_dict_in_generate": True, "output_logits": True},
    "chunks": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 0), (1, 4), (3, 4)])
def test_a_text_begins_with_a_prompt_by_the_function(way, rows, hidden, prompts):
    model = tiny_model(NATIVE)
    ids, mask = padded_ids(NATIVE, 12, hidden, rows)
    texts = []
    for call in (static, dynamic):
        torch.manual_seed(0)
        text = call(model, ids, mask, max_new_tokens=6, **WAYS[way])
        if way == "dictionary":
            expected = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0)).logits[:, -1]
            torch.testing.assert_close(text.logits[0], expected, atol=1e-4, rtol=0)
            text = text.sequences
        texts.append(text)
    assert texts[0].equal(texts[1])
    in_chunks = [(rows, 5), (rows, 5), (rows, 2)]
    # in some versions of transformers chunks come with masks prepared for the modules
    assert prompts in ([in_chunks, []] if way == "chunks" else [[(rows, 12)]])


def test_a_streamed_text_begins_so(prompts):
    model, ids, streamer = tiny_model(NATIVE), random_ids(1, 12), Collected()
    text = static(model, ids, max_new_tokens=6, streamer=streamer)
    assert text.equal(dynamic(model, ids, max_new_tokens=6))
    assert streamer.ids == text[0].tolist()
    assert prompts == [(1, 12)]


def test_a_guess_of_several_tokens_has_all_its_logits(prompts):
    """What transformers looks up in the text is longer than one token and no prompt."""
    model, ids = tiny_model(NATIVE), random_ids(1, 6).repeat(1, 2)
    try:
        text = static(model, ids, max_new_tokens=20, prompt_lookup_num_tokens=3)
    except ValueError as error:
        assert "not supported with Static cache" in str(error)
        pytest.skip("this transformers looks nothing up with a static cache")
    assert text.equal(dynamic(model, ids, max_new_tokens=20))
    assert len(prompts) <= 1


@pytest.mark.parametrize(("rows", "hidden"), [(1, 0), (3, 5)])
def test_a_text_goes_on_with_a_prompt_by_the_function(rows, hidden, prompts):
    model = tiny_model(NATIVE)
    ids, mask = padded_ids(NATIVE, 12, hidden, rows)
    texts = []
    for cache in (StaticCache(config=model.config, max_cache_len=40), None):
        settings = {"cache_implementation": None, "past_key_values": cache, "max_new_tokens": 3}
        text = static(model, ids, mask, **settings)
        longer = torch.cat((text, random_ids(rows, 4, seed=9)), 1)
        more = torch.cat((mask, mask.new_ones(rows, 7)), 1)
        texts.append(static(model, longer, more, **settings))
    assert texts[0].equal(texts[1])
    assert prompts == [(rows, 12), (rows, 5)]  # the token without keys and the new ones


def test_prompts_that_are_left_to_the_modules(prompts, monkeypatch):
    model = tiny_model(NATIVE)
    ids, mask = padded_ids(NATIVE, 12, 0)

    def check(*, taken: bool, mask=mask, **settings) -> None:
        prompts.clear()
        text = static(model, ids, mask, max_new_tokens=4, **settings)
        assert bool(prompts) == taken
        assert text.equal(dynamic(model, ids, mask, max_new_tokens=4, **settings))

    check(taken=True)
    check(taken=False, disable_compile=True)
    hole = mask.clone()
    hole[0, 5] = 0
    check(taken=False, mask=hole)
    jumps = torch.arange(12)[None] + 3 * (torch.arange(12) > 6)
    check(taken=False, position_ids=jumps)
    check(taken=True, position_ids=jumps[:, 7:8] + torch.arange(12))
    monkeypatch.setattr(native_step_hf_decoder, "_prompt_lines", lambda step: 11)
    check(taken=False)


def test_prompts_are_taken_where_the_modules_are_slower(monkeypatch):
    def lines(dtype: torch.dtype, int8: bool = False) -> int:
        model = tiny_model(NATIVE, dtype)
        if int8:
            torchao = pytest.importorskip("torchao.quantization")
            torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        step = NativeStep(DecodingStep(model), 2)
        return max((2 * tokens for tokens in range(2, 200) if step.takes_prompts(2, tokens)), default=0)

    assert lines(torch.float32) == 32
    assert lines(torch.float32, int8=True) == 128
    for is_fast in (True, False):
        monkeypatch.setitem(parts_hf_decoder.FAST_HALF_PRECISION, torch.bfloat16, is_fast)
        assert lines(torch.bfloat16) == lines(torch.bfloat16, int8=True) == (0 if is_fast else 128)
    assert not NativeStep(DecodingStep(tiny_model(NATIVE))).takes_prompts(2, 3)  # a step is for its number of rows


def test_a_prompt_of_ids_that_are_none(prompts):
    model = tiny_model(NATIVE)
    with pytest.raises(ValueError, match="the vocabulary ends at"):
        static(model, torch.tensor([[3, 4, 1000, 5]]), max_new_tokens=3)
    assert not prompts
