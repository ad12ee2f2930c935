"""Matrix products within a layer, for types that torch multiplies slowly on this CPU.

Without instructions for half precision, which came with AVX-512 and AMX and which most desktop CPUs lack, oneDNN
leaves its products to a loop of torch's, which takes 5 to 70 times as long as fp32 does. Here their factors become
fp32, part by part, and what comes out is rounded once: as instructions for half precision do it, which add up in fp32
too. torchao's int8 weights, which it multiplies out as a whole before each product, are taken in parts likewise. That
covers whatever calls `linear` or `matmul` within a layer, adapters included.
Shapes: R rows, N inputs, M outputs.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from hf_decoder.engine.assumptions import DTYPES, PLAIN
from hf_decoder.engine.int8 import int8_linear, int8_weights
from hf_decoder.engine.operators import may_call_operators, runs_as_written
from hf_decoder.engine.precision import (
    MIN_HALF_ROWS,
    autocast_dtype,
    fast_dtype,
    linear_in_parts,
    product_dtype,
    row_parts,
)
from hf_decoder.engine.switches import settings
from hf_decoder.engine.training.blocks import as_rows, gradients_of_formula


def needs_fast_products(x: torch.Tensor, reader: nn.Module | None) -> bool:
    """Whether products with x (..., N), and with what is made of it, are slow in torch's own way.

    Args:
        x: what enters.
        reader: one of the linear maps that are called, whose kind of weight stands for all.
    """
    if not settings.training or not x.is_cpu or not (runs_as_written() or may_call_operators()):
        return False
    is_slow = _is_slow(product_dtype(x)) and x.shape[:-1].numel() >= MIN_HALF_ROWS
    return is_slow or int8_weights(getattr(reader, "weight", None), None) is not None


def fast_products(x: torch.Tensor, reader: nn.Module | None) -> AbstractContextManager:
    """While it lasts, such products are formed in the way that is fast here."""
    return FastProducts() if needs_fast_products(x, reader) else nullcontext()


class FastProducts(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        form = _FORMS.get(function)
        product = None if form is None else form(*args, **kwargs)
        return function(*args, **kwargs) if product is None else product


def _linear(input: Any, weight: Any, bias: Any = None) -> torch.Tensor | None:
    """None of what torch is to multiply, or to refuse, itself."""
    if (int8 := int8_weights(weight, bias)) is not None:
        dtype = _common_dtype(input)
        if dtype is None or torch.compiler.is_compiling() or _needs_gradients(input, bias):
            return None
        return int8_linear(input.to(dtype), int8)
    dtype = _common_dtype(input, weight) if bias is None else _common_dtype(input, weight, bias)
    if dtype is None or not _is_slow(dtype) or input.shape[-1:] != weight.shape[1:]:
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


def _is_slow(dtype: torch.dtype) -> bool:
    return fast_dtype(torch.device("cpu"), dtype) != dtype


def _common_dtype(*tensors: torch.Tensor) -> torch.dtype | None:
    """The one type that a CPU is to multiply these plain tensors in; None where there is none."""
    own, casts = tensors[0].dtype, autocast_dtype(tensors[0].device)
    fits = all(
        type(tensor) in PLAIN and tensor.is_cpu and tensor.dtype in DTYPES and (casts or tensor.dtype == own)
        for tensor in tensors
    )
    return (casts or own) if fits else None


def _needs_gradients(*tensors: torch.Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _linear_written_out(dtype: torch.dtype, *tensors: torch.Tensor) -> torch.Tensor:
    """linear(x, weight, bias) of what these are in half precision."""
    return linear(*(tensor.to(dtype).float() for tensor in tensors)).to(dtype)


class _LinearInFp32(torch.autograd.Function):
    """x (..., N) in half precision, weight (M, N) and bias (M,), rounded to it, whose gradients are not."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        if torch.compiler.is_compiling():  # in one piece, for parts would be unrolled
            return _linear_written_out(x.dtype, *((x, weight) if bias is None else (x, weight, bias)))
        return linear_in_parts(x, weight, bias)

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
    for block in row_parts(grads):
        found[block] = torch.mm(grads[block].float(), weight)
    return found


def _grad_of_weight(grads: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """(R, M) and (R, N) in half precision -> (M, N) in fp32."""
    if torch.compiler.is_compiling():
        return torch.mm(grads.t().float(), rows.float())
    found = torch.zeros(grads.shape[1], rows.shape[1])
    for block in row_parts(grads):
        torch.addmm(found, grads[block].float().t(), rows[block].float(), out=found)
    return found


__all__ = ["FastProducts", "fast_products", "needs_fast_products"]
