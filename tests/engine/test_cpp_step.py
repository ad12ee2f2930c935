"""The C++ decode step: its threads, vectors of any width, and its prefill of prompts."""

import copy
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from static_steps import NATIVE, TOLERANCE, VARIANTS, check_steps, dynamic, padded_ids, static, tiny_model
from tiny_models import random_ids
from transformers import StaticCache, TextStreamer
from transformers.utils import logging
from vector_widths import CAPABILITY, WIDTHS

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.engine import settings as engine_settings
from hf_decoder.engine.calibration import measured
from hf_decoder.engine.cpp import build
from hf_decoder.engine.decoding import cpp_step, step
from hf_decoder.engine.decoding.cpp_step import CppStep, is_for_cpp
from hf_decoder.engine.decoding.step import DecodingStep


def quantize(module: torch.nn.Module) -> None:
    """To int8, in place."""
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(module, torchao.Int8WeightOnlyConfig())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantized", ["layers", "head"])
def test_int8_weights_are_multiplied_as_they_are(dtype, quantized):
    model = tiny_model(NATIVE, dtype, attention_bias=True, tie_word_embeddings=False)
    quantize(model.model if quantized == "layers" else model)
    assert is_for_cpp(DecodingStep(model))
    check_steps(NATIVE, model, length=9, hidden=2)


@pytest.mark.parametrize("precision", ["full", "half", "int8"])
@pytest.mark.parametrize("rows", sorted({*range(2, 9), CppStep.max_rows}))
def test_several_rows(rows, precision):
    model = tiny_model(NATIVE, NATIVE.half if precision == "half" else torch.float32, qk_norm=True, mlp_bias=True)
    if precision == "int8":
        quantize(model.model)
    check_steps(NATIVE, model, length=9, hidden=5, rows=rows)


def test_more_rows_than_the_function_is_for_go_another_way():
    model = tiny_model(NATIVE)
    ids = random_ids(CppStep.max_rows + 1, 5)
    assert static(model, ids, max_new_tokens=3).equal(dynamic(model, ids, max_new_tokens=3))
    most = CppStep.max_rows
    with pytest.raises(ValueError, match=f"takes {most} rows at most, not {most + 1}"):
        CppStep(DecodingStep(model), most + 1)


@pytest.mark.parametrize("threads", [1, 3, 7])
def test_threads_share_a_step(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_steps(NATIVE, tiny_model(NATIVE, num_key_value_heads=1, qk_norm=True), length=5, hidden=0)
    finally:
        torch.set_num_threads(before)


def test_working_memory_is_in_fp32_whatever_the_default_is():
    model = tiny_model(NATIVE, torch.bfloat16)
    torch.set_default_dtype(torch.bfloat16)
    try:
        check_steps(NATIVE, model, length=5, hidden=0)
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
    def fail(*_):
        raise RuntimeError("no C++ compiler found\n\nand a page of what it said")

    monkeypatch.setattr(cpp_step, "load_file", fail)
    said = []
    monkeypatch.setattr(step.logger, "warning", said.append)
    logging.warning_once.cache_clear()
    one, other, ids = tiny_model(NATIVE), tiny_model(NATIVE), random_ids(1, 5)
    for model in (one, one, other):
        assert static(model, ids, max_new_tokens=3).equal(dynamic(model, ids, max_new_tokens=3))
    assert said and len(said) == len(set(said)) and all(text.endswith(": no C++ compiler found") for text in said)


def test_texts_in_several_threads_are_those_of_one():
    model = tiny_model(NATIVE)
    prompts = [random_ids(1, 4 + seed, seed=seed) for seed in range(4)]
    expected = [dynamic(model, ids, max_new_tokens=20) for ids in prompts]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ids: static(model, ids, max_new_tokens=20), prompts * 3))
    assert all(one.equal(other) for one, other in zip(found, expected * 3, strict=True))


@pytest.fixture
def prompts(monkeypatch) -> list[tuple[int, int]]:
    """Records the prompts that the function prefills; it may prefill in any precision."""
    taken = []
    prompt = CppStep.prompt

    def recorded(self, input_ids, *rest):
        logits = prompt(self, input_ids, *rest)
        if logits is not None:
            taken.append(tuple(input_ids.shape))
        return logits

    monkeypatch.setattr(CppStep, "prompt", recorded)
    monkeypatch.setattr(cpp_step, "MAX_PROMPT_LINES", 512)
    with engine_settings.override(ways={"short prompt": "C++"}):
        yield taken


@torch.no_grad()
def check_prompt(model, rows: int, tokens: int, hidden: int = 0, before: int = 0) -> None:
    """Checks the last logits and the cache of a prompt that follows `before` cached tokens."""
    step = CppStep(DecodingStep(model), rows)
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
    # in half precision the modules round after every map; the test against fp64 below is stricter
    tolerance = TOLERANCE[model.dtype] * (1 if model.dtype == torch.float32 else 5)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * expected.abs().max().item())
    seen = mask[:, None, :, None].bool()
    for our_layer, their_layer in zip(ours.layers, theirs.layers, strict=True):
        assert int(our_layer.cumulative_length) == int(their_layer.cumulative_length) == before + tokens
        for name in ("keys", "values"):
            a, b = (getattr(layer, name)[:, :, : before + tokens] * seen for layer in (our_layer, their_layer))
            torch.testing.assert_close(a, b, rtol=0, atol=tolerance * b.abs().max().item())
    # the next decode step continues from it
    token = random_ids(rows, 1, seed=5)
    mask = torch.cat((mask, mask.new_ones(rows, 1)), 1)
    expected = model(
        token, past_key_values=theirs, use_cache=True, attention_mask=mask, position_ids=mask.sum(-1, keepdim=True) - 1
    ).logits
    assert step.begin(ours, mask, mask.sum(-1, keepdim=True) - 1)
    torch.testing.assert_close(step.logits(token), expected, rtol=0, atol=tolerance * expected.abs().max().item())


def take(before: str, monkeypatch, *defines: str) -> None:
    """The function with these lines before its own."""
    library = build.load(before + (build.HERE / "step.cpp").read_text("utf-8"), *defines)
    monkeypatch.setattr(cpp_step, "load_file", lambda *_: library)


@pytest.mark.skipif("AVX" not in CAPABILITY, reason="not a CPU with AVX2")
@pytest.mark.parametrize("width", WIDTHS)
def test_vectors_of_all_widths(width, monkeypatch):
    monkeypatch.setattr(CppStep, "max_rows", 9)
    lanes = 16 if width.startswith("AVX-512") else 8
    checks = f'#include "vectors.h"\nstatic_assert(LANES == {lanes});\n'
    checks += "#ifndef MULTIPLIES_BF16\n#error\n#endif\n" * width.endswith("bf16")
    ways = ("STREAMS=4", "PREFETCH_LOCALITY=0") if lanes == 16 else ("PREFETCH_LOCALITY=2", "LINES_AHEAD_BYTES=512")
    take(WIDTHS[width] + checks, monkeypatch, *ways)
    for numbers in ("full", "half", "int8"):
        # rows of eight vectors, one, and a rest
        sizes = {"hidden_size": 156, "intermediate_size": 300, "head_dim": 76, "num_hidden_layers": 1}
        model = tiny_model(NATIVE, torch.bfloat16 if numbers == "half" else torch.float32, **sizes)
        if numbers == "int8":
            quantize(model)
        for rows in (1, 2, 7, 9):
            check_steps(NATIVE, model, length=40, hidden=8, rows=rows)
        check_prompt(model, rows=1, tokens=23)
        ids = random_ids(1, 5)
        assert static(model, ids, max_new_tokens=8).equal(dynamic(model, ids, max_new_tokens=8))


@pytest.mark.parametrize("precision", ["full", "half"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_prompts_are_those_of_the_modules(variant, precision):
    dtype = NATIVE.half if precision == "half" else torch.float32
    check_prompt(tiny_model(NATIVE, dtype, **VARIANTS[variant]), rows=1, tokens=15)


@pytest.mark.kernels
@pytest.mark.parametrize("before", [0, 6])
@pytest.mark.parametrize(("rows", "tokens", "hidden"), [(1, 2, 0), (1, 40, 3), (2, 4, 0), (3, 21, 11), (8, 9, 8)])
@pytest.mark.parametrize("cached_bytes", [1, 1 << 18])
def test_prompts_of_all_sizes(rows, tokens, hidden, before, cached_bytes, monkeypatch):
    """Products in tiles of one token and output, and of several, the last ones cut short."""
    take(f"#define CACHED_BYTES {cached_bytes}\n", monkeypatch)
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
        ours = CppStep(DecodingStep(model)).prompt(ids, cache, None, None)
    errors = [float((found.double() - expected).norm() / expected.norm()) for found in (ours, theirs)]
    assert 0 < errors[0] < 1.2 * errors[1], errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts_of_int8_weights(dtype):
    model = tiny_model(NATIVE, dtype, attention_bias=True)
    quantize(model)
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
    """The candidates of prompt lookup are several tokens but no prompt."""
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
    assert prompts == [(rows, 12), (rows, 5)]  # the last prompt token and the new ones


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
    with engine_settings.override(ways={}):
        check(taken=False)
    monkeypatch.setattr(cpp_step, "MAX_PROMPT_LINES", 11)
    check(taken=False)


@pytest.mark.kernels
@pytest.mark.parametrize("numbers", ["full", "half", "int8"])
def test_a_machine_that_chooses_finds_that_both_take_prompts_alike(numbers, measuring, monkeypatch, caplog):
    for reads in ("READS", "LINES_READS"):
        monkeypatch.setattr(cpp_step, reads, {"unasked": ()})  # no more is to be compiled
    model = tiny_model(NATIVE, torch.bfloat16 if numbers == "half" else torch.float32, qk_norm=True)
    if numbers == "int8":
        quantize(model)
    step = CppStep(DecodingStep(model), 2)
    step.takes_prompts(2, 3)
    (times,) = (times for case, times in measured().items() if case.startswith("short prompt"))
    assert {*times} == {"torch", "C++"} and None not in times.values() and not caplog.text
    assert not CppStep(DecodingStep(model)).takes_prompts(2, 3)  # a step is for its number of rows


@pytest.mark.parametrize("rows", [2, 5, 8, 9, 17])
def test_int8_in_half_precision_is_as_near_to_the_truth_as_the_modules(rows, monkeypatch):
    monkeypatch.setattr(CppStep, "max_rows", 17)
    model = tiny_model(NATIVE, torch.bfloat16, hidden_size=160, intermediate_size=320)
    quantize(model)
    truth = tiny_model(NATIVE, hidden_size=160, intermediate_size=320)
    numbers = {name: getattr(of, "dequantize", lambda of=of: of)() for name, of in model.state_dict().items()}
    truth.load_state_dict({name: of.float() for name, of in numbers.items()})
    ids = random_ids(rows, 6)
    with torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=16)
        found = CppStep(DecodingStep(model), rows).prompt(ids, cache, None, None)[:, -1].float()
        exact, by_modules = truth(ids).logits[:, -1], model(ids).logits[:, -1].float()
    assert (found - exact).norm() <= 1.2 * (by_modules - exact).norm() <= 0.1 * exact.norm()


def test_a_prompt_of_ids_that_are_none(prompts):
    model = tiny_model(NATIVE)
    with pytest.raises(ValueError, match="the vocabulary ends at"):
        static(model, torch.tensor([[3, 4, 1000, 5]]), max_new_tokens=3)
    assert not prompts
