"""Long tensors in blocks of rows that stay in a CPU's caches.

What stands between the matrix products of a training step (norms, rotations, gates, casts) is a dozen passes through
the memory, and fresh pages for each, when it is written tensor by tensor. Done block by block, each tensor is read and
written once. The modules that do so ask here whether it pays and is allowed.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from .operators_hf_decoder import runs_as_written

BLOCK_ELEMENTS = 2**18
MIN_BLOCKED_ELEMENTS = 2**19  # fewer stay in the caches anyhow


def is_for_blocks(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether x is long enough, all are plain floating-point tensors on a CPU, and nothing looks inside a function."""
    return (
        runs_as_written() and x.numel() >= MIN_BLOCKED_ELEMENTS and all(_is_plain(tensor) for tensor in (x, *others))
    )


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (nn.Parameter, torch.Tensor)
        and tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


def blocks(count: int, width: int) -> list[slice]:
    """Of `count` rows of `width` numbers."""
    size = max(1, BLOCK_ELEMENTS // width)
    return [slice(start, start + size) for start in range(0, count, size)]


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., D) -> (N, D)."""
    return x.reshape(-1, x.shape[-1])


def gradients_of_formula(
    formula: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], needs: Sequence[bool], grad: torch.Tensor
) -> list[torch.Tensor | None]:
    """Of the inputs that need one, from the formula written out, so that there is a second derivative."""
    needed = [tensor for tensor, is_needed in zip(inputs, needs, strict=True) if is_needed]
    found = iter(torch.autograd.grad(formula(*inputs), needed, grad, create_graph=True))
    return [next(found) if is_needed else None for is_needed in needs]


__all__ = ["as_rows", "blocks", "gradients_of_formula", "is_for_blocks"]
