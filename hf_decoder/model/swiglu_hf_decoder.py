"""The gate of SwiGLU (Shazeer 2020): act(gate) * up.

Of SiLU, in blocks of rows on a CPU and by a kernel on CUDA: each tensor is read and written once, and of the forward
pass nothing is kept but the two inputs, where the activation's result would be a third.
Shapes: (..., F) intermediate_size.
"""

import torch
from torch import nn
from torch.nn.functional import silu
from transformers.activations import ACT2FN

from .blocks_hf_decoder import as_rows, blocks, gradients_of_formula, has_kernels, is_for_blocks

SILU = (type(ACT2FN["silu"]), nn.SiLU)


def gated(gate: torch.Tensor, up: torch.Tensor, activation: nn.Module) -> torch.Tensor:
    """activation(gate) * up, both (..., F)."""
    if (
        type(activation) in SILU
        and not activation._forward_hooks
        and not activation._forward_pre_hooks
        and gate.dtype == up.dtype
        and gate.shape == up.shape
        and is_for_blocks(gate, up)
    ):
        return _BlockedGatedSiLU.apply(gate, up)
    return activation(gate) * up


class _BlockedGatedSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        if has_kernels(up):
            from .triton_hf_decoder import gated_silu

            return gated_silu(gate, up)
        gates, ups = as_rows(gate), as_rows(up)
        output = torch.empty_like(ups)
        for block in blocks(*ups.shape):
            torch.mul(silu(gates[block]), ups[block], out=output[block])
        return output.view(up.shape)

    @staticmethod
    def backward(ctx, grad_output):
        gate, up = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return tuple(gradients_of_formula(lambda gate, up: silu(gate) * up, (gate, up), needs, grad_output))
        if has_kernels(up):
            from .triton_hf_decoder import gated_silu_gradients

            return gated_silu_gradients(grad_output, gate, up, *needs)
        grads, gates, ups = as_rows(grad_output), as_rows(gate), as_rows(up)
        grad_gate = torch.empty_like(gates) if needs[0] else None
        grad_up = torch.empty_like(ups) if needs[1] else None
        for block in blocks(*ups.shape):
            if grad_up is not None:
                torch.mul(grads[block], silu(gates[block]), out=grad_up[block])
            if grad_gate is not None:
                grad = grads[block] * ups[block]
                torch.ops.aten.silu_backward.grad_input(grad, gates[block], grad_input=grad_gate[block])
        return (
            None if grad_gate is None else grad_gate.view(gate.shape),
            None if grad_up is None else grad_up.view(up.shape),
        )


__all__ = ["SILU", "gated"]
