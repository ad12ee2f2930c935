"""The base of decode steps with kernels of their own, on a static cache, in C++ or as a CUDA graph.

The kernels read the tensors of a few rows in place, without torch. The base prepares a text and decodes greedily.

Shapes: B rows, S new tokens per row (one, except in prefill), K cached and new tokens, V vocab_size.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection
from threading import Lock
from typing import Any

import torch
from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer

from hf_decoder.engine.assumptions import PLAIN, SILU
from hf_decoder.engine.decoding.growing_cache import Buffers
from hf_decoder.engine.int4 import Int4Weights
from hf_decoder.engine.int8 import Int8Weights
from hf_decoder.engine.precision import autocast_dtype
from hf_decoder.engine.quantized.layers import Table
from hf_decoder.engine.quantized.products import BlockWeights

FIXED_ANGLES = ("default", "linear", "llama3", "yarn", "proportional")  # other types change with the length


class Ends:
    """The tokens that end a row, what pads it from then on, and the rows that have ended."""

    def __init__(self, tokens: Collection[int], pad: int):
        self.tokens, self.pad = tokens, pad
        self.rows: set[int] = set()

    def take(self, text: torch.Tensor, place: int) -> bool:
        """Looks at a place of text (B, length), and pads the rows that ended before it; whether all have ended now."""
        if not self.tokens:
            return False
        for row, token in enumerate(text[:, place].tolist()):
            if row in self.rows:
                text[row, place] = self.pad
            elif token in self.tokens:
                self.rows.add(row)
        return len(self.rows) == len(text)


class StaticStep(ABC):
    """Runs one token per row through the decoder: takes ids, extends the static cache, returns logits."""

    max_rows = 1

    def __init__(self, step: Any, rows: int = 1):
        """step: a `DecodingStep` that `is_for_kernels`.

        Raises:
            ValueError: for more than `max_rows` rows.
        """
        if rows > self.max_rows:
            raise ValueError(f"{type(self).__name__} takes {self.max_rows} rows at most, not {rows}")
        self._step = step
        self.rows = rows
        self.vocab_size = step.embedding.shape[0]
        self.lock = Lock()  # the buffers serve one step at a time
        self._cache: StaticCache | Buffers | None = None
        self._next_past = -1
        self._space = 0  # how many tokens there may be in the cache
        self._windowed: list[Any] = []  # its layers of windows
        self._addresses = _addresses(step)
        device, dtype = step.embedding.device, step.embedding.dtype
        # per row: cached tokens, position of the next token, first token it sees, address of text
        self._state = torch.zeros(rows, 4, dtype=torch.int64, device=device)
        # per layer: addresses of keys, values and the number of cached tokens; for how many tokens there is space
        self._buffers = torch.zeros(len(step.layers), 4, dtype=torch.int64, device=device)
        self._ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self._logits = torch.empty(rows, outputs_of(step.head), dtype=dtype, device=device)

    @abstractmethod
    def _run(self, chooses: bool) -> None:
        """Runs the step on `_ids`; writes `_logits`, the cache and `_state`.

        If it `chooses`, it writes the next token into `_ids` and the text.
        """

    @abstractmethod
    def _write(self, text: torch.Tensor, made: int, ends: Ends) -> int:
        """Chooses the tokens of text (B, length) from `made` on; returns how many there are at the end, or once all
        rows have ended.
        """

    def takes_prompts(self, rows: int, tokens: int) -> bool:
        """Whether `prompt` is faster than the modules for so many rows and tokens."""
        return False

    def is_current(self) -> bool:
        """Whether the weights are still at the addresses that the kernels read."""
        return self._addresses == _addresses(self._step)

    def begin(
        self,
        cache: StaticCache | Buffers,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        text: torch.Tensor | None = None,
        tokens: int = 1,
    ) -> bool:
        """Prepares the next tokens; False if the mask hides other than the first tokens, or the cache is full.

        Args:
            cache: of the previous tokens.
            attention_mask: (B, K), 0 for padding.
            position_ids: (B or 1, S), consecutive; None: from the number of cached tokens on, as in the model.
            text: ids (B, n): the cached ones, the next one, and space for chosen tokens.
            tokens: S.
        """
        goes_on = text is None and self._cache is cache
        layers: list[Any] = cache.layers
        if attention_mask is not None:
            past = attention_mask.shape[1] - tokens
        else:
            past = self._next_past if goes_on else int(cache.get_seq_length())
        if not goes_on:
            self._space = min(layer.keys.shape[2] + _dropped(layer) for layer in layers)
        if past + tokens > self._space:
            return False
        if goes_on and self._next_past == past:
            return True
        firsts = [0] * self.rows
        if attention_mask is not None:
            hidden = first_seen(attention_mask)
            if hidden is None:
                return False
            firsts = hidden
        self._buffers.copy_(torch.tensor([_places(layer) for layer in layers]))
        addresses = [0] * self.rows if text is None else [row.data_ptr() for row in text]
        states = zip(firsts, addresses, strict=True)
        self._state.copy_(torch.tensor([[past, past, first, address] for first, address in states]))
        if position_ids is not None:
            self._state[:, 1].copy_(position_ids[:, -1] - (tokens - 1))
        self._windowed = [layer for layer in layers if type(layer) is StaticSlidingWindowLayer]
        self._cache, self._next_past = cache, past
        return True

    def end(self) -> None:
        """Forgets the cache, which may change before the next call."""
        self._cache, self._windowed = None, []

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids (B, 1) -> logits (B, 1, V), after `begin`."""
        self._ids.copy_(input_ids.view(-1))
        self._run(chooses=False)
        self._extend(1)
        return self._logits.clone().unsqueeze(1)

    def _extend(self, tokens: int) -> None:
        """Counts tokens that the kernels have written. Layers of windows count once more, on the host."""
        self._next_past += tokens
        for layer in self._windowed:
            layer.cumulative_length_int = self._next_past

    def greedy(
        self,
        text: torch.Tensor,
        made: int,
        cache: StaticCache | Buffers,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        ends: Ends,
    ) -> int | None:
        """Continues text (B, length), of which `made` tokens are there; None, without effect, if it cannot begin.

        The cache has all but the last of them. Mask and positions are for them, as in `begin`.

        Returns:
            How many tokens are there at the end, or once all rows have ended. The cache has all but the last.
        """
        if not self.begin(cache, attention_mask, position_ids, text) or self._next_past != made - 1:
            return None
        self._ids.copy_(text[:, made - 1])
        written = self._write(text, made, ends)
        self._extend(written - made)
        self.end()
        layers: list[Any] = cache.layers
        for layer in layers:
            layer.cumulative_length.fill_(written - 1)
        return written


def _dropped(layer: Any) -> int:
    """How many tokens a window has left behind in front of those in a layer of `Buffers`; none in a static cache."""
    return getattr(layer, "dropped", 0)


def _places(layer: Any) -> list[int]:
    """What the kernels know of a layer's cache: see `_buffers`."""
    before = _dropped(layer) * layer.keys.shape[3] * layer.keys.element_size()
    counter = layer.cumulative_length.data_ptr()
    return [layer.keys.data_ptr() - before, layer.values.data_ptr() - before, counter, layer.keys.shape[2]]


def first_seen(attention_mask: torch.Tensor) -> list[int] | None:
    """How many first tokens of each row a mask (B, K) hides with 0; None if it hides others too."""
    hidden = attention_mask == 0
    if not bool(hidden.any()):
        return [0] * len(hidden)
    if bool(hidden[:, -1].any() | (hidden[:, 1:] & ~hidden[:, :-1]).any()):
        return None
    return hidden.sum(1).tolist()


def is_for_static_step(step: Any, input_ids: torch.Tensor, cache: Any) -> bool:
    """Whether the kernels can extend this static cache by these ids."""
    return (
        input_ids.dtype == torch.int64
        and input_ids.device == step.embedding.device
        and type(cache) is StaticCache
        and not cache.offloading
        and len(cache.layers) == len(step.layers)
        # as long as a text fits, a window's layer is filled like the others
        and all(type(layer) in (StaticLayer, StaticSlidingWindowLayer) for layer in cache.layers)
        and autocast_dtype(input_ids.device) is None
    )


def is_for_kernels(step: Any, *kinds: type) -> bool:
    """Whether kernels support this step: weights of these kinds, SiLU, fixed angles."""
    dtype, products = step.embedding.dtype, weights_of_products(step)
    of_type = [norm.weight for norm in _norms(step)]
    if type(step.embedding) is not Table:
        of_type.append(step.embedding)
    elif not step.embedding.module.weights().are_whole():
        return False
    others: list[torch.Tensor] = []
    for of in products:
        if type(of) not in kinds:
            return False
        if isinstance(of, Int8Weights):
            if of.values.dtype != torch.int8 or of.scales.dtype not in (dtype, torch.float32):
                return False
            others += [of.values, of.scales]
        elif isinstance(of, Int4Weights):
            if not of.are_in_blocks() or of.scales.dtype != dtype:
                return False
            others += [of.codes, of.scales]
        elif isinstance(of, BlockWeights):
            if not of.are_whole():
                return False
            others.append(of.blocks)
        else:
            of_type.append(of.weight)
        if of.bias is not None:
            of_type.append(of.bias)
    return (
        all(tensor.dtype == dtype for tensor in of_type)
        and all(type(tensor) in PLAIN and tensor.is_contiguous() for tensor in of_type + others)
        and all(type(layer.activation) in SILU for layer in step.layers)
        and step.rotary.rope_type in FIXED_ANGLES
    )


def weights_of_products(step: Any) -> list[Any]:
    """The weights of all products, the head's first."""
    of_layers = [[*layer.heads, layer.output, layer.gate, layer.up, layer.down] for layer in step.layers]
    return [step.head, *(weights for layer in of_layers for weights in layer)]


def outputs_of(of: Any) -> int:
    """How many numbers a product gives."""
    return of.outputs if isinstance(of, BlockWeights) else of[0].shape[0]


def _norms(step: Any) -> list[Any]:
    """The modules of all norms."""
    of_layers = [(layer.input_norm, layer.query_norm, layer.key_norm, layer.mlp_norm) for layer in step.layers]
    return [norm for norm in (step.norm, *(norm for layer in of_layers for norm in layer)) if norm is not None]


def _addresses(step: Any) -> list[int]:
    products = [tensor for of in weights_of_products(step) for tensor in of if isinstance(tensor, torch.Tensor)]
    return [tensor.data_ptr() for tensor in (step.embedding, *(norm.weight for norm in _norms(step)), *products)]


__all__ = [
    "Ends",
    "StaticStep",
    "first_seen",
    "is_for_kernels",
    "is_for_static_step",
    "outputs_of",
    "weights_of_products",
]
