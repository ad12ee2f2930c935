"""One cast for all linear maps that read the same activation under autocast.

Autocast casts the input of each by itself, and their gradients one by one back again, to be added up in fp32. Here the
cast is made once, and the gradients are added up, in fp32 too, block by block.
"""

import torch
from torch import nn

from .blocks_hf_decoder import as_rows, blocks, is_for_blocks


def shared_input(x: torch.Tensor, *modules: nn.Module) -> tuple[torch.Tensor, ...]:
    """x (..., D) for each of the modules: itself, or the same cast of it where autocast would make one for each."""
    if (
        torch.is_autocast_enabled("cpu")
        and x.dtype == torch.float32
        # an adapter or a quantizer casts in its own way, and a hook may write into what it is given
        and all(type(module) is nn.Linear and not module._forward_pre_hooks for module in modules)
        and is_for_blocks(x)
    ):
        return _SharedCast.apply(x, torch.get_autocast_dtype("cpu"), len(modules))
    return (x,) * len(modules)


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
        rows = [as_rows(grad) for grad in found]
        total = torch.empty_like(rows[0], dtype=torch.float32)
        for block in blocks(*total.shape):
            part = total[block].copy_(rows[0][block])
            for other in rows[1:]:
                part += other[block].float()
        return total.view(found[0].shape), None, None


__all__ = ["shared_input"]
