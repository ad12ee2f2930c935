"""Chooses, for what stands between the products of a training step on a CPU, between torch's operators and C++.

Shapes: (..., D), or of the rotation (B, heads, S, E).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.functional import silu

from hf_decoder.engine.calibration import bucket, choose, numbers
from hf_decoder.engine.switches import settings
from hf_decoder.engine.training import compiled
from hf_decoder.engine.training.gate import fused_gate
from hf_decoder.engine.training.norm import fused_rms_norm, rms_norm
from hf_decoder.engine.training.rotation import fused_rotation
from hf_decoder.model.modeling_hf_decoder import apply_rotary_pos_emb

# of the tensors that are measured: larger ones leave the caches as these do, smaller ones cost their calls as these do
LEAST_ELEMENTS, MOST_ELEMENTS = 2**13, 2**20
HEADS = 4  # of a tensor that is rotated
READERS = 2  # of a norm whose result is cast
CPP = "C++"


def in_cpp(name: str, shape: torch.Size, dtype: torch.dtype, to: torch.dtype | None = None) -> bool:
    """Whether C++ is the faster way for tensors of this shape and dtype, and at hand.

    Args:
        name: `norm`, `gate` or `rotation`.
        shape: of what is normed, gated or rotated.
        dtype: of the same.
        to: the dtype that it is cast to.
    """
    if settings.ways is None and not compiled.is_ready():
        return False
    width = bucket(shape[-1], 16, 2**14)
    elements = max(bucket(shape.numel(), LEAST_ELEMENTS, MOST_ELEMENTS), HEADS * width)
    trains = torch.is_grad_enabled()
    key = (dtype, to, elements, width, "training" if trains else "inference")
    inputs = partial(_inputs, name, dtype, to, elements // width, width, trains)
    return choose(name, key, CANDIDATES[name], inputs) == CPP


def any_in_cpp(config: Any, x: torch.Tensor) -> bool:
    """Whether C++ is the faster way for any operator of a layer with these hidden states (B, S, D) as they are."""
    *tokens, hidden = x.shape
    shapes = {
        "norm": (*tokens, hidden),
        "gate": (*tokens, config.intermediate_size),
        "rotation": (*tokens, config.num_attention_heads, config.head_dim),
    }
    return compiled.takes(x) and any(in_cpp(name, torch.Size(shape), x.dtype) for name, shape in shapes.items())


def _inputs(name: str, dtype: torch.dtype, to: torch.dtype | None, rows: int, width: int, trains: bool) -> tuple:
    """Tensors, what else the operator takes, and whether gradients are wanted, too."""
    x, other = (numbers(rows, width, dtype=dtype, needs_grad=trains) for _ in range(2))
    if name == "gate":
        return (x, other), (), trains
    if name == "norm":
        weight = torch.ones(width, dtype=dtype, device="cpu", requires_grad=trains)
        return (x, weight), (1e-6, to, 1 if to is None else READERS), trains
    tokens = rows // HEADS
    # laid out as a projection's
    x = numbers(1, tokens, HEADS, width, dtype=dtype).transpose(1, 2).detach().requires_grad_(trains)
    angles = numbers(1, tokens, width).to(dtype if to is None else torch.float32)  # those of the hidden states
    return (x, x[:, :1].detach().requires_grad_(trains)), (angles.cos(), angles.sin(), to), trains


def _run(function: Callable, tensors: Sequence[torch.Tensor], others: Sequence[Any], trains: bool) -> Any:
    found = function(*tensors, *others)
    outputs = (found,) if isinstance(found, torch.Tensor) else found
    if not trains:
        return outputs
    # not the outputs themselves: along a norm's output its gradient is rounding alone
    grads = [output.detach().flip(-1) for output in outputs]
    return (*outputs, *torch.autograd.grad(outputs, tensors, grads))


def _normed(x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None, readers: int) -> Any:
    normed = rms_norm(x, weight, eps)
    return normed if dtype is None else tuple(normed.to(dtype) for _ in range(readers))


def _rotated(*inputs: Any) -> tuple[torch.Tensor, ...]:
    *tensors, cos, sin, dtype = inputs
    return tuple(apply_rotary_pos_emb(x, cos, sin).to(dtype or x.dtype) for x in tensors)


WAYS: dict[str, tuple[Callable, Callable]] = {  # torch's, and C++
    "norm": (_normed, fused_rms_norm),
    "gate": (lambda gate, up: silu(gate) * up, lambda gate, up: fused_gate(lambda product: product, gate, up)),
    "rotation": (_rotated, fused_rotation),
}
CANDIDATES = {
    name: {"torch": partial(_run, plain), CPP: partial(_run, fused)} for name, (plain, fused) in WAYS.items()
}

__all__ = ["CPP", "LEAST_ELEMENTS", "any_in_cpp", "in_cpp"]
