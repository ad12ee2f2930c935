"""Products with packed weights, and their rows as numbers, by compiled C++.

Shapes: M outputs, N inputs.
"""

import ctypes
from functools import cache
from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from hf_decoder.engine.cpp.build import load_file
from hf_decoder.engine.operators import operator, runs_as_written
from hf_decoder.engine.precision import product_dtype
from hf_decoder.engine.quantized.formats import FORMATS, TILE, Format
from hf_decoder.engine.switches import settings


class BlockWeights(NamedTuple):
    """What a linear map multiplies with."""

    blocks: torch.Tensor  # (M', bytes) in tiles
    bias: torch.Tensor | None  # (M,)
    form: Format
    outputs: int
    inputs: int

    def are_whole(self) -> bool:
        """Whether there are as many bytes as C++ will read."""
        shape = -(-self.outputs // TILE) * TILE, self.form.row_bytes(self.inputs)
        blocks = self.blocks
        fits = self.inputs % self.form.columns == 0 and blocks.shape == shape and blocks.dtype == torch.uint8
        return fits and blocks.is_contiguous()


@cache
def obstacle() -> str | None:
    """Why this machine does not multiply packed weights; None where it does."""
    try:
        _library()
    except Exception as error:  # without a compiler, or AVX2
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


@cache
def _library() -> ctypes.CDLL:
    library = load_file("quantized.cpp")
    library.multiply.argtypes = [ctypes.c_int64] + [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 4
    library.unpack.argtypes = [ctypes.c_int64] + [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 3
    library.multiply.restype = library.unpack.restype = None
    return library


def multiply_blocks(x: torch.Tensor, weights: BlockWeights) -> torch.Tensor:
    """x (..., N) -> (..., M), in the type that a product with x has, with a gradient of x alone."""
    bias = weights.bias
    if not settings.kernels:  # torch's product with the same weights as numbers, of inputs that are not rounded
        return linear(x, unpacked_rows(torch.arange(weights.outputs), weights, x.dtype), bias)
    direct = not torch.is_grad_enabled() and runs_as_written()  # an operator takes longer than a small product
    multiply = _compute_product if direct else _multiply
    product = multiply(x.to(product_dtype(x)), weights.blocks, weights.form.kind, weights.outputs)
    return product if bias is None else product + bias.to(product.dtype)


def unpacked_rows(ids: torch.Tensor, weights: BlockWeights, dtype: torch.dtype) -> torch.Tensor:
    """Those rows of the weights (..., N), as numbers.

    Raises:
        IndexError: for a row that is not there.
    """
    return _unpack(ids, weights.blocks, weights.form.kind, weights.outputs, dtype)


def _compute_product(x: torch.Tensor, blocks: torch.Tensor, kind: int, outputs: int) -> torch.Tensor:
    _check(x, BlockWeights(blocks, None, _BY_KIND[kind], outputs, x.shape[-1]))
    rows = x.reshape(-1, x.shape[-1]).float().contiguous()
    y = torch.empty(len(rows), outputs, dtype=torch.float32)
    places = blocks.data_ptr(), rows.data_ptr(), y.data_ptr()
    _library().multiply(kind, *places, len(rows), rows.shape[1], outputs, torch.get_num_threads())
    return y.to(x.dtype).view(*x.shape[:-1], outputs)


def _product_shape(x: torch.Tensor, blocks: torch.Tensor, kind: int, outputs: int) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


def _compute_rows(
    ids: torch.Tensor, blocks: torch.Tensor, kind: int, entries: int, dtype: torch.dtype
) -> torch.Tensor:
    form = _BY_KIND[kind]
    inputs = blocks.shape[1] // form.block_bytes * form.columns
    _check(ids, BlockWeights(blocks, None, form, entries, inputs))
    ids = ids.to(torch.int64).contiguous()
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < entries:
        raise IndexError("index out of range in self")  # as torch's embedding says it
    y = torch.empty(*ids.shape, inputs, dtype=torch.float32)
    _library().unpack(
        kind, blocks.data_ptr(), ids.data_ptr(), y.data_ptr(), ids.numel(), inputs, torch.get_num_threads()
    )
    return y.to(dtype)


def _rows_shape(ids: torch.Tensor, blocks: torch.Tensor, kind: int, entries: int, dtype: torch.dtype) -> torch.Tensor:
    form = _BY_KIND[kind]
    return ids.new_empty(*ids.shape, blocks.shape[1] // form.block_bytes * form.columns, dtype=dtype)


def _check(x: torch.Tensor, weights: BlockWeights) -> None:
    if not (x.is_cpu and weights.blocks.is_cpu):
        raise ValueError("packed GGUF weights stay on a CPU; for other devices load with GgufConfig(dequantize=True)")
    if not weights.are_whole():
        raise ValueError(
            f"packed weights of {list(weights.blocks.shape)} bytes are not {weights.outputs} rows of {weights.inputs}"
        )


def _save(ctx: Any, inputs: tuple, output: torch.Tensor) -> None:
    _, ctx.blocks, ctx.kind, ctx.outputs = inputs


def _gradient(ctx: Any, grad: torch.Tensor) -> tuple:
    rows = _unpack(torch.arange(ctx.outputs), ctx.blocks, ctx.kind, ctx.outputs, grad.dtype)
    return grad @ rows, None, None, None


_BY_KIND = {form.kind: form for form in FORMATS.values()}
_multiply = operator(
    "multiply(Tensor x, Tensor blocks, int kind, int outputs) -> Tensor", _compute_product, _product_shape
)
_unpack = operator(
    "unpack(Tensor ids, Tensor blocks, int kind, int entries, ScalarType dtype) -> Tensor", _compute_rows, _rows_shape
)
torch.library.register_autograd(_multiply, _gradient, setup_context=_save)

__all__ = ["BlockWeights", "multiply_blocks", "obstacle", "unpacked_rows"]
