"""Rotations of RoPE (Su et al. 2021) in one pass over memory, forward and backward.

Shapes: B batch, S tokens, H query heads, G key/value heads, E head_dim, R its rotated part.
"""

import torch

from hf_decoder.engine.training.kernels import applied, kernels_of
from hf_decoder.model.modeling_hf_decoder import rotate_half


def fused_rotation(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates query (B, H, S, E) and key (B, G, S, E) by cos, sin (B or 1, S, R).

    The results have this dtype; None: that of the product with the cosines.
    """
    return applied(_Rotation, cos, sin, dtype, query, key)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cos, sin, dtype, query, key):
        ctx.save_for_backward(cos, sin)
        ctx.dtypes = query.dtype, key.dtype
        dtypes = [dtype or torch.result_type(x, cos) for x in (query, key)]
        return kernels_of(query).rotated(query, key, cos, sin, dtypes, backwards=False)

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            return None, None, None, *(_rotated_back(*pair, cos, sin) for pair in zip(grads, ctx.dtypes, strict=True))
        return None, None, None, *kernels_of(grads[0]).rotated(*grads, cos, sin, ctx.dtypes, backwards=True)


def _rotated_back(grad: torch.Tensor, dtype: torch.dtype, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = grad[..., : cos.shape[-1]], grad[..., cos.shape[-1] :]
    return torch.cat((turned * cos - rotate_half(turned * sin), rest), dim=-1).to(dtype)


__all__ = ["fused_rotation"]
