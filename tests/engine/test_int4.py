"""torchao's int4 weight-only quantization in the C++ step, against torch's kernel and against fp64."""

import copy
import ctypes

import pytest
import torch
from generating import generated, through_modules
from sanitizers import run_sanitized
from static_steps import NATIVE, check_steps, dynamic, static, tiny_model
from transformers import StaticCache
from vector_widths import CAPABILITY, WIDTHS

from hf_decoder.engine import int4
from hf_decoder.engine import settings as engine_settings
from hf_decoder.engine.calibration import measured, taken
from hf_decoder.engine.cpp import build
from hf_decoder.engine.decoding.cpp_step import CppStep, is_for_cpp
from hf_decoder.engine.decoding.step import DecodingStep

IN_BLOCKS = pytest.mark.skipif(int4.outputs_of_block() is None, reason="torch packs in another order here")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_key_value_heads": 2}
HARNESS = """
#include "int4.h"
template <class T> static void all(const uint8_t *codes, const T *scales, const float *x, float *y, const int64_t *n) {
    const Int4<T> weights{codes, scales, n[0], n[1], n[2]};
    int4_products(weights, n[3], x, n[4], n[5], n[6],
                  [&](int64_t line, int64_t output, float sum) { y[line * n[1] + output] += sum; });
}
extern "C" void products(const uint8_t *codes, const void *scales, const float *x, float *y, const int64_t *n,
                         int half) {
    if (half)
        all(codes, (const bfloat16 *)scales, x, y, n);
    else
        all(codes, (const float *)scales, x, y, n);
}
"""


def quantize(module: torch.nn.Module, group: int = 32, **settings) -> None:
    """To int4, in place."""
    prototype = pytest.importorskip("torchao.prototype.quantization.int4")
    torchao = pytest.importorskip("torchao.quantization")
    config = prototype.PrototypeInt4WeightOnlyConfig(group_size=group, set_inductor_config=False, **settings)
    torchao.quantize_(module, config)


def quantized(dtype=torch.float32, group: int = 32, **overrides):
    model = tiny_model(NATIVE, dtype, **SIZES | overrides)
    quantize(model.model, group)
    return model


def packed(codes: torch.Tensor, block: int) -> torch.Tensor:
    low, high = codes.view(-1, 2, block // 2, codes.shape[1]).unbind(1)
    return (low | high << 4).mT.contiguous().to(torch.uint8)


def multiplied(library, block: int, group: int, rows: int, width: int, lines: int, dtype, seed: int):
    """Products in C++ and in fp64, of a range of outputs; others stay 0."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(16, (rows, width), generator=generator)
    scales = torch.randn(width // group, rows, 2, generator=generator).to(dtype)
    x = torch.randn(lines, width, generator=generator)
    first, last = sorted(torch.randint(rows + 1, (2,), generator=generator).tolist())
    found = torch.zeros(lines, rows)
    sizes = torch.tensor([group, rows, width, block, lines, first, last])
    held = (packed(codes, block), scales, x, found, sizes)
    library.products(*(ctypes.c_void_p(of.data_ptr()) for of in held), int(dtype == torch.bfloat16))
    scale, zero = (of.T.repeat_interleave(group, 1) for of in scales.double().unbind(-1))
    expected = x.double() @ ((codes - 8) * scale + zero).T
    expected[:, :first] = expected[:, last:] = 0
    return found, expected


@pytest.mark.kernels
@pytest.mark.skipif("AVX" not in CAPABILITY, reason="not a CPU with AVX2")
@pytest.mark.parametrize("width", ["native", *WIDTHS])
@pytest.mark.parametrize("block", int4.BLOCKS)
def test_products_are_those_of_the_numbers(block, width):
    asked = () if width == "native" else ("PREFETCH_LOCALITY=2",)
    library = build.load(WIDTHS.get(width, "") + HARNESS, *asked)
    generator = torch.Generator().manual_seed(block)
    for seed in range(250):
        group = 2 ** int(torch.randint(3, 8, (), generator=generator))
        rows, columns, lines = (int(torch.randint(1, top, (), generator=generator)) for top in (5, 9, 12))
        dtype = (torch.float32, torch.bfloat16)[seed % 2]
        found, expected = multiplied(library, block, group, rows * block, columns * group, lines, dtype, seed)
        torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5 * float(expected.abs().max() + 1))


@pytest.mark.kernels
def test_memory_is_touched_where_it_may_be(tmp_path):
    main = """
int main() {
    for (int64_t block : {32, 64})
        for (int64_t lines : {1, 2, 5})
            for (int64_t group : {8, 32}) {
                const int64_t outputs = 2 * block, inputs = 3 * group;
                std::vector<uint8_t> codes(outputs * inputs / 2, 0x5a);
                std::vector<float> scales(outputs * inputs / group * 2, 1.0f), x(lines * inputs, 1.0f);
                std::vector<float> y(lines * outputs);
                const int64_t sizes[] = {group, outputs, inputs, block, lines, 16, outputs};
                products(codes.data(), scales.data(), x.data(), y.data(), sizes, 0);
            }
}
"""
    run_sanitized(HARNESS + main, tmp_path)


@IN_BLOCKS
@pytest.mark.parametrize("group", [32, 64, 128])
def test_steps_are_those_of_torchs_kernel(group):
    model = quantized(torch.float32, group, attention_bias=True, mlp_bias=True)
    assert is_for_cpp(DecodingStep(model))
    for rows in (1, 3, CppStep.max_rows):
        check_steps(NATIVE, model, length=9, hidden=2, rows=rows)


def exactly(model):
    """What was quantized, computed with in fp32."""
    exact = copy.deepcopy(model)
    for module in exact.modules():
        weights = int4.int4_weights(module.weight, None) if type(module) is torch.nn.Linear else None
        if weights is not None:
            ones = torch.eye(module.in_features)
            plain = int4.int4_linear(ones, weights._replace(scales=weights.scales.float()))
            module.weight = torch.nn.Parameter(plain.T.contiguous())
    return exact.float()


@IN_BLOCKS
@torch.no_grad()
def test_steps_in_half_precision_are_as_near_to_the_truth_as_torchs_kernel():
    model = quantized(torch.bfloat16, attention_bias=True)
    assert is_for_cpp(DecodingStep(model))
    ids = torch.arange(3, 12)[None]
    tokens, truth = through_modules(exactly(model), ids)
    forced = {"prefix_allowed_tokens_fn": lambda row, seen: [int(tokens[row, len(seen)])]}
    found = generated(model, ids, cache_implementation="static", **forced)[1], through_modules(model, ids, **forced)[1]
    ours, theirs = (float((logits.float() - truth).square().mean().sqrt()) for logits in found)
    assert 0 < ours <= 1.1 * theirs


@IN_BLOCKS
@pytest.mark.parametrize("layers", [True, False])
def test_a_quantized_head(layers):
    model = tiny_model(NATIVE, **SIZES, vocab_size=256, tie_word_embeddings=False)
    quantize(model if layers else model.lm_head)
    assert type(DecodingStep(model).head) is int4.Int4Weights
    check_steps(NATIVE, model, length=9, hidden=2)


@IN_BLOCKS
@pytest.mark.parametrize("threads", [1, 3])
def test_plain_generate_takes_the_step(threads, monkeypatch):
    model = quantized()
    ids, taken = torch.arange(3, 12)[None], []
    run = CppStep._call
    monkeypatch.setattr(CppStep, "_call", lambda self, *of, **more: taken.append(1) or run(self, *of, **more))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with engine_settings.override(ways={"growing cache": "C++", "short prompt": "C++"}):
            for way in (static, dynamic):
                found = way(model, ids, max_new_tokens=12)
                assert len(taken) == 12
                taken.clear()
                with engine_settings.override(all=False):
                    assert torch.equal(found, way(model, ids, max_new_tokens=12))
                assert not taken
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "why", ["an order that is unknown", "rows that are no whole block", "activations too", "pre-scaled"]
)
def test_what_the_step_does_not_hold_goes_torchs_way(why, monkeypatch):
    sizes = {}
    if why == "an order that is unknown":
        monkeypatch.setattr(int4, "outputs_of_block", lambda: None)
    if why == "rows that are no whole block":
        sizes = {"intermediate_size": 272}
    model = tiny_model(NATIVE, **SIZES | sizes)
    quantize(model.model.layers[0].mlp.gate_proj)
    weight = model.model.layers[0].mlp.gate_proj.weight
    if why == "activations too":
        weight.act_mapping_type = "symmetric"
    if why == "pre-scaled":
        weight.act_pre_scale = torch.full((1,), 2.0)
    step = DecodingStep(model)
    assert not is_for_cpp(step)
    if why == "activations too":  # a kernel of torchao's own, of weights in another order
        return
    ids = torch.arange(3, 12)[None]
    found = static(model, ids, max_new_tokens=6)
    with engine_settings.override(all=False):
        assert torch.equal(found, static(model, ids, max_new_tokens=6))


def test_torch_packs_in_an_order_that_is_known():
    if CAPABILITY in ("AVX2", "AVX512"):
        assert int4.outputs_of_block() in int4.BLOCKS


@IN_BLOCKS
@pytest.mark.parametrize("way", int4.WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 70])
def test_both_ways_are_the_product_that_torchao_computes(dtype, rows, way):
    linear = torch.nn.Linear(128, 192).to(dtype)
    x = torch.randn(rows, 1, 128, dtype=dtype)
    quantize(linear)
    weights = int4.int4_weights(linear.weight, linear.bias)
    assert weights is not None
    expected = linear(x)
    with engine_settings.override(ways={"int4 products": way}):
        found = int4.int4_linear(x, weights)
    if way == "torch" or rows == 1:
        assert torch.equal(found, expected)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@IN_BLOCKS
def test_long_weights_are_unpacked_in_parts(monkeypatch):
    linear = torch.nn.Linear(128, 448)
    quantize(linear)
    x = torch.randn(9, 128)
    monkeypatch.setattr(int4, "PART_ELEMENTS", 128 * 150)
    with engine_settings.override(ways={"int4 products": "unpacked"}):
        found = int4.int4_linear(x, int4.int4_weights(linear.weight, linear.bias))
    torch.testing.assert_close(found, linear(x), rtol=0, atol=1e-5)


@torch.no_grad()
def test_no_rows_at_all():
    linear = torch.nn.Linear(128, 64)
    quantize(linear)
    weights = int4.int4_weights(linear.weight, linear.bias)
    assert int4.int4_linear(torch.zeros(0, 5, 128), weights).shape == (0, 5, 64)


def test_a_weight_that_comes_and_goes_leaves_no_step_behind():
    """What the step of a model is found by is held: an id that is free could come again."""
    model, ids = quantized(), torch.arange(3, 12)[None]
    projection = model.model.layers[0].mlp.up_proj
    for seed in range(8):
        torch.manual_seed(seed)
        projection.weight = torch.nn.Parameter(torch.randn(256, 128), requires_grad=False)
        quantize(projection)
        found = generated(model, ids, cache_implementation="static")[1]
        with engine_settings.override(all=False):
            expected = generated(model, ids, cache_implementation="static")[1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@torch.no_grad()
def test_modules_take_them_too():
    model, ids = quantized(), torch.arange(3, 99)[None] % 60
    with engine_settings.override(ways={"int4 products": "unpacked"}):
        found = model(ids, labels=ids)
        taken["int4 products"] = ""
        model(ids)
        assert taken["int4 products"] == "unpacked"
    with engine_settings.override(all=False):
        expected = model(ids, labels=ids)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-4)


@IN_BLOCKS
@pytest.mark.kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_prompts(dtype, measuring):
    """A step in C++ and one in torch give the same logits of a prompt, and the faster one takes it."""
    model, ids = quantized(dtype), torch.arange(3, 60)[None]
    step = CppStep(DecodingStep(model))
    with torch.no_grad():
        found = step.prompt(ids, StaticCache(config=model.config, max_cache_len=80), None, None)
        theirs = through_modules(model, ids, max_new_tokens=1)[1]
        truth = through_modules(exactly(model), ids, max_new_tokens=1)[1]
    errors = [float((logits.float() - truth).norm() / truth.norm()) for logits in (found, theirs)]
    assert errors[0] < 5e-5 + 1.2 * errors[1], errors
    with engine_settings.override(ways={}):
        assert not step.takes_prompts(1, 57)
    step.takes_prompts(1, 57)
    (times,) = (times for case, times in measured().items() if case.startswith("short prompt"))
    assert {*times} == {"torch", "C++"} and None not in times.values()


@IN_BLOCKS
@pytest.mark.kernels
def test_the_ways_agree_where_they_are_measured(measuring, caplog):
    linear = torch.nn.Linear(128, 192)
    quantize(linear)
    int4.int4_linear(torch.randn(9, 128), int4.int4_weights(linear.weight, None))
    (times,) = (times for case, times in measured().items() if case.startswith("int4"))
    assert {*times} == {*int4.WAYS} and None not in times.values() and not caplog.text
