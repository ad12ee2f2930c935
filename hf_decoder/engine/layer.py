"""One decoder layer as a function of its parts. The fast paths pass different parts to it.

A part is a module of the layer, called as it is (adapters and quantized layers too), or a product with its weight.
Shapes: any leading dimensions, then D hidden_size; H query heads, G key/value heads, E head_dim.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

Map = Callable[[torch.Tensor], torch.Tensor]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class LayerParts(NamedTuple):
    """The parts of one layer: linear maps as callables, everything else as modules."""

    attention: Any
    input_norm: nn.Module
    heads: Callable[[tuple[torch.Tensor, ...]], Sequence[torch.Tensor]]  # one input each -> query, key and value
    output: Map
    mlp_norm: nn.Module
    gate: Map
    up: Map
    down: Map
    activation: nn.Module

    @classmethod
    def of(cls, layer: Any, as_map: Callable[[nn.Module], Map] = lambda module: module) -> "LayerParts":
        """The modules of a layer; of its linear maps what `as_map` makes of them."""
        attention, mlp = layer.self_attn, layer.mlp
        maps = list(map(as_map, (attention.q_proj, attention.k_proj, attention.v_proj)))

        def heads(inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
            return [form(x) for form, x in zip(maps, inputs, strict=True)]

        gated = *map(as_map, (mlp.gate_proj, mlp.up_proj, mlp.down_proj)), mlp.act_fn
        output = as_map(attention.o_proj)
        return cls(attention, layer.input_layernorm, heads, output, layer.post_attention_layernorm, *gated)


class Operators:
    """The operators between the linear maps of a layer, computed by its modules."""

    def norm(self, norm: Any, x: torch.Tensor) -> torch.Tensor:
        return norm(x)

    def norm_for(self, norm: Any, x: torch.Tensor, readers: int) -> tuple[torch.Tensor, ...]:
        """The normed x, once for each linear map that reads it."""
        return (self.norm(norm, x),) * readers

    def gated(self, down: Map, gate: torch.Tensor, up: torch.Tensor, activation: nn.Module) -> torch.Tensor:
        return down(activation(gate) * up)


def run_layer(parts: LayerParts, x: torch.Tensor, operators: Operators, attend: Attend) -> torch.Tensor:
    """Runs x (..., D) through one layer.

    `attend` maps query (..., H, E), key and value (..., G, E) to (..., H * E). It applies RoPE, if the layer has it,
    and updates the cache.
    """
    attention = parts.attention
    shape = (*x.shape[:-1], -1, attention.head_dim)
    query, key, value = (heads.view(shape) for heads in parts.heads(operators.norm_for(parts.input_norm, x, 3)))
    if attention.use_qk_norm:
        query, key = operators.norm(attention.q_norm, query), operators.norm(attention.k_norm, key)
    x = x + parts.output(attend(query, key, value))
    for_gate, for_up = operators.norm_for(parts.mlp_norm, x, 2)
    return x + operators.gated(parts.down, parts.gate(for_gate), parts.up(for_up), parts.activation)


__all__ = ["LayerParts", "Operators", "run_layer"]
