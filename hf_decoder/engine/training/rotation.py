"""Rotations of RoPE (Su et al. 2021) in one pass over memory, forward and backward.

Shapes: B batch, S tokens, H query heads, G key/value heads, E head_dim, R its rotated part.
"""

from collections.abc import Sequence

import torch

from hf_decoder.engine.training.blocks import blocks, has_kernels
from hf_decoder.model.modeling_hf_decoder import rotate_half


def fused_rotation(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates query (B, H, S, E) and key (B, G, S, E) by cos, sin (B or 1, S, R): in blocks, or both by one kernel.

    The results have this dtype; None: that of the product with the cosines.
    """
    if has_kernels(query):
        return _BlockedRotation.apply(cos, sin, dtype, query, key)
    return tuple(_BlockedRotation.apply(cos, sin, dtype, x)[0] for x in (query, key))


class _BlockedRotation(torch.autograd.Function):
    """Rotates query and key by one kernel, or one tensor in blocks."""

    @staticmethod
    def forward(ctx, cos, sin, dtype, *tensors):
        ctx.save_for_backward(cos, sin)
        ctx.dtypes = [x.dtype for x in tensors]
        dtypes = [dtype or torch.result_type(x, cos) for x in tensors]
        return _rotated(tensors, cos, sin, dtypes, backwards=False)

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative
            return None, None, None, *(_rotated_back(*pair, cos, sin) for pair in zip(grads, ctx.dtypes, strict=True))
        return None, None, None, *_rotated(grads, cos, sin, ctx.dtypes, backwards=True)


def _rotated_back(grad: torch.Tensor, dtype: torch.dtype, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = grad[..., : cos.shape[-1]], grad[..., cos.shape[-1] :]
    return torch.cat((turned * cos - rotate_half(turned * sin), rest), dim=-1).to(dtype)


def _rotated(
    tensors: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    dtypes: Sequence[torch.dtype],
    backwards: bool,
) -> tuple[torch.Tensor, ...]:
    """Rotates tensors (B, heads, S, E), or rotates them back, into memory of layout (B, S, heads, E)."""
    if len(tensors) == 2:
        from hf_decoder.engine.triton.training import rotated as rotated_by_kernel

        query, key = tensors
        return rotated_by_kernel(query, key, cos, sin, dtypes, backwards)
    (x,), (dtype,) = tensors, dtypes
    batch, heads, length, head_dim = x.shape
    rotary_dim, inner = cos.shape[-1], torch.result_type(x, cos)
    half = rotary_dim // 2
    output = x.new_empty(batch, length, heads, head_dim, dtype=dtype).transpose(1, 2)
    # a block is several rows of the batch if they are short, else a piece of one
    for rows in blocks(batch, length * heads * head_dim):
        of_rows = rows if cos.shape[0] > 1 else slice(None)
        for columns in blocks(length, heads * head_dim):
            block = x[rows, :, columns, :rotary_dim].to(inner)
            cosines, sines = cos[of_rows, None, columns], sin[of_rows, None, columns]
            rotated = block * cosines
            if backwards:
                turned = block * sines
                rotated[..., :half] += turned[..., half:]
                rotated[..., half:] -= turned[..., :half]
            else:
                rotated[..., :half] -= block[..., half:] * sines[..., :half]
                rotated[..., half:] += block[..., :half] * sines[..., half:]
            output[rows, :, columns, :rotary_dim] = rotated
            output[rows, :, columns, rotary_dim:] = x[rows, :, columns, rotary_dim:]
    return (output,)


__all__ = ["fused_rotation"]
