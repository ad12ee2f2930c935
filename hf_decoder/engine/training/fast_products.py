"""Matrix products within a layer, where torch forms them slowly on this CPU.

In fp32 oneDNN may be faster than MKL, which torch asks. Most desktop CPUs lack instructions for half precision
(AVX-512, AMX), and there torch multiplies in a loop that takes 5 to 70 times as long as fp32. Here the factors become
fp32 part by part and the result is rounded once, as those instructions do. torchao's int8 weights, which torchao
dequantizes as a whole for each product, are taken in parts too, and so are its int4 weights where torch's kernel for
them is slow. This covers every call of `linear` within the linear maps of a layer, adapters included, and where layers
run as modules every call of `linear`, and of `matmul` in half precision, within a layer.
Shapes: R rows, N inputs, M outputs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from hf_decoder.engine.assumptions import DTYPES, PLAIN
from hf_decoder.engine.int4 import int4_linear, int4_weights
from hf_decoder.engine.int8 import Int8Weights, int8_linear, int8_weights
from hf_decoder.engine.operators import may_call_operators, runs_as_written, runs_unseen
from hf_decoder.engine.precision import (
    MIN_HALF_ROWS,
    autocast_dtype,
    fast_dtype,
    linear_in_parts,
    product_dtype,
    row_parts,
)
from hf_decoder.engine.single_precision import (
    MIN_ROWS,
    ONEDNN,
    by_onednn,
    multiply_rows,
    multiply_transposed,
    way_of_rows,
)
from hf_decoder.engine.switches import settings
from hf_decoder.engine.training.kernels import applied, as_rows, gradients_of_formula
from hf_decoder.model.loss_hf_decoder import is_plain_linear


def needs_fast_products(x: torch.Tensor, reader: nn.Module | None) -> bool:
    """Whether torch is slow at products with x (..., N) and its results.

    Args:
        x: the input.
        reader: one of the linear layers that are called; all have its kind of weight.
    """
    if not settings.training or not x.is_cpu:
        return False
    dtype, weight = product_dtype(x), getattr(reader, "weight", None)
    # every layer asks, if the call has no route
    if weight is not None and dtype == torch.float32 and type(weight) in PLAIN:
        return _is_by_onednn(x, weight)
    if not (runs_as_written() or may_call_operators()):
        return False
    rows = x.shape[:-1].numel()
    if _is_slow(dtype) and rows >= MIN_HALF_ROWS:
        return True
    if not runs_as_written():  # products of quantized weights are torchao's own in a graph
        return False
    return int8_weights(weight, None) is not None or (rows > 1 and int4_weights(weight, None) is not None)


def fast_products(x: torch.Tensor, reader: nn.Module | None) -> AbstractContextManager:
    """A context in which such products are fast, where they need it."""
    return FastProducts() if needs_fast_products(x, reader) else nullcontext()


def fast_map(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The linear map, whose products are fast. A mode around the call of one of torch's own would cost 0.1 ms."""
    return partial(_plain_map, module) if is_plain_linear(module) else partial(_within_mode, module)


def _plain_map(module: Any, x: torch.Tensor) -> torch.Tensor:
    product = _linear(x, module.weight, module.bias)
    return linear(x, module.weight, module.bias) if product is None else product


def _within_mode(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with fast_products(x, module):
        return module(x)


class FastProducts(TorchFunctionMode):
    """Replaces `linear` and `matmul` by the forms below."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        form = _FORMS.get(function)
        product = None if form is None else form(*args, **kwargs)
        return function(*args, **kwargs) if product is None else product


def _linear(input: Any, weight: Any, bias: Any = None) -> torch.Tensor | None:
    """The product, or None if torch is to compute it, or to refuse it."""
    quantized = None if type(weight) in PLAIN else int8_weights(weight, bias) or int4_weights(weight, bias)
    if quantized is not None:
        if _common_dtype(input) is None or torch.compiler.is_compiling() or _needs_gradients(input, bias):
            return None
        if isinstance(quantized, Int8Weights):
            return int8_linear(input, quantized)
        return int4_linear(input, quantized)
    dtype = _common_dtype(input, weight) if bias is None else _common_dtype(input, weight, bias)
    if dtype is None or input.shape[-1:] != weight.shape[1:]:
        return None
    if dtype == torch.float32:
        is_plain = bias is None or bias.shape == weight.shape[:1]  # torch broadcasts others, or refuses them
        return applied(_LinearInFp32, input, weight, bias) if is_plain and _is_by_onednn(input, weight) else None
    if not _is_slow(dtype):
        return None
    with torch.autocast("cpu", enabled=False):
        return _LinearInFp32.apply(input.to(dtype), weight, bias)


def _matmul(input: Any, other: Any, **kwargs: Any) -> torch.Tensor | None:
    dtype = _common_dtype(input, other)
    if dtype is None or not _is_slow(dtype) or kwargs:
        return None
    with torch.autocast("cpu", enabled=False):
        return torch.matmul(input.to(dtype).float(), other.to(dtype).float()).to(dtype)


_FORMS: dict[Callable, Callable[..., torch.Tensor | None]] = {
    linear: _linear,
    torch.matmul: _matmul,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.__matmul__: _matmul,
}


def _is_by_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether torch forms this product in fp32 more slowly than oneDNN, where that can be used."""
    if not runs_unseen() or weight.ndim != 2 or not weight.is_contiguous():  # a sharded one may be flat, or nothing
        return False
    rows = x.shape[:-1].numel()  # looked at last: an exporter would fix it
    return rows >= MIN_ROWS and way_of_rows(rows, *weight.shape) == ONEDNN


def _is_slow(dtype: torch.dtype) -> bool:
    return fast_dtype(torch.device("cpu"), dtype) != dtype


def _common_dtype(*tensors: torch.Tensor) -> torch.dtype | None:
    """The dtype of a product of these plain CPU tensors; None if there is no common one."""
    own, casts = tensors[0].dtype, autocast_dtype(tensors[0].device)
    fits = all(
        type(tensor) in PLAIN and tensor.is_cpu and tensor.dtype in DTYPES and (casts or tensor.dtype == own)
        for tensor in tensors
    )
    return (casts or own) if fits else None


def _needs_gradients(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _linear_written_out(dtype: torch.dtype, *tensors: torch.Tensor) -> torch.Tensor:
    """linear(x, weight, bias) in fp32, of tensors rounded to half precision."""
    return linear(*(tensor.to(dtype).float() for tensor in tensors)).to(dtype)


class _LinearInFp32(torch.autograd.Function):
    """x (..., N) times weight (M, N), plus bias (M,), in x's dtype; gradients of weight and bias are not rounded."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight, bias)
        if torch.compiler.is_compiling():  # in one piece, because tracing would unroll parts
            return _linear_written_out(x.dtype, *((x, weight) if bias is None else (x, weight, bias)))
        product = by_onednn(x, weight, bias) if x.dtype == torch.float32 else linear_in_parts(x, weight, bias)
        return product.new_empty(0).set_(product)  # no view: a hook may write into it

    @staticmethod
    def backward(ctx, grad_output):
        x, weight, bias = ctx.saved_tensors
        needs, shape = ctx.needs_input_grad, (*grad_output.shape[:-1], weight.shape[1])
        with torch.autocast("cpu", enabled=False):  # a compiler traces this under the autocast of the forward pass
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                if x is None:  # of a frozen weight: whatever it is, its own gradient is the same
                    x = grad_output.new_zeros(shape).requires_grad_()
                inputs = (x, weight) if bias is None else (x, weight, bias)
                found = gradients_of_formula(
                    lambda *inputs: _linear_written_out(x.dtype, *inputs), inputs, needs[: len(inputs)], grad_output
                )
                return (*found, None)[:3]
            grads = as_rows(grad_output)
            grad_x = _grad_of_rows(grads, weight.to(grads.dtype).float()).view(shape) if needs[0] else None
            grad_weight = _grad_of_weight(grads, as_rows(x)).to(weight.dtype) if needs[1] else None
            grad_bias = grads.sum(0, dtype=torch.float32).to(bias.dtype) if needs[2] else None
        return grad_x, grad_weight, grad_bias


def _grad_of_rows(grads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(R, M), (M, N) in fp32 -> (R, N) in the dtype of `grads`."""
    if torch.compiler.is_compiling():
        return torch.mm(grads.float(), weight).to(grads.dtype)
    if grads.dtype == torch.float32:
        return multiply_rows(grads, weight.t())
    found = grads.new_empty(len(grads), weight.shape[1])
    for block in row_parts(grads):
        found[block] = multiply_rows(grads[block].float(), weight.t())
    return found


def _grad_of_weight(grads: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(R, M) and (R, N) -> (M, N) in fp32."""
    if torch.compiler.is_compiling():
        return torch.mm(grads.t().float(), rows.float())
    if grads.dtype == torch.float32:
        return multiply_transposed(grads, rows)
    found = torch.zeros(grads.shape[1], rows.shape[1])
    for block in row_parts(grads):
        torch.addmm(found, grads[block].float().t(), rows[block].float(), out=found)
    return found


__all__ = ["FastProducts", "fast_map", "fast_products", "needs_fast_products"]
