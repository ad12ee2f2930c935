"""The route of one call through the decoder. It is decided once, at the entry, for all layers.

A route holds the masks of the layers and the operators between their linear maps. `assumptions` lists what it assumes
of modules and config. This module looks at the call: device, dtype, autocast, sizes, a compiler.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn

from hf_decoder.engine.assumptions import DTYPES, PLAIN, Structure, structure_of
from hf_decoder.engine.attention.masks import engine_masks
from hf_decoder.engine.layer import LayerParts, Operators, run_layer
from hf_decoder.engine.operators import may_call_operators, runs_as_written
from hf_decoder.engine.precision import autocast_dtype
from hf_decoder.engine.stock import fields_of
from hf_decoder.engine.switches import settings
from hf_decoder.engine.training import kernels
from hf_decoder.engine.training.compiled import takes
from hf_decoder.engine.training.fast_products import FastProducts, fast_map, needs_fast_products
from hf_decoder.engine.training.gate import fused_gate
from hf_decoder.engine.training.kernels import has_kernels
from hf_decoder.engine.training.norm import fused_rms_norm
from hf_decoder.engine.training.rotation import fused_rotation
from hf_decoder.engine.training.ways import LEAST_ELEMENTS, any_in_cpp, in_cpp
from hf_decoder.model.modeling_hf_decoder import CACHE_NAME, apply_rotary_pos_emb


class Route(Operators):
    """Masks and operators of one call."""

    def __init__(self, x: torch.Tensor, structure: Structure | None, masks: Any = None):
        """x: the embeddings (B, S, D); structure: of the layers, None if they are called as modules."""
        self.masks = masks
        self.has_slow_products = False  # as torch forms them
        self.structure = structure
        self._ways: dict[tuple, bool] = {}  # whether tensors of this kind and shape go another way than torch's
        self.has_kernels = structure is not None and has_kernels(x)
        self.attention_dtype = autocast_dtype(x.device)
        # numbers of linear maps whose common input is cast once; autocast would cast it for each of them
        self.casts: set[int] = set()
        if structure is not None and self.attention_dtype is not None and x.dtype == torch.float32:
            self.casts = {
                n for n, plain in ((3, structure.plain_attention_inputs), (2, structure.plain_mlp_inputs)) if plain
            }
        self.has_silu = structure is not None and structure.has_silu

    @staticmethod
    def of(
        decoder: Any,
        x: torch.Tensor,
        attention_mask: torch.Tensor | dict | None,
        position_ids: torch.Tensor | None,
        cache: Any,
        structure: Structure | None = None,
    ) -> "Route | None":
        """The route of a call of the decoder with these embeddings (B, S, D); None if the call runs its modules.

        structure: of the decoder, if the caller knows it.
        """
        if not (settings.training or settings.attention):
            return None
        compiling = may_call_operators()
        if not compiling and not runs_as_written():
            return None
        if not compiling and (type(x) not in PLAIN or x.dtype not in DTYPES):
            return None
        # the modules are looked at last, which takes longer than all the rest
        mlp = getattr(decoder.layers[0], "mlp", None)
        is_slow = needs_fast_products(x, getattr(mlp, "down_proj", None))
        if not compiling and not is_slow and settings.ways is None and _is_short(x):
            return None
        masks, gains = None, False
        if settings.attention and not isinstance(attention_mask, dict):
            masks = engine_masks(decoder, x, attention_mask, position_ids, cache)
        if settings.training and not compiling:
            gains = _gains(fields_of(decoder.config), x) if x.is_cpu else has_kernels(x)
        if masks is None and not gains and not is_slow:
            return None
        if not compiling:
            structure = structure or structure_of(decoder)
            if structure is None:
                return None
        route = Route(x, structure if gains or is_slow else None, masks)
        route.has_slow_products = is_slow
        return route

    def __getitem__(self, kind: str) -> Any:
        return self.masks[kind]

    def run_layer(
        self,
        layer: nn.Module,
        by_modules: Callable,
        hidden_states: torch.Tensor,
        attention_mask: Any = None,
        position_embeddings: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Computes the layer's `forward`."""
        if self.structure is None:
            inputs = {"attention_mask": attention_mask, "position_embeddings": position_embeddings}
            with FastProducts() if self.has_slow_products else nullcontext():
                return by_modules(hidden_states, **inputs, **kwargs)
        attend = partial(self.attend, layer.self_attn, attention_mask, position_embeddings, kwargs)
        parts = LayerParts.of(layer, fast_map) if self.has_slow_products else LayerParts.of(layer)
        return run_layer(parts, hidden_states, self, attend)

    def attend(
        self,
        attention: Any,
        mask: Any,
        rotation: tuple[torch.Tensor, torch.Tensor],
        kwargs: dict[str, Any],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        """query (B, S, H, E), key and value (B, S, G, E) -> (B, S, H * E)."""
        kwargs = dict(kwargs)
        cache = kwargs.pop(CACHE_NAME, None)
        query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if attention.use_rope:
            query, key = self.rotated(query, key, rotation, for_cache=cache is not None)
        return attention.attend(query, key, value, mask, cache, **kwargs)[0]

    def _is_fused(self, name: str, *tensors: torch.Tensor, to: torch.dtype | None = None) -> bool:
        """Whether one operator of this room is faster for these tensors than several of torch's."""
        x = tensors[0]
        if self.structure is None:
            return False
        if self.has_kernels:
            return x.numel() >= kernels.MIN_KERNEL_ELEMENTS
        if not takes(*tensors, to=to):
            return False
        kind = (name, x.shape, x.dtype, to)
        if kind not in self._ways:
            self._ways[kind] = in_cpp(name, x.shape, x.dtype, to)
        return self._ways[kind]

    def norm(self, norm: Any, x: torch.Tensor) -> torch.Tensor:
        if self._is_fused("norm", x, norm.weight):
            return fused_rms_norm(x, norm.weight, norm.variance_epsilon)
        return norm(x)

    def norm_for(self, norm: Any, x: torch.Tensor, readers: int) -> tuple[torch.Tensor, ...]:
        if readers not in self.casts or not self._is_fused("norm", x, norm.weight, to=self.attention_dtype):
            return super().norm_for(norm, x, readers)
        return fused_rms_norm(x, norm.weight, norm.variance_epsilon, self.attention_dtype, readers)

    def gated(self, down: Any, gate: torch.Tensor, up: torch.Tensor, activation: nn.Module) -> torch.Tensor:
        if self.has_silu and self._is_fused("gate", gate, up):
            return fused_gate(down, gate, up)
        return super().gated(down, gate, up, activation)

    def rotated(
        self, query: torch.Tensor, key: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor], for_cache: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        # without a cache, the result is rounded at once to the dtype that autocast gives to attention
        dtype = None if for_cache else self.attention_dtype
        if not rotation[0].requires_grad and self._is_fused("rotation", query, key, *rotation, to=dtype):
            return fused_rotation(query, key, *rotation, dtype)
        return apply_rotary_pos_emb(query, *rotation), apply_rotary_pos_emb(key, *rotation)


def _is_short(x: torch.Tensor) -> bool:
    """Whether hidden states on a CPU are so few that no other way saves as much as a look at the modules takes."""
    return x.is_cpu and not torch.is_grad_enabled() and x.numel() < LEAST_ELEMENTS


def _gains(config: Any, x: torch.Tensor) -> bool:
    """Whether operators of this room may gain with these hidden states on a CPU; else layers run as modules."""
    if torch.is_grad_enabled() or autocast_dtype(x.device) is not None:
        return True
    return any_in_cpp(config, x)


__all__ = ["Route"]
