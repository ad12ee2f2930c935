"""Calls of cpp/training.cpp: what stands between the matrix products of a training step on a CPU.

The functions are those of triton/training.py, for fp32 and bf16. They refuse shapes that do not go together.
Shapes: N rows, D hidden_size, V vocab_size; B batch, S tokens, H heads, E head_dim, R its rotated part.
"""

import ctypes
import sys
from collections.abc import Sequence
from functools import cache

import torch

from hf_decoder.engine.assumptions import PLAIN
from hf_decoder.engine.cpp.build import Later, is_built, load_file
from hf_decoder.engine.switches import settings

FILE = "training.cpp"
DTYPES = (torch.float32, torch.bfloat16)
P, N, D, B = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_bool
SIGNATURES = {
    "rms_norm": (P, P, P, P, N, N, D, B, B, B, N),
    "rms_norm_gradients": (P, N, P, P, P, P, P, N, N, B, B, B, N),
    "rotate": (P, P, P, P, P, B, B, B),
    "gate": (P, P, P, P, P, N, B, N),
    "cross_entropy": (P, P, P, N, N, N, D, B, B, N),
}


@cache
def _library() -> ctypes.CDLL:
    library = load_file(FILE)
    for name, types in SIGNATURES.items():
        getattr(library, name).argtypes, getattr(library, name).restype = types, None
    return library


_later = Later(_library, "What stands between the products of training")


@cache
def _was_built() -> bool:
    """Whether an earlier process has compiled the library; then all steps of this one go the same way."""
    try:
        return is_built(FILE) and _library() is not None
    except Exception:  # without a compiler; `Later` says why
        return False


def is_ready() -> bool:
    """Whether C++ may be taken at once. The first call begins to compile it, unless this has been done before."""
    return settings.kernels and sys.platform != "win32" and (_was_built() or _later.is_ready())


def takes(*tensors: torch.Tensor, to: torch.dtype | None = None) -> bool:
    """Whether C++ holds such tensors, and results of this dtype."""
    return (to is None or to in DTYPES) and all(type(x) in PLAIN and x.is_cpu and x.dtype in DTYPES for x in tensors)


def _are_half(*tensors: torch.Tensor) -> list[bool]:
    if not takes(*tensors):
        raise TypeError(f"C++ takes fp32 and bf16 on a CPU, not {[(x.dtype, str(x.device)) for x in tensors]}")
    return [x.dtype == torch.bfloat16 for x in tensors]


def _places(*tensors: torch.Tensor | None) -> list[int | None]:
    return [None if x is None else x.data_ptr() for x in tensors]


def _check(fits: bool, *tensors: torch.Tensor) -> None:
    if not fits:
        raise ValueError(f"these shapes do not go together: {[list(x.shape) for x in tensors]}")


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x (..., D) in `dtype` (None: that of the product with the weight), and the fp32 factors (N,)."""
    x, weight, width = x.contiguous(), weight.contiguous(), x.shape[-1]
    _check(weight.shape == (width,), x, weight)
    count = x.shape[:-1].numel()
    output = torch.empty_like(x, dtype=dtype or torch.result_type(weight, x))
    scales = x.new_empty(count, dtype=torch.float32)
    kinds = _are_half(x, weight, output)
    _library().rms_norm(*_places(x, weight, output, scales), count, width, eps, *kinds, torch.get_num_threads())
    return output, scales


def rms_norm_gradients(
    grads: Sequence[torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    for_x: bool,
    for_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x (..., D), and of the weight in fp32, from the sum of the gradients of the output."""
    grads, x, weight = [grad.contiguous() for grad in grads], x.contiguous(), weight.contiguous()
    width, threads = x.shape[-1], torch.get_num_threads()
    _check(all(grad.shape == x.shape and grad.dtype == grads[0].dtype for grad in grads), x, *grads)
    grad_x = torch.empty_like(x) if for_x else None
    parts = x.new_zeros(threads, width, dtype=torch.float32)
    kinds = _are_half(x, weight, *grads)[:3]
    _library().rms_norm_gradients(
        (P * len(grads))(*_places(*grads)), len(grads), *_places(x, weight, scales, grad_x, parts), len(scales),
        width, *kinds, threads,
    )  # fmt: skip
    return grad_x, parts.sum(0) if for_weight else None


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of one shape and dtype."""
    output = torch.empty_like(up, memory_format=torch.contiguous_format)
    _gate(None, gate, up, output, None)
    return output


def gated_silu_gradients(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, for_gate: bool, for_up: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of gate and up."""
    grad_gate, grad_up = (
        torch.empty_like(up, memory_format=torch.contiguous_format) if is_needed else None
        for is_needed in (for_gate, for_up)
    )
    _gate(grad, gate, up, grad_gate, grad_up)
    return grad_gate, grad_up


def _gate(grad: torch.Tensor | None, gate: torch.Tensor, up: torch.Tensor, *outputs: torch.Tensor | None) -> None:
    given = [gate.contiguous(), up.contiguous(), *([] if grad is None else [grad.contiguous()])]
    _check(all(x.shape == up.shape and x.dtype == up.dtype for x in given), *given)
    places = _places(*given, *([None] if grad is None else []), *outputs)
    _library().gate(*places, up.numel(), _are_half(*given)[0], torch.get_num_threads())


def rotated(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    dtypes: Sequence[torch.dtype],
    backwards: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates query (B, H, S, E) and key (B, G, S, E) by cos, sin (B or 1, S, R), or rotates them back.

    The results have layout (B, S, heads, E) and these dtypes.
    """
    cos, sin = cos.contiguous(), sin.contiguous()
    query, key = (_rotated(x, cos, sin, dtype, backwards) for x, dtype in zip((query, key), dtypes, strict=True))
    return query, key


def _rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, backwards: bool
) -> torch.Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    batch, heads, length, width = x.shape
    rows, *_, rotary_dim = cos.shape
    fits = cos.shape == sin.shape == (rows, length, rotary_dim) and rows in (1, batch) and cos.dtype == sin.dtype
    _check(fits and rotary_dim <= width and rotary_dim % 2 == 0, x, cos, sin)
    strides = length * heads * width, width, heads * width, 1
    output = x.new_empty_strided((batch, heads, length, width), strides, dtype=dtype)  # no view: one may write into it
    angle_stride = length * rotary_dim if rows > 1 else 0
    call = batch, heads, length, width, rotary_dim, *x.stride()[:3], angle_stride, backwards, torch.get_num_threads()
    _library().rotate((N * len(call))(*call), *_places(x, cos, sin, output), *_are_half(x, cos, output, sin)[:3])
    return output


def cross_entropy(
    logits: torch.Tensor, targets: torch.Tensor, ignore_index: int, z_loss_coef: float, needs_gradient: bool
) -> torch.Tensor:
    """Losses (N,) in fp32 of contiguous logits (N, V), which become their gradient if needed.

    Raises:
        IndexError: for a target outside of the vocabulary.
    """
    rows, entries = logits.shape
    targets, losses = targets.contiguous(), logits.new_empty(rows, dtype=torch.float32)
    fits = targets.shape == (rows,) and targets.dtype == torch.int64 and targets.is_cpu
    _check(logits.is_contiguous() and fits, logits, targets)
    if not ((targets == ignore_index) | ((targets >= 0) & (targets < entries))).all():
        raise IndexError(f"a target is outside of the vocabulary of {entries} entries")
    _library().cross_entropy(
        *_places(logits, targets, losses), rows, entries, ignore_index, z_loss_coef, needs_gradient,
        *_are_half(logits), torch.get_num_threads(),
    )  # fmt: skip
    return losses


__all__ = [
    "cross_entropy",
    "gated_silu",
    "gated_silu_gradients",
    "is_ready",
    "rms_norm",
    "rms_norm_gradients",
    "rotated",
    "takes",
]
