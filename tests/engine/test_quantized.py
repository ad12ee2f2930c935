"""Products with weights in the blocks of a GGUF file, against the numbers that the package gguf makes of them."""

import ctypes
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_decoder.engine.cpp import build
from hf_decoder.engine.quantized import products
from hf_decoder.engine.quantized.formats import FORMATS, tiled
from hf_decoder.engine.quantized.products import BlockWeights, multiply_blocks, unpacked_rows
from hf_decoder.engine.switches import settings as switches

pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'hf-decoder[gguf]'")
from gguf_blocks import numbers, random_rows

needs_kernels = pytest.mark.usefixtures("packed_kernels")
each_format = pytest.mark.parametrize("name", FORMATS)
BLOCK = 32  # numbers of a line that share a scale

# what a CPU with VNNI does in one instruction, spelt out
FOUR_PRODUCTS = """
#include <immintrin.h>
static inline __m256i four_products(__m256i sums, __m256i codes, __m256i numbers) {
    unsigned char a[32];
    signed char b[32];
    int y[8];
    _mm256_storeu_si256((__m256i *)a, codes);
    _mm256_storeu_si256((__m256i *)b, numbers);
    _mm256_storeu_si256((__m256i *)y, sums);
    for (int i = 0; i < 32; i++) y[i / 4] += a[i] * b[i];
    return _mm256_loadu_si256((const __m256i *)y);
}
#define FOUR_PRODUCTS four_products
"""


def weights(name: str, outputs: int, blocks: int, **kwargs: Any) -> tuple[BlockWeights, torch.Tensor]:
    """Packed ones, and as numbers (outputs, inputs)."""
    form, inputs = FORMATS[name], FORMATS[name].columns * blocks
    rows = random_rows(name, outputs, inputs, **kwargs)
    return BlockWeights(tiled(rows, form), None, form, outputs, inputs), numbers(name, rows)


def whole_numbers(lines: int, inputs: int, seed: int = 0) -> torch.Tensor:
    """What eight bits hold exactly: whole numbers to 127, which is the largest of each block."""
    x = torch.randint(-127, 128, (lines, inputs), generator=torch.Generator().manual_seed(seed)).float()
    x[:, ::BLOCK] = 127
    return x


@needs_kernels
@each_format
def test_rows_are_the_numbers_of_the_package(name):
    packed, dense = weights(name, 13, 2)
    ids = torch.tensor([[12, 0], [5, 5]])
    torch.testing.assert_close(unpacked_rows(ids, packed, torch.float32), dense[ids], rtol=1e-6, atol=1e-6)
    for row in (13, -1):
        with pytest.raises(IndexError):
            unpacked_rows(torch.tensor([row]), packed, torch.float32)


@needs_kernels
@each_format
@pytest.mark.parametrize("lines", [1, 2, 3, 4, 5, 8, 33])
def test_products_of_whole_numbers_are_exact(name, lines):
    packed, dense = weights(name, 21, 2 if name.endswith("_0") else 1, scale=2.0**-6)
    x = whole_numbers(lines, packed.inputs)
    assert multiply_blocks(x, packed).double().equal(x.double() @ dense.double().T)


@needs_kernels
@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(sorted(FORMATS)),
    lines=st.integers(1, 33),
    outputs=st.integers(1, 70),
    blocks=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_products_are_as_near_as_eight_bits_are(name, lines, outputs, blocks, seed):
    packed, dense = weights(name, outputs, blocks, seed=seed)
    x = torch.randn(lines, packed.inputs, generator=torch.Generator().manual_seed(seed), dtype=torch.float32) * 10
    half_steps = x.view(lines, -1, BLOCK).abs().amax(-1) / 127 / 2
    sizes = dense.abs().double()
    room = half_steps.double() @ sizes.view(outputs, -1, BLOCK).sum(-1).T + 1e-5 * (x.abs().double() @ sizes.T)
    assert ((multiply_blocks(x, packed) - x.double() @ dense.double().T).abs() <= room).all()


@needs_kernels
@each_format
def test_what_is_no_number_reaches_its_own_line_alone(name):
    packed, _ = weights(name, 9, 1)
    x = whole_numbers(6, packed.inputs)
    clean = multiply_blocks(x, packed)
    x[1, 3], x[4, 7] = float("nan"), float("-inf")
    found = multiply_blocks(x, packed)
    assert found[[1, 4]].isnan().all() and found[[0, 2, 3, 5]].equal(clean[[0, 2, 3, 5]])
    assert multiply_blocks(torch.zeros(2, packed.inputs), packed).eq(0).all()


@needs_kernels
@each_format
def test_instructions_of_newer_cpus_give_the_same(name):
    library = build.load(FOUR_PRODUCTS + (build.HERE / "quantized.cpp").read_text("utf-8"))
    library.multiply.argtypes = [ctypes.c_int64] + [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 4
    packed, _ = weights(name, 21, 2)
    x = torch.randn(6, packed.inputs)
    y = torch.empty(6, 21)
    places = packed.blocks.data_ptr(), x.data_ptr(), y.data_ptr()
    library.multiply(packed.form.kind, *places, 6, packed.inputs, 21, 2)
    torch.testing.assert_close(y, multiply_blocks(x, packed), rtol=1e-6, atol=1e-5)


@needs_kernels
def test_the_gradient_is_that_of_the_numbers():
    packed, dense = weights("Q4_K", 13, 1)
    packed = packed._replace(bias=torch.randn(13, requires_grad=True))
    x = whole_numbers(5, packed.inputs).requires_grad_()
    grad = torch.randn(5, 13)
    multiply_blocks(x, packed).backward(grad)
    torch.testing.assert_close(x.grad, grad @ dense, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(packed.bias.grad, grad.sum(0))


@needs_kernels
def test_without_kernels_the_product_is_that_of_the_numbers():
    packed, dense = weights("Q5_K", 13, 1)
    packed = packed._replace(bias=torch.randn(13))
    x = torch.randn(5, packed.inputs)
    expected = torch.nn.functional.linear(x, dense, packed.bias)
    with switches.override(kernels=False):
        torch.testing.assert_close(multiply_blocks(x, packed), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(multiply_blocks(x, packed), expected, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_sizes_that_do_not_fit_are_refused():
    packed, _ = weights("Q8_0", 9, 2)
    for width in (32, 65, 96):
        with pytest.raises(ValueError, match=f"are not 9 rows of {width}"):
            multiply_blocks(torch.randn(2, width), packed)
    assert multiply_blocks(torch.randn(0, packed.inputs), packed).shape == (0, 9)


@needs_kernels
def test_a_compiled_graph_calls_the_product_whole():
    packed, _ = weights("Q4_0", 9, 2)
    x = torch.randn(3, packed.inputs)
    compiled = torch.compile(lambda x: multiply_blocks(x, packed), backend="aot_eager", fullgraph=True)
    assert compiled(x).equal(multiply_blocks(x, packed))


def test_the_reason_is_told_where_there_is_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    for cached in (build.load_file, products._library, products.obstacle):
        cached.cache_clear()
    try:
        assert products.obstacle() == "no C++ compiler was found; install g++, or set CXX"
    finally:
        for cached in (build.load_file, products._library, products.obstacle):
            cached.cache_clear()
