"""Products of matrices in half precision, on CPUs that have none.

Without instructions for it, which came with AVX-512 and AMX and which most desktop CPUs lack, oneDNN leaves such
products to a loop of torch's, which takes 5 to 70 times as long as fp32 does. Here their factors become fp32, part
by part, so that the copies stay in the caches, and what comes out is rounded once: as instructions for half precision
do it, which add up in fp32 too. That covers whatever calls `linear` or `matmul` within a layer, adapters included.
Shapes: R rows, N inputs, M outputs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from .blocks_hf_decoder import DTYPES, PLAIN, as_rows, gradients_of_formula
from .int8_hf_decoder import int8_weights
from .operators_hf_decoder import may_call_operators, runs_as_written

# what this CPU multiplies in half precision faster than number by number; elsewhere oneDNN has no products of it
FAST_HALF_PRECISION = {
    torch.bfloat16: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
MIN_ROWS = 8  # of fewer, torch's loop is as fast, which reads the weights as they are
MAX_TRANSPOSED_ROWS = 128  # up to so many, MKL multiplies the weight by the rows faster than the rows by the weight
BLOCK_ELEMENTS = 2**20  # of a weight: 4 MiB of fp32
BLOCK_ROWS = 512


def fast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """In which a device multiplies matrices of `dtype`: fp32 in place of what a CPU multiplies number by number."""
    return torch.float32 if device.type == "cpu" and _is_slow(dtype) else dtype


def _is_slow(dtype: torch.dtype) -> bool:
    return not FAST_HALF_PRECISION.get(dtype, True)


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """In which x is multiplied: autocast's, where it is on."""
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def fast_products(x: torch.Tensor) -> AbstractContextManager:
    """While it lasts, products of x (..., N) and what is made of it are formed in fp32, if this CPU needs that."""
    if (
        x.is_cpu
        and _is_slow(product_dtype(x))
        and x.shape[:-1].numel() >= MIN_ROWS
        and (runs_as_written() or may_call_operators())
    ):
        return _ProductsInFp32()
    return nullcontext()


class _ProductsInFp32(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        form = _FORMS.get(function)
        product = None if form is None else form(*args, **kwargs)
        return function(*args, **kwargs) if product is None else product


def _linear(input: Any, weight: Any, bias: Any = None) -> torch.Tensor | None:
    """None of what torch is to multiply, or to refuse, itself."""
    tensors = [input, weight] if bias is None else [input, weight, bias]
    if (int8 := int8_weights(weight, bias)) is not None:
        dtype = _common_dtype(input)
        if dtype is None or torch.compiler.is_compiling() or _needs_gradients(input, bias):
            return None
        return linear_in_fp32(input.to(dtype), int8.values, bias, int8.scales)
    dtype = _common_dtype(*tensors)
    if dtype is None or input.shape[-1:] != weight.shape[1:]:
        return None
    with torch.autocast("cpu", enabled=False):
        return _LinearInFp32.apply(input.to(dtype), weight, bias)


def _matmul(input: Any, other: Any, **kwargs: Any) -> torch.Tensor | None:
    dtype = _common_dtype(input, other)
    if dtype is None or kwargs:
        return None
    with torch.autocast("cpu", enabled=False):
        return torch.matmul(input.to(dtype).float(), other.to(dtype).float()).to(dtype)


def _common_dtype(*tensors: torch.Tensor) -> torch.dtype | None:
    """The half precision in which a CPU is to multiply these, slowly; None where it is not."""
    is_autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if is_autocast else tensors[0].dtype
    takes = all(
        type(tensor) in PLAIN and tensor.is_cpu and (tensor.dtype == dtype or (is_autocast and tensor.dtype in DTYPES))
        for tensor in tensors
    )
    return dtype if takes and _is_slow(dtype) else None


def _needs_gradients(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


_FORMS: dict[Callable, Callable[..., torch.Tensor | None]] = {
    linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
}


def _linear_written_out(dtype: torch.dtype, *tensors: torch.Tensor) -> torch.Tensor:
    """linear(x, weight, bias) of what these are in half precision."""
    return linear(*(tensor.to(dtype).float() for tensor in tensors)).to(dtype)


def linear_in_fp32(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """x (..., N) times weight (M, N), rounded to x's dtype, in which it is taken, and int8 as it is -> (..., M).

    Args:
        x: in half precision.
        weight: of any floating-point dtype, or int8.
        bias: (M,).
        scales: (M, 1), which the outputs are multiplied by.
    """
    rows = as_rows(x)
    count, inputs = rows.shape
    outputs = weight.shape[0]
    result = rows.new_empty(count, outputs)
    block_rows, block_outputs = min(count, BLOCK_ROWS), min(outputs, max(1, BLOCK_ELEMENTS // inputs))
    row_buffer, weight_buffer = (torch.empty(size, inputs) for size in (block_rows, block_outputs))
    product_buffer = torch.empty(block_rows * block_outputs)
    for first in range(0, outputs, block_outputs):
        part = slice(first, first + block_outputs)
        of_weight = weight[part] if scales is not None else weight[part].to(x.dtype)
        of_weight = weight_buffer[: len(of_weight)].copy_(of_weight)
        for block in _row_blocks(rows):
            if first == 0 or block_rows < count:
                of_rows = row_buffer[: len(rows[block])].copy_(rows[block])
            shape = (len(of_weight), len(of_rows))
            if count <= MAX_TRANSPOSED_ROWS:
                product = product_buffer[: shape[0] * shape[1]].view(shape)
                product = torch.mm(of_weight, of_rows.t(), out=product).t()
            else:
                product = product_buffer[: shape[0] * shape[1]].view(shape[::-1])
                torch.mm(of_rows, of_weight.t(), out=product)
            if scales is not None:
                product *= scales[part].view(-1)
            if bias is not None:
                product += bias[part].to(x.dtype)
            result[block, part] = product
    return result.view(*x.shape[:-1], outputs)


class _LinearInFp32(torch.autograd.Function):
    """x (..., N) in half precision, weight (M, N) and bias (M,), rounded to it, whose gradients are not."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        if torch.compiler.is_compiling():  # in one piece, for parts would be unrolled
            return _linear_written_out(x.dtype, *((x, weight) if bias is None else (x, weight, bias)))
        return linear_in_fp32(x, weight, bias)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, bias = ctx.saved_tensors
        needs = ctx.needs_input_grad
        with torch.autocast("cpu", enabled=False):  # a compiler traces this with the forward pass's autocast
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                inputs = (x, weight) if bias is None else (x, weight, bias)
                found = gradients_of_formula(
                    lambda *inputs: _linear_written_out(x.dtype, *inputs), inputs, needs[: len(inputs)], grad_output
                )
                return (*found, None)[:3]
            rows, grads = as_rows(x), as_rows(grad_output)
            grad_x = _grad_of_rows(grads, weight.to(x.dtype).float()).view(x.shape) if needs[0] else None
            grad_weight = _grad_of_weight(grads, rows).to(weight.dtype) if needs[1] else None
            grad_bias = grads.sum(0, dtype=torch.float32).to(bias.dtype) if needs[2] else None
        return grad_x, grad_weight, grad_bias


def _grad_of_rows(grads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(R, M) in half precision, (M, N) in fp32 -> (R, N), in half precision."""
    if torch.compiler.is_compiling():
        return torch.mm(grads.float(), weight).to(grads.dtype)
    found = grads.new_empty(len(grads), weight.shape[1])
    for block in _row_blocks(grads):
        found[block] = torch.mm(grads[block].float(), weight)
    return found


def _grad_of_weight(grads: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(R, M) and (R, N) in half precision -> (M, N) in fp32."""
    if torch.compiler.is_compiling():
        return torch.mm(grads.t().float(), rows.float())
    found = torch.zeros(grads.shape[1], rows.shape[1])
    for block in _row_blocks(grads):
        torch.addmm(found, grads[block].float().t(), rows[block].float(), out=found)
    return found


def _row_blocks(rows: torch.Tensor) -> list[slice]:
    return [slice(start, start + BLOCK_ROWS) for start in range(0, len(rows), BLOCK_ROWS)]


__all__ = [
    "FAST_HALF_PRECISION",
    "MIN_ROWS",
    "fast_dtype",
    "fast_products",
    "linear_in_fp32",
    "product_dtype",
]
