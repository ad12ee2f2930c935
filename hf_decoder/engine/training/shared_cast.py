"""One cast for all linear maps that read the same activation under autocast.

Autocast casts the input for each of them, and casts each gradient back to fp32. Here the input is cast once, and the
gradients are added up in fp32, block by block or by one kernel. On CUDA the kernels of the norm do both.
"""

import torch

from hf_decoder.engine.training.blocks import as_rows, blocks, has_kernels


def cast_once(x: torch.Tensor, dtype: torch.dtype | None, count: int) -> tuple[torch.Tensor, ...]:
    """Casts x (..., D) once for `count` linear maps, whose gradients are added up in fp32."""
    return _SharedCast.apply(x, dtype, count)


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
            from hf_decoder.engine.triton.training import sum_in_fp32

            return sum_in_fp32(*found), None, None
        rows = [as_rows(grad) for grad in found]
        total = torch.empty_like(rows[0], dtype=torch.float32)
        for block in blocks(*total.shape):
            part = total[block].copy_(rows[0][block])
            for other in rows[1:]:
                part += other[block].float()
        return total.view(found[0].shape), None, None


__all__ = ["cast_once"]
