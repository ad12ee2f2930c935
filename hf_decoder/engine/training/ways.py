"""Chooses, for what stands between the linear maps of a layer, between torch's operators and blocks of rows on a CPU.

Shapes: (..., D), or of the rotation (B, heads, S, E).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.nn.functional import silu

from hf_decoder.engine.calibration import bucket, choose, numbers
from hf_decoder.engine.training.gate import fused_gate
from hf_decoder.engine.training.norm import fused_rms_norm, rms_norm
from hf_decoder.engine.training.rotation import fused_rotation
from hf_decoder.engine.training.shared_cast import cast_once
from hf_decoder.model.modeling_hf_decoder import apply_rotary_pos_emb

# of the tensors that are measured: larger ones leave the caches as these do, smaller ones cost their calls as these do
LEAST_ELEMENTS, MOST_ELEMENTS = 2**13, 2**20
HEADS = 4  # of a tensor that is rotated
BLOCKS = "blocks"


def in_blocks(name: str, shape: torch.Size, dtype: torch.dtype, to: torch.dtype | None = None) -> bool:
    """Whether blocks are the faster way for tensors of this shape and dtype.

    Args:
        name: `norm`, `gate`, `rotation` or `cast`.
        shape: of what is normed, gated, rotated or cast.
        dtype: of the same.
        to: the dtype that it is cast to, or that the rotated one shall have.
    """
    width = bucket(shape[-1], 16, 2**14)
    elements = max(bucket(shape.numel(), LEAST_ELEMENTS, MOST_ELEMENTS), HEADS * width)
    trains = torch.is_grad_enabled()
    key = (dtype, to, elements, width, "training" if trains else "inference")
    inputs = partial(_inputs, name, dtype, to, elements // width, width, trains)
    return choose(name, key, CANDIDATES[name], inputs) == BLOCKS


def any_in_blocks(config: Any, x: torch.Tensor) -> bool:
    """Whether blocks are the faster way for any operator of a layer with these hidden states (B, S, D) as they are."""
    *tokens, hidden = x.shape
    shapes = {
        "norm": (*tokens, hidden),
        "gate": (*tokens, config.intermediate_size),
        "rotation": (*tokens, config.num_attention_heads, config.head_dim),
    }
    return any(in_blocks(name, torch.Size(shape), x.dtype) for name, shape in shapes.items())


def _inputs(name: str, dtype: torch.dtype, to: torch.dtype | None, rows: int, width: int, trains: bool) -> tuple:
    """Tensors, what else the operator takes, and whether gradients are wanted, too."""
    x, other = (numbers(rows, width, dtype=dtype, needs_grad=trains) for _ in range(2))
    if name == "gate":
        return (x, other), (), trains
    if name == "norm":
        return (x, torch.ones(width, dtype=dtype, device="cpu", requires_grad=trains)), (1e-6,), trains
    if name == "cast":
        return (x,), (to,), trains
    tokens = rows // HEADS
    # laid out as a projection's
    x = numbers(1, tokens, HEADS, width, dtype=dtype).transpose(1, 2).detach().requires_grad_(trains)
    angles = numbers(1, tokens, width).to(dtype if to is None else torch.float32)  # those of the hidden states
    return (x,), (angles.cos(), angles.sin(), to), trains


def _run(function: Callable, tensors: Sequence[torch.Tensor], others: Sequence[Any], trains: bool) -> Any:
    found = function(*tensors, *others)
    outputs = (found,) if isinstance(found, torch.Tensor) else found
    if not trains:
        return outputs
    # not the outputs themselves: along a norm's output its gradient is rounding alone
    grads = [output.detach().flip(-1) for output in outputs]
    return (*outputs, *torch.autograd.grad(outputs, tensors, grads))


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    rotated = apply_rotary_pos_emb(x, cos, sin)
    return rotated if dtype is None else rotated.to(dtype)


WAYS: dict[str, tuple[Callable, Callable]] = {  # torch's, and by blocks
    "norm": (rms_norm, fused_rms_norm),
    "gate": (lambda gate, up: silu(gate) * up, lambda gate, up: fused_gate(lambda product: product, gate, up)),
    "rotation": (_rotated, lambda x, *others: fused_rotation(x, x[:, :1], *others)[0]),
    "cast": (lambda x, dtype: tuple(x.to(dtype) for _ in range(2)), lambda x, dtype: cast_once(x, dtype, 2)),
}
CANDIDATES = {
    name: {"torch": partial(_run, plain), BLOCKS: partial(_run, fused)} for name, (plain, fused) in WAYS.items()
}

__all__ = ["LEAST_ELEMENTS", "any_in_blocks", "in_blocks"]
