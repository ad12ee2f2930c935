"""The decoding step: one new token a row through the whole decoder, as one short function of tensors.

`generate()` spends most of a step on what surrounds the arithmetic. Here one token meets the weights directly: without
the calls of a hundred modules, without masks where nothing is hidden, with the query heads of a group side by side, so
that their keys are read once, and with matrix-vector kernels that read the weights at the rate of the memory. With a
static cache on a CPU the same function is compiled into one graph, or, for several rows, has its weights packed.
`DecodingStep.of` asks whether nothing hangs on the modules that a direct way would pass by.

Shapes: B rows, D hidden_size, H query heads, G key/value heads, E head_dim, K cached tokens and the new one, V
vocab_size.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from threading import Lock
from types import FunctionType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
)
from transformers.utils import logging

from .blocks_hf_decoder import PLAIN, has_kernels
from .cache_room_hf_decoder import CacheRoom
from .captured_step_hf_decoder import CapturedStep, is_capturable
from .loss_hf_decoder import softcap
from .native_step_hf_decoder import NativeStep, is_for_native
from .parts_hf_decoder import autocast_dtype
from .plain_modules_hf_decoder import parts_of
from .products_hf_decoder import (
    AnyWeights,
    PackedWeights,
    Weights,
    joined,
    multiply,
    multiply_written_out,
    packed_weights,
    weights_of,
)
from .rotary_hf_decoder import apply_rotary_pos_emb
from .row_step_hf_decoder import attention_by_groups, decode_row, normed_in_few_calls
from .static_step_hf_decoder import StaticStep, weights_of_products

logger = logging.get_logger(__name__)

Norm = Callable[[torch.Tensor], torch.Tensor]
Store = Callable[[torch.Tensor, torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]

GROWING_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)
HALF_PRECISION = (torch.bfloat16, torch.float16)


class LayerParts(NamedTuple):
    """What one layer computes with."""

    attention: nn.Module
    input_norm: Norm
    heads: tuple[AnyWeights, ...]  # of queries, keys and values, each by itself or all joined
    query_norm: Norm | None
    key_norm: Norm | None
    output: AnyWeights
    mlp_norm: Norm
    gate: AnyWeights
    up: AnyWeights
    down: AnyWeights
    activation: nn.Module
    use_rope: bool
    window: int | None


class DecodingStep:
    """One token a row: ids (B, 1) in, logits (B, 1, V) out, the cache one token longer."""

    def __init__(self, model: Any):
        decoder, config = model.model, model.config
        self.embedding = decoder.embed_tokens.weight
        self.rotary = decoder.rotary_emb.forward
        self.layers = tuple(_parts(layer) for layer in decoder.layers[: config.num_hidden_layers])
        self.norm = decoder.norm.forward
        self.head: AnyWeights = weights_of(model.lm_head)
        self.cap = config.final_logit_softcapping
        self.groups, self.head_dim = config.num_key_value_heads, config.head_dim
        self.heads_per_group = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self._compiled: dict[bool, Callable] = {}  # for packed weights, and for others; shared by copies
        self._static: StaticStep | None = None
        self._may_be_static = True
        self._making = Lock()
        weights = [of[0] for of in weights_of_products(self) if isinstance(of, Weights)]
        # others may need what stands between autograd and their kernels
        self._is_plain = all(type(weight) in PLAIN for weight in (self.embedding, *weights))

    @staticmethod
    def of(model: Any) -> "DecodingStep | None":
        """The model's step, the same one as long as its parts are the same; None where modules must be called."""
        parts = parts_of(model)
        if parts is None:
            _steps.pop(model, None)
            return None
        known = _steps.get(model)
        if known is not None and known[0] == parts:
            return known[1]
        step = DecodingStep(model)
        _steps[model] = parts, step
        return step

    def packed(self) -> "DecodingStep":
        """A step with copies of the weights in the layout that oneDNN's matrix products of a few rows read fastest.

        Measured on two cores with eight rows in bf16: 28 to 46 GB/s of weights against 11 to 19.
        """

        def pack_layer(layer: LayerParts) -> LayerParts:
            return layer._replace(
                heads=tuple(packed_weights(weights) for weights in joined(layer.heads)),
                output=packed_weights(layer.output),
                gate=packed_weights(layer.gate),
                up=packed_weights(layer.up),
                down=packed_weights(layer.down),
            )

        step = copy.copy(self)
        step.layers, step.head = tuple(pack_layer(layer) for layer in self.layers), packed_weights(self.head)
        return step

    def on_static_cache(self, rows: int) -> StaticStep | None:
        """The step of so many rows by kernels of its own, where they cover it.

        It is the same one as long as weights and rows stay the same.
        """
        with self._making:
            known = self._static
            if known is not None and not (known.rows == rows and known.is_current()):
                self._static, self._may_be_static = None, True
            if self._static is None and self._may_be_static:
                self._make_static(rows)
            return self._static

    def _make_static(self, rows: int) -> None:
        kind: type[StaticStep] | None = None
        if has_kernels(self.embedding) and is_capturable(self):
            kind = CapturedStep
        elif is_for_native(self):
            kind = NativeStep
        if kind is None or rows > kind.max_rows:
            return
        self._may_be_static = False
        try:
            # it outlives this call, and a tensor made in inference mode can be written to there alone
            with torch.inference_mode(False), torch.no_grad():
                self._static = kind(self, rows)
        except Exception as error:  # then without it
            _say("The decoding step could not be compiled for a static cache", error)

    def nbytes(self) -> int:
        """Of the weights that products read."""
        return sum(
            tensor.nbytes
            for weights in weights_of_products(self)
            for tensor in weights
            if isinstance(tensor, torch.Tensor)
        )

    def covers(self, inputs: torch.Tensor, cache: Any) -> bool:
        """Whether inputs (B, S, ...) are one token a row, and the cache is filled and of a kind to extend."""
        if inputs.shape[1] != 1 or type(cache) not in (DynamicCache, StaticCache) or cache.offloading:
            return False
        kinds: tuple[type, ...] = GROWING_LAYERS
        if type(cache) is StaticCache:
            if inputs.device.type != "cpu":  # elsewhere reading the length would wait for the device
                return False
            kinds = (StaticLayer,)
        layers = cache.layers
        return (
            len(layers) == len(self.layers)
            and all(type(layer) in kinds for layer in layers)
            and layers[-1].is_initialized
        )

    def __call__(
        self,
        input_ids: torch.Tensor | None,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        cache: Any,
        room: CacheRoom,
        compiles: bool = False,
    ) -> torch.Tensor | None:
        """Logits (B, 1, V) of one token a row, or None, nothing done, where this is not such a step.

        Args:
            input_ids: (B, 1).
            attention_mask: (B, K), 0 for padding.
            position_ids: (B, 1).
            cache: of the tokens before.
            room: by which a growing cache is extended in place.
            compiles: whether a step on a static cache may be compiled.
        """
        if input_ids is None or autocast_dtype(input_ids.device) is not None or not self.covers(input_ids, cache):
            return None
        static = type(cache) is StaticCache
        past = int(cache.get_seq_length())
        if static and past >= cache.layers[0].max_cache_len:
            return None
        bias = None
        if attention_mask is not None:
            # masks that transformers has prepared, one a layer type, are for the modules
            if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != (input_ids.shape[0], past + 1):
                return None
            if not attention_mask.all():
                if not attention_mask[:, -1].all():  # a row that sees nothing would be all minus infinity
                    return None
                bias = self.embedding.new_zeros(attention_mask.shape).masked_fill_(attention_mask == 0, float("-inf"))
                bias = bias[:, None, None]
        if position_ids is None:
            position_ids = torch.full((1, 1), past, device=input_ids.device)
        with (
            reading_weights_once(input_ids, self.embedding.dtype),
            attending_without_plans(input_ids),
            nullcontext() if compiles and static else self.below_autograd(),
        ):
            try:
                hidden = nn.functional.embedding(input_ids, self.embedding)
            except IndexError:  # the model says it in words
                return None
            cos, sin = self.rotary(hidden, position_ids)
            if not static:
                return self._decode(hidden, cos, sin, bias, partial(room.update, cache))
            keys, values = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
            step = self._decode_static
            # lengths of 0 and 1, and the one that fills the buffer, are special to the compiler: graphs of their own
            if compiles and 1 < past < keys[0].shape[2] - 1:
                step = self._compiled_step()
            logits = step(hidden, cos, sin, bias, keys, values, hidden.new_empty(past, 0))
            for layer in cache.layers:
                layer.cumulative_length.add_(1)
            return logits

    def below_autograd(self) -> AbstractContextManager:
        """Where no gradients are wanted, calls of torch pass autograd by, which takes a twelfth of their time."""
        below = self._is_plain and not torch.is_grad_enabled()
        return torch._C._AutoDispatchBelowAutograd() if below else nullcontext()

    def _decode_static(
        self,
        hidden: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        bias: torch.Tensor | None,
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
        filled: torch.Tensor,
    ) -> torch.Tensor:
        """The step on the buffers of a static cache, of which as many tokens are filled as `filled` has rows."""
        past = filled.shape[0]  # the size of a tensor can vary without a graph for each, a number cannot

        def store(key: torch.Tensor, value: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
            keys[layer][:, :, past : past + 1] = key
            values[layer][:, :, past : past + 1] = value
            return keys[layer][:, :, : past + 1], values[layer][:, :, : past + 1]

        return self._decode(hidden, cos, sin, bias, store)

    def _decode(
        self, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, bias: torch.Tensor | None, store: Store
    ) -> torch.Tensor:
        """hidden (B, 1, D), cos and sin (B or 1, 1, R), bias (B, 1, 1, K) -> logits (B, 1, V)."""
        rows, compiling, on_cpu = hidden.shape[0], torch.compiler.is_compiling(), hidden.device.type == "cpu"
        if rows == 1 and on_cpu and not compiling:
            return decode_row(self, hidden, cos, sin, bias, store)
        product = multiply_written_out if compiling and rows == 1 else multiply
        attend = _attention_written_out if compiling else attention_by_groups
        normed = _normed if on_cpu else normed_in_few_calls
        for index, layer in enumerate(self.layers):
            x = normed(layer.input_norm, hidden)
            query, key, value = self._heads([product(x, weights) for weights in layer.heads])
            if layer.query_norm is not None and layer.key_norm is not None:
                query, key = normed(layer.query_norm, query), normed(layer.key_norm, key)
            if layer.use_rope:
                query, key = apply_rotary_pos_emb(query, key, cos, sin)
            key, value = store(key, value, index)
            if layer.window is not None and key.shape[2] > layer.window:
                key, value = key[:, :, -layer.window :], value[:, :, -layer.window :]
            seen = bias if bias is None else bias[..., -key.shape[2] :]
            attended = attend(query, key, value, seen, self.scaling)
            hidden = hidden + product(attended.reshape(rows, 1, -1), layer.output)
            x = normed(layer.mlp_norm, hidden)
            x = layer.activation(product(x, layer.gate)) * product(x, layer.up)
            hidden = hidden + product(x, layer.down)
        return softcap(product(normed(self.norm, hidden), self.head), self.cap)

    def _heads(self, products: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query (B, G, H / G, E), key and value (B, G, 1, E) of the products of a layer's weights for heads."""
        query, key, value = self.apart(products)
        shape = (query.shape[0], self.groups, -1, self.head_dim)
        return query.view(shape), key.view(shape), value.view(shape)

    def apart(self, products: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Of queries, keys and values, which may be one product, (..., H * E) and twice (..., G * E)."""
        if len(products) > 1:
            return products
        width = self.groups * self.head_dim
        return products[0].split((self.heads_per_group * width, width, width), -1)

    def _compiled_step(self) -> Callable:
        compiled_steps, is_packed = self._compiled, isinstance(self.head, PackedWeights)
        if is_packed not in compiled_steps:
            # a code object of its own: torch limits the graphs of one, and every shape of model has its graphs
            function = type(self)._decode_static
            own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
            compiled = torch.compile(own, fullgraph=True, options=_compiler_options())

            def run(step: DecodingStep, *inputs) -> torch.Tensor:
                _mark_varying_sizes(*inputs)
                try:
                    return compiled(step, *inputs)
                except Exception as error:  # no compiler, or one that fails: then without it
                    _say("The decoding step could not be compiled and runs uncompiled", error)
                    compiled_steps[is_packed] = function
                    return function(step, *inputs)

            compiled_steps[is_packed] = run
        return partial(compiled_steps[is_packed], self)


def _say(what: str, error: Exception) -> None:
    """Once a process, in a line: what a compiler says takes pages, and is there at level info."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    logger.warning_once(f"{what}: {reason}")
    logger.info(what, exc_info=error)


def _compiler_options() -> dict[str, Any]:
    """Products and sums as one instruction: 16 against 14 GB/s of int8 weights a core in the products written out."""
    from torch._inductor import config as inductor_config  # takes long to import

    name = "enable_floating_point_contract_flag"
    is_known = isinstance(getattr(inductor_config.cpp, name, None), str)  # not so in every version of torch
    return {f"cpp.{name}": "fast"} if is_known else {}


def _mark_varying_sizes(
    hidden: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    bias: torch.Tensor | None,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    filled: torch.Tensor,
) -> None:
    """Tells the compiler which sizes vary from call to call: the rows, where there are several, and the lengths."""
    sizes = [(filled, 0)] + [(buffer, 2) for buffer in (*keys, *values)]
    if bias is not None:
        sizes.append((bias, 3))
    if hidden.shape[0] > 1:
        rows = [hidden, cos, sin, *keys, *values] if bias is None else [hidden, cos, sin, bias, *keys, *values]
        sizes += [(tensor, 0) for tensor in rows if tensor.shape[0] > 1]
    for tensor, dimension in sizes:
        if dimension not in getattr(tensor, "_dynamo_dynamic_indices", ()):
            torch._dynamo.mark_dynamic(tensor, dimension)


def _normed(norm: Norm, x: torch.Tensor) -> torch.Tensor:
    return norm(x)


def _attention_written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """`attention_by_groups` in sums that the compiler turns into loops over keys and values in fp32."""
    scores = (query.float()[:, :, :, None] * scaling * key.float()[:, :, None]).sum(-1)
    if bias is not None:
        scores = scores + bias.float()
    weights = torch.softmax(scores, dim=-1)
    return (weights[..., None] * value.float()[:, :, None]).sum(-2).to(query.dtype)


@contextmanager
def reading_weights_once(input_ids: torch.Tensor, dtype: torch.dtype) -> Iterator[None]:
    """For a single token in half precision on an AVX-512 CPU, has torch's matrix-vector kernel in place of oneDNN's.

    Measured on two cores with bf16: 42 to 48 GB/s of weights against 23 to 32, where plain reading gives 52.
    """
    if (
        input_ids.numel() != 1
        or dtype not in HALF_PRECISION
        or input_ids.device.type != "cpu"
        or torch.backends.cpu.get_cpu_capability() != "AVX512"
        or not torch._C._get_mkldnn_enabled()
    ):
        yield
        return
    torch._C._set_mkldnn_enabled(False)  # the flag alone: torch.backends.mkldnn.flags sets others too and warns
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(True)


@contextmanager
def attending_without_plans(input_ids: torch.Tensor) -> Iterator[None]:
    """On CUDA, has attention without cuDNN, which plans it anew for every number of keys."""
    if input_ids.device.type != "cuda" or not torch.backends.cuda.cudnn_sdp_enabled():
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def _parts(layer: Any) -> LayerParts:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerParts(
        attention=attention,
        input_norm=layer.input_layernorm.forward,
        heads=tuple(weights_of(module) for module in (attention.q_proj, attention.k_proj, attention.v_proj)),
        query_norm=attention.q_norm.forward if attention.use_qk_norm else None,
        key_norm=attention.k_norm.forward if attention.use_qk_norm else None,
        output=weights_of(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.forward,
        gate=weights_of(mlp.gate_proj),
        up=weights_of(mlp.up_proj),
        down=weights_of(mlp.down_proj),
        activation=mlp.act_fn,
        use_rope=attention.use_rope,
        window=attention.sliding_window,
    )


# of each model, what its step is made of; these ids stay those of the same objects, because the step holds them
_steps: "WeakKeyDictionary[nn.Module, tuple[Any, DecodingStep]]" = WeakKeyDictionary()


__all__ = ["DecodingStep", "reading_weights_once"]
