"""The decoder as one function of its weights, without module calls, for any number of tokens per row.

`generate()` spends most of a token's time outside of the arithmetic. This function avoids the calls of a hundred
modules. For one token per row it also avoids masks that hide nothing, puts the query heads of a group side by side so
that their keys are read once, and uses matrix-vector kernels that read weights at the speed of memory.
`DecodingStep.of` finds out whether it supports a model.

Shapes: B rows, S new tokens per row, D hidden_size, H query heads, G key/value heads, E head_dim, R its rotated part,
K cached tokens and the new ones, V vocab_size.
"""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
)
from transformers.utils import logging

from hf_decoder.engine.assumptions import PLAIN, SILU, Structure, modules_below, outputs_of, state_of
from hf_decoder.engine.decoding.cpp_step import CppStep, is_for_cpp, later
from hf_decoder.engine.decoding.cuda_graph_step import CudaGraphStep, is_capturable
from hf_decoder.engine.decoding.growing_cache import GrowingCache
from hf_decoder.engine.decoding.products import (
    AnyWeights,
    Weights,
    joined,
    multiply,
    multiply_row,
    packed_weights,
    reading_weights_once,
    weights_of,
)
from hf_decoder.engine.decoding.static_step import StaticStep, weights_of_products
from hf_decoder.engine.layer import LayerParts, Operators, run_layer
from hf_decoder.engine.precision import autocast_dtype
from hf_decoder.engine.quantized.layers import PackedEmbedding, Table
from hf_decoder.engine.route import Route
from hf_decoder.engine.stock import fields_of
from hf_decoder.engine.switches import settings
from hf_decoder.engine.training.kernels import has_kernels
from hf_decoder.model.loss_hf_decoder import softcap
from hf_decoder.model.modeling_hf_decoder import CACHE_NAME, apply_rotary_pos_emb

logger = logging.get_logger(__name__)

Product = Callable[..., torch.Tensor]  # of an input and weights
Store = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]

GROWING_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


class LayerWeights(NamedTuple):
    """The weights of one layer, and its other modules."""

    attention: Any
    input_norm: Any
    heads: tuple[AnyWeights, ...]  # of queries, keys and values, separate or joined
    output: AnyWeights
    mlp_norm: Any
    gate: AnyWeights
    up: AnyWeights
    down: AnyWeights
    activation: nn.Module
    window: int | None

    @property
    def query_norm(self) -> Any:
        return self.attention.q_norm if self.attention.use_qk_norm else None

    @property
    def key_norm(self) -> Any:
        return self.attention.k_norm if self.attention.use_qk_norm else None


class DecodingStep:
    """The weights of a model's decoder and head, with functions for prefill and decode steps."""

    def __init__(self, model: Any):
        decoder, config = model.model, fields_of(model.config)
        table = decoder.embed_tokens
        self.embedding: Any = Table(table) if isinstance(table, PackedEmbedding) else table.weight
        self.rotary = decoder.rotary_emb
        self.kinds = config.layer_types
        windows = [config.sliding_window if kind == "sliding_attention" else None for kind in self.kinds]
        layers = decoder.layers[: config.num_hidden_layers]
        self.layers = tuple(_weights_of(layer, window) for layer, window in zip(layers, windows, strict=False))
        self.norm = decoder.norm
        self.head: AnyWeights = weights_of(model.lm_head)
        self.cap = config.final_logit_softcapping
        attention = layers[0].self_attn
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.heads_per_group = attention.num_key_value_groups
        self.groups = outputs_of(attention.k_proj) // self.head_dim
        self.structure = Structure(True, True, all(type(layer.activation) in SILU for layer in self.layers))
        self._parts: dict[Any, tuple[LayerParts, ...]] = {}  # by the product that they multiply with
        self._static: StaticStep | None = None
        self._may_be_static = True
        self._for_cpp: bool | None = None
        self._making = Lock()
        weights = [of[0] for of in weights_of_products(self) if isinstance(of, Weights)]
        # other tensors may need the dispatch keys that `below_autograd` skips
        self._is_plain = all(type(weight) in (*PLAIN, Table) for weight in (self.embedding, *weights))

    @staticmethod
    def of(model: Any) -> "DecodingStep | None":
        """The model's step, the same one until its state changes; None if modules must be called."""
        state = state_of(model) if settings.decoding else None
        if state is None:
            _steps.pop(model, None)
            return None
        known = _steps.get(model)
        if known is not None and known[0] == state:
            return known[1]
        step = DecodingStep(model)
        # what the state holds by id must live on, or another object could get its id
        _steps[model] = state, step, (*modules_below(model.model, model.lm_head), *model.parameters())
        return step

    def packed(self) -> "DecodingStep":
        """A step with copies of the weights in oneDNN's fastest layout for a few rows.

        Measured on two cores with eight rows in bf16: 28 to 46 GB/s of weights against 11 to 19.
        """

        def pack_layer(layer: LayerWeights) -> LayerWeights:
            return layer._replace(
                heads=tuple(packed_weights(weights) for weights in joined(layer.heads)),
                output=packed_weights(layer.output),
                gate=packed_weights(layer.gate),
                up=packed_weights(layer.up),
                down=packed_weights(layer.down),
            )

        step = copy.copy(self)
        step.layers, step.head, step._parts = tuple(map(pack_layer, self.layers)), packed_weights(self.head), {}
        return step

    def on_static_cache(self, rows: int) -> StaticStep | None:
        """The step of so many rows with kernels of its own, if they support it.

        It is the same one until weights or rows change.
        """
        with self._making:
            known = self._static
            if known is not None and not (known.rows == rows and known.is_current()):
                self._static, self._may_be_static = None, True
            if self._static is None and self._may_be_static and settings.kernels:
                self._make_static(rows)
            return self._static if settings.kernels else None

    def on_growing_cache(self, rows: int) -> CppStep | None:
        """The step of so many rows in C++, as for a static cache; None where, or as long as, it is not built."""
        if not (settings.kernels and self._is_for_cpp() and rows <= CppStep.max_rows):
            return None
        is_wanted = settings.ways.get("growing cache") == "C++" if settings.ways is not None else later.is_ready()
        found = self.on_static_cache(rows) if is_wanted else None
        return found if isinstance(found, CppStep) else None

    def _is_for_cpp(self) -> bool:
        if self._for_cpp is None:  # asked at every token, and as true as long as this step is the model's
            self._for_cpp = is_for_cpp(self)
        return self._for_cpp

    def _make_static(self, rows: int) -> None:
        kind: type[StaticStep] | None = None
        if has_kernels(self.embedding) and is_capturable(self):
            kind = CudaGraphStep
        elif is_for_cpp(self):  # asked anew: weights may have moved
            kind = CppStep
        if kind is None or rows > kind.max_rows:
            return
        self._may_be_static = False
        try:
            # it outlives this call, and only inference mode may write to tensors made in inference mode
            with torch.inference_mode(False), torch.no_grad():
                self._static = kind(self, rows)
        except Exception as error:  # decoding works without it
            _say("The decode step could not be compiled for a static cache", error)

    def nbytes(self) -> int:
        """Bytes of the weights that products read."""
        return sum(
            tensor.nbytes
            for weights in weights_of_products(self)
            for tensor in weights
            if isinstance(tensor, torch.Tensor)
        )

    def covers(self, inputs: torch.Tensor, cache: Any) -> bool:
        """Whether inputs (B, S, ...) are one token per row, and the cache is filled and of a supported kind."""
        if inputs.shape[1] != 1 or type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
            return False
        kinds: tuple[type, ...] = GROWING_LAYERS
        if type(cache) is StaticCache:
            if inputs.device.type != "cpu":  # reading its length would wait for the device
                return False
            kinds = (StaticLayer,)
        layers = cache.layers
        return (
            len(layers) == len(self.layers)
            and all(type(layer) in kinds for layer in layers)
            and layers[-1].is_initialized
        )

    def next_logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        cache: Any,
        room: GrowingCache,
    ) -> torch.Tensor | None:
        """Logits (B, 1, V) of a decode step; None, without effect, if this is not one that it supports.

        Args:
            input_ids: (B, 1).
            attention_mask: (B, K), 0 for padding.
            position_ids: (B, 1).
            cache: of the previous tokens.
            room: extends a growing cache in place.
        """
        if autocast_dtype(input_ids.device) is not None or not self.covers(input_ids, cache):
            return None
        past = int(cache.get_seq_length())
        is_static = type(cache) is StaticCache
        if is_static and past >= cache.layers[0].max_cache_len:
            return None
        bias = None
        if attention_mask is not None:
            # masks that transformers has prepared, one per layer type, are for the modules
            if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != (input_ids.shape[0], past + 1):
                return None
            if not attention_mask.all():
                if not attention_mask[:, -1].all():  # all scores of a row that sees nothing would be -inf
                    return None
                bias = self.embedding.new_zeros(attention_mask.shape).masked_fill_(attention_mask == 0, float("-inf"))
                bias = bias[:, None, None]
        if position_ids is None:
            position_ids = torch.full((1, 1), past, device=input_ids.device)
        store: Store = partial(room.update, cache)
        if is_static:
            store = partial(_store_in_place, cache, past)
        is_row = len(input_ids) == 1 and input_ids.is_cpu
        with attending_without_plans(input_ids):
            logits = self._logits(
                input_ids,
                position_ids,
                multiply_row if is_row else multiply,
                lambda hidden: RowOperators() if is_row else Operators() if hidden.is_cpu else FewCalls(),
                lambda rotation: partial(self._attend_row if is_row else self._attend_rows, rotation, bias, store),
                is_row=is_row,
            )
        if logits is not None and is_static:
            for layer in cache.layers:
                layer.cumulative_length.add_(1)
        return logits

    def prompt_logits(
        self,
        decoder: Any,
        input_ids: torch.Tensor,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        cache: Any,
        keep: int,
    ) -> torch.Tensor | None:
        """Prefill: the logits (B, keep or S, V) of the last tokens; None, without effect, for an unknown id.

        Args:
            decoder: the model's, which this step is of.
            input_ids: (B, S).
            attention_mask: (B, K), 1 for tokens, 0 for padding, or masks that transformers has prepared.
            position_ids: (B or 1, S).
            cache: any kind, of the previous tokens; it gets S more. None: nothing is cached.
            keep: how many tokens get logits; 0: all.
        """
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(past, past + input_ids.shape[1], device=input_ids.device)[None]
        routes: list[Route] = []

        def operators(hidden: torch.Tensor) -> Operators:
            masks = decoder.layer_masks(hidden, attention_mask, None, cache, structure=self.structure)
            by_modules = not isinstance(masks, Route)
            routes.append(Route(hidden, None, masks) if by_modules else masks)
            return routes[0]

        def attend_of(rotation: tuple[torch.Tensor, torch.Tensor]) -> Callable:
            (route,), kwargs = routes, {} if cache is None else {CACHE_NAME: cache}
            return lambda index, layer, *heads: route.attend(
                layer.attention, route[self.kinds[index]], rotation, kwargs, *heads
            )

        return self._logits(input_ids, position_ids, multiply, operators, attend_of, keep)

    def _logits(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        product: Product,
        operators_for: Callable[[torch.Tensor], Operators],
        attend_of: Callable,
        keep: int = 0,
        is_row: bool = False,
    ) -> torch.Tensor | None:
        """The logits (B, keep or S, V) of ids (B, S); a single token has shape (D,), which takes fewer calls."""
        with reading_weights_once(input_ids, self.embedding.dtype), self.below_autograd():
            try:
                if isinstance(self.embedding, Table):
                    hidden = self.embedding.rows(input_ids)
                else:
                    hidden = nn.functional.embedding(input_ids, self.embedding)
            except IndexError:  # the modules raise the error
                return None
            operators = operators_for(hidden)
            attend = attend_of(self.rotary.forward(hidden, position_ids))
            x = hidden.view(-1) if is_row else hidden
            for index, (layer, parts) in enumerate(zip(self.layers, self._parts_for(product), strict=True)):
                x = run_layer(parts, x, operators, partial(attend, index, layer))
            if keep and not is_row:
                x = x[:, -keep:]
            (x,) = operators.norm_for(self.norm, x, 1)
            logits = softcap(product(x, self.head), self.cap)
            return logits.view(len(input_ids), -1, logits.shape[-1])

    def _parts_for(self, product: Product) -> tuple[LayerParts, ...]:
        if product not in self._parts:
            self._parts[product] = tuple(self._layer_parts(layer, product) for layer in self.layers)
        return self._parts[product]

    def _layer_parts(self, layer: LayerWeights, product: Product) -> LayerParts:
        def heads(inputs: tuple[torch.Tensor, ...]) -> Sequence[torch.Tensor]:
            return self.apart([product(x, of) for x, of in zip(inputs, layer.heads, strict=False)])

        output, gate, up, down = (
            partial(product, weights=of) for of in (layer.output, layer.gate, layer.up, layer.down)
        )
        return LayerParts(
            layer.attention, layer.input_norm, heads, output, layer.mlp_norm, gate, up, down, layer.activation
        )

    def below_autograd(self) -> AbstractContextManager:
        """Makes calls of torch skip autograd if no gradients are needed, which saves a twelfth of their time."""
        below = self._is_plain and not torch.is_grad_enabled()
        return torch._C._AutoDispatchBelowAutograd() if below else nullcontext()

    def apart(self, products: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Splits a joined product into queries (..., H * E), keys and values (..., G * E)."""
        if len(products) > 1:
            return products
        width = self.groups * self.head_dim
        return products[0].split((self.heads_per_group * width, width, width), -1)

    def _attend_rows(
        self,
        rotation: tuple[torch.Tensor, torch.Tensor],
        bias: torch.Tensor | None,
        store: Store,
        index: int,
        layer: LayerWeights,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        """query (B, 1, H, E), key and value (B, 1, G, E) -> (B, 1, H * E); a group's heads are rows of one head."""
        shape = (len(query), self.groups, -1, self.head_dim)
        query, key, value = query.view(shape), key.view(shape), value.view(shape)
        if layer.attention.use_rope:
            query, key = apply_rotary_pos_emb(query, *rotation), apply_rotary_pos_emb(key, *rotation)
        key, value = store(key, value, index)
        return self._attend(layer, query, key, value, bias).reshape(len(query), 1, -1)

    def _attend_row(
        self,
        rotation: tuple[torch.Tensor, torch.Tensor],
        bias: torch.Tensor | None,
        store: Store,
        index: int,
        layer: LayerWeights,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
    ) -> torch.Tensor:
        """query (H, E), key and value (G, E) -> (H * E,), with query and key rotated together."""
        heads, groups, width = len(query), len(key), self.head_dim
        if layer.attention.use_rope:
            cos, sin = (x.view(2, -1) for x in rotation)
            sin = torch.stack((-sin[0], sin[1]))  # signs for adding the other half
            both, rotated = torch.cat((query, key)), cos.numel()
            halves = (both if rotated == width else both[:, :rotated]).view(heads + groups, 2, -1)
            turned = torch.addcmul(halves * cos, halves.flip(1), sin).view(heads + groups, rotated)
            both = turned if rotated == width else torch.cat((turned, both[:, rotated:]), 1)
            query, key = both.narrow(0, 0, heads), both.narrow(0, heads, groups)
        key, value = store(key.view(1, groups, 1, width), value.view(1, groups, 1, width), index)
        return self._attend(layer, query.view(1, groups, -1, width), key, value, bias).reshape(-1)

    def _attend(
        self,
        layer: LayerWeights,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """query (B, G, H / G, E), key and value (B, G, K, E), bias (B, 1, 1, K) -> (B, G, H / G, E)."""
        if layer.window is not None and key.shape[2] > layer.window:
            key, value = key[:, :, -layer.window :], value[:, :, -layer.window :]
        seen = bias if bias is None else bias[..., -key.shape[2] :]
        return scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=self.scaling)


class FewCalls(Operators):
    """Norms with half as many kernels."""

    def norm(self, norm: Any, x: torch.Tensor) -> torch.Tensor:
        return norm.weight * rms_norm(x.float(), (x.shape[-1],), eps=norm.variance_epsilon).to(x.dtype)


class RowOperators(FewCalls):
    """One token (D,) on a CPU, with as few calls of torch as possible.

    A call costs some microseconds whatever it computes. A module's norm makes a dozen: 70 microseconds per token on
    two slow AVX2 cores, where this takes 6 to 15.
    """

    def norm(self, norm: Any, x: torch.Tensor) -> torch.Tensor:
        if x.ndim > 1:  # heads
            return super().norm(norm, x)
        wide = x.float()
        mean = torch.dot(wide, wide).item() / x.shape[0] + norm.variance_epsilon
        return norm.weight * (x * (mean**-0.5 if mean else math.inf))


def _store_in_place(
    cache: Any, past: int, key: torch.Tensor, value: torch.Tensor, index: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Writes a token's key and value (B, G, 1, E) into a static cache, whose length is updated after all layers."""
    keys, values = cache.layers[index].keys, cache.layers[index].values
    keys[:, :, past : past + 1] = key
    values[:, :, past : past + 1] = value
    return keys[:, :, : past + 1], values[:, :, : past + 1]


def _say(what: str, error: Exception) -> None:
    """Warns once per process in one line; the compiler's pages of output are logged at level info."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    logger.warning_once(f"{what}: {reason}")
    logger.info(what, exc_info=error)


@contextmanager
def attending_without_plans(input_ids: torch.Tensor) -> Iterator[None]:
    """Turns off cuDNN's attention on CUDA, which makes a new plan for every number of keys."""
    if input_ids.device.type != "cuda" or not torch.backends.cuda.cudnn_sdp_enabled():
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def _weights_of(layer: Any, window: int | None) -> LayerWeights:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerWeights(
        attention=attention,
        input_norm=layer.input_layernorm,
        heads=tuple(weights_of(module) for module in (attention.q_proj, attention.k_proj, attention.v_proj)),
        output=weights_of(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm,
        gate=weights_of(mlp.gate_proj),
        up=weights_of(mlp.up_proj),
        down=weights_of(mlp.down_proj),
        activation=mlp.act_fn,
        window=window,
    )


# model -> state, step, and the modules and parameters of the state
_steps: "WeakKeyDictionary[nn.Module, tuple[Any, DecodingStep, tuple]]" = WeakKeyDictionary()


__all__ = ["DecodingStep"]
