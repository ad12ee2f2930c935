"""Long tensors in blocks of rows that stay in a CPU's caches.

What stands between the matrix products of a training step (norms, rotations, gates, casts) is a dozen passes through
the memory, and fresh pages for each, when it is written tensor by tensor. Done block by block, each tensor is read and
written once. The modules that do so ask here whether it pays and is allowed.
"""

import torch
from torch import nn

BLOCK_ELEMENTS = 2**18
MIN_BLOCKED_ELEMENTS = 2**19  # fewer stay in the caches anyhow


def is_for_blocks(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether x is long enough, all are plain floating-point tensors on a CPU, and nothing looks inside a function."""
    return (
        not torch.compiler.is_compiling()
        and x.numel() >= MIN_BLOCKED_ELEMENTS
        and all(_is_plain(tensor) for tensor in (x, *others))
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
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


__all__ = ["blocks", "is_for_blocks"]
