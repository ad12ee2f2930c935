"""RMSNorm (Zhang and Sennrich 2019), in blocks of rows on a CPU and by kernels on CUDA.

Tensor by tensor, a norm passes through memory a dozen times in each direction. Blocks of rows that stay in the caches
take about a third of that time (4 against 11 ms, forward and backward, for 4,096 rows of 512 on two cores). They keep
one number per row for the backward pass instead of a second copy of the rows.
Shapes: N rows, D hidden_size.
"""

from functools import partial
from typing import Any

import torch

from hf_decoder.engine.training.blocks import as_rows, blocks, gradients_of_formula, has_kernels


def fused_rms_norm(
    hidden_states: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None = None, readers: int = 1
) -> Any:
    """Norms (..., D) in one pass; with kernels, casts to `dtype` and returns one output for each of the readers."""
    return _BlockedRMSNorm.apply(hidden_states, weight, eps, dtype, readers)


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm, as the modules write it."""
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + eps)
    return weight * hidden_states.to(input_dtype)


class _BlockedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, eps, dtype, readers):
        ctx.set_materialize_grads(False)
        if has_kernels(hidden_states):
            from hf_decoder.engine.triton import training as kernels

            output, scales = kernels.rms_norm(hidden_states, weight, eps, dtype)
        else:
            output, scales = _normed_in_blocks(as_rows(hidden_states), weight, eps)
            output = output.view(hidden_states.shape)
        ctx.save_for_backward(hidden_states, weight, scales)
        ctx.eps = eps
        # one tensor per reader over the same memory: autograd itself would add up their gradients in `dtype`
        return output if readers == 1 else (output, *(output.detach() for _ in range(readers - 1)))

    @staticmethod
    def backward(ctx, *grads):
        hidden_states, weight, scales = ctx.saved_tensors
        for_hidden, for_weight, *_ = ctx.needs_input_grad
        found = [grad for grad in grads if grad is not None]
        if not found:
            return None, None, None, None, None
        if torch.is_grad_enabled():
            norm = partial(rms_norm, eps=ctx.eps)
            grad = found[0] if len(grads) == 1 else sum(grad.float() for grad in found)
            needs = (for_hidden, for_weight)
            return *gradients_of_formula(norm, (hidden_states, weight), needs, grad), None, None, None
        if has_kernels(hidden_states):
            from hf_decoder.engine.triton.training import rms_norm_gradients

            grad_hidden, grad_weight = rms_norm_gradients(found, hidden_states, weight, scales, for_hidden, for_weight)
        else:
            grad_hidden, grad_weight = _gradients_in_blocks(
                as_rows(found[0]), as_rows(hidden_states), weight, scales, for_hidden, for_weight
            )
            grad_hidden = None if grad_hidden is None else grad_hidden.view(hidden_states.shape)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


def _normed_in_blocks(rows: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The output (N, D), and the factor of each row (N, 1)."""
    output = rows.new_empty(rows.shape, dtype=torch.result_type(weight, rows))
    scales = rows.new_empty(rows.shape[0], 1, dtype=torch.float32)
    for block in blocks(*rows.shape):
        x, scale = rows[block].float(), scales[block]
        torch.mean(x * x, -1, keepdim=True, out=scale).add_(eps).rsqrt_()
        torch.mul(weight, (x * scale).to(rows.dtype), out=output[block])
    return output, scales


def _gradients_in_blocks(
    grad_rows: torch.Tensor,
    rows: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    for_rows: bool,
    for_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of the rows (N, D), and of the weight in fp32."""
    grad_hidden = torch.empty_like(rows) if for_rows else None
    grad_weight = torch.zeros_like(weight, dtype=torch.float32) if for_weight else None
    for block in blocks(*rows.shape):
        grad, scale = grad_rows[block].float(), scales[block]
        normed = rows[block].float() * scale
        if grad_weight is not None:
            grad_weight += (grad * normed).sum(0)
        if grad_hidden is not None:
            grad = grad * weight
            along = (grad * normed).mean(-1, keepdim=True)  # scaling a row does not change its norm
            grad_hidden[block] = (grad - normed * along).mul_(scale)
    return grad_hidden, grad_weight


__all__ = ["fused_rms_norm", "rms_norm"]
