"""RMSNorm (Zhang and Sennrich 2019), by kernels on CUDA and by C++ on a CPU.

Both keep one number per row for the backward pass instead of a second copy of the rows.
Shapes: N rows, D hidden_size.
"""

from functools import partial
from typing import Any

import torch

from hf_decoder.engine.training.kernels import applied, gradients_of_formula, kernels_of


def fused_rms_norm(
    hidden_states: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None = None, readers: int = 1
) -> Any:
    """Norms (..., D) and casts to `dtype` in one pass; returns one output for each of the readers."""
    return applied(_RMSNorm, hidden_states, weight, eps, dtype, readers)


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The norm, as the modules write it."""
    input_dtype = hidden_states.dtype
    hidden_states = hidden_states.to(torch.float32)
    variance = hidden_states.pow(2).mean(-1, keepdim=True)
    hidden_states = hidden_states * torch.rsqrt(variance + eps)
    return weight * hidden_states.to(input_dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, weight, eps, dtype, readers):
        ctx.set_materialize_grads(False)
        output, scales = kernels_of(hidden_states).rms_norm(hidden_states, weight, eps, dtype)
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
        gradients = kernels_of(hidden_states).rms_norm_gradients
        grad_hidden, grad_weight = gradients(found, hidden_states, weight, scales, for_hidden, for_weight)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype), None, None, None


__all__ = ["fused_rms_norm", "rms_norm"]
