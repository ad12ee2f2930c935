"""One cast for all linear maps that read the same activation under autocast.

Autocast casts the input of each by itself, and their gradients one by one back again, to be added up in fp32. Here the
cast is made once, and the gradients are added up, in fp32 too, block by block or by one kernel. Where there are
kernels, those of the norm before it do both besides.
"""

from collections.abc import Sequence

import torch
from torch import nn

from .blocks_hf_decoder import as_rows, blocks, has_kernels, is_for_blocks
from .norm_hf_decoder import HfDecoderRMSNorm
from .operators_hf_decoder import runs_as_written
from .parts_hf_decoder import autocast_dtype

FOR_OTHERS = "_for_other_readers"


def normed_for(reader: nn.Module, norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """norm(x) for a module whose linear maps alone read it, x (..., D).

    Where a kernel can do both, in the dtype that autocast would cast to; `shared_input` then gives each map its own.
    That is for modules as they are written: whoever hung something on one, or replaced it, finds all as it was.
    """
    if (
        x.dtype == torch.float32
        and (dtype := autocast_dtype(x.device)) is not None
        and (input_maps := getattr(type(reader), "input_maps", None)) is not None
        and type(norm) is HfDecoderRMSNorm
        and is_for_blocks(x, norm.weight)  # before the kernels are asked for, which no compiler is to look into
        and has_kernels(x)
        and not _is_watched(norm)
        and not _is_watched(reader)
        and _are_plain(maps := input_maps(reader))
    ):
        normed, *others = norm(x, dtype, len(maps))
        setattr(normed, FOR_OTHERS, others)
        return normed
    return norm(x)


def shared_input(x: torch.Tensor, *modules: nn.Module) -> tuple[torch.Tensor, ...]:
    """x (..., D) for each of two or three modules: itself, or the same cast where autocast would make one for each."""
    if x.dtype != torch.float32:
        others = () if x.is_cpu or not runs_as_written() else getattr(x, FOR_OTHERS, ())
        return (x, *others) if len(others) == len(modules) - 1 else (x,) * len(modules)
    dtype = autocast_dtype(x.device)
    if dtype is not None and is_for_blocks(x) and _are_plain(modules):
        return _SharedCast.apply(x, dtype, len(modules))
    return (x,) * len(modules)


def _are_plain(modules: Sequence[nn.Module]) -> bool:
    """An adapter or a quantizer casts in its own way, and a hook may write into what it is given."""
    return all(type(module) is nn.Linear and not module._forward_pre_hooks for module in modules)


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks see what goes in or comes out, or another forward runs: accelerate's, a hub's, a compiled one."""
    return bool(
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in module.__dict__
        or module._compiled_call_impl is not None
    )


class _SharedCast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dtype, count):
        ctx.set_materialize_grads(False)
        cast = x.to(dtype)
        return tuple(cast.view_as(cast) for _ in range(count))

    @staticmethod
    def backward(ctx, *grads):
        found = [grad for grad in grads if grad is not None]
        if not found:
            return None, None, None
        if torch.is_grad_enabled():  # for a second derivative
            return sum(grad.float() for grad in found), None, None
        if has_kernels(found[0]) and len(found) > 1:
            from .triton_hf_decoder import sum_in_fp32

            return sum_in_fp32(*found), None, None
        rows = [as_rows(grad) for grad in found]
        total = torch.empty_like(rows[0], dtype=torch.float32)
        for block in blocks(*total.shape):
            part = total[block].copy_(rows[0][block])
            for other in rows[1:]:
                part += other[block].float()
        return total.view(found[0].shape), None, None


__all__ = ["normed_for", "shared_input"]
