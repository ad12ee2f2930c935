"""A growing KV cache in buffers with space for more tokens.

`DynamicLayer` copies its whole cache into new tensors for every token. Here a token is written in place.

Shapes: B rows, G key/value heads, K cached tokens, E head_dim.
"""

from collections.abc import Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import ref

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

LEAST_BYTES = 2**17  # of a layer's keys; copying fewer is cheaper than the calls below
ROOM_SHARE = 8  # a buffer reserves space for one token per so many cached ones
LEAST_ROOM = 32  # tokens, in buffers that the C++ step fills

Pair = tuple[torch.Tensor, torch.Tensor]


class _Left(NamedTuple):
    """The tensors of a layer after its last update, and the buffers that contain them, if any."""

    layer: ref
    keys: torch.Tensor
    values: torch.Tensor
    buffers: Pair | None


class Buffers:
    """All layers in buffers, in the shape of a static cache: what the C++ step fills."""

    def __init__(self, pairs: Sequence[Any], length: int, dropped: Sequence[int]):
        """length: the tokens that are there; dropped: those of each layer that its window has left behind."""
        self.pairs, self.length, self.dropped = pairs, length, dropped
        self._space = min(keys.shape[2] + behind for (keys, _), behind in zip(pairs, dropped, strict=True))
        self._filled = torch.zeros((), dtype=torch.int64, device="cpu")  # the step counts in there
        self.layers = [
            SimpleNamespace(
                keys=keys, values=values, dropped=behind, cumulative_length=self._filled, is_initialized=True
            )
            for (keys, values), behind in zip(pairs, dropped, strict=True)
        ]

    @classmethod
    def empty(cls, layers: int, rows: int, groups: int, length: int, width: int, dtype: torch.dtype) -> "Buffers":
        """Space for so many tokens."""
        shape = (2, rows, groups, length, width)
        pairs = [torch.empty(shape, dtype=dtype, device="cpu").unbind() for _ in range(layers)]
        return cls(pairs, 0, [0] * layers)

    def get_seq_length(self) -> int:
        return self.length

    def room(self) -> int:
        """For how many tokens more there is space."""
        return self._space - self.length


class GrowingCache:
    """Extends a cache in place during one call of `generate()`.

    Each position of a buffer is written once, so earlier states of a layer stay as they were. If other code has
    cropped, reordered or extended a layer, its buffers start again.
    """

    def __init__(self, windows: Sequence[int | None] = ()) -> None:
        """windows: of the model's layers, which `buffers` needs."""
        self._windows = windows
        self._left: dict[int, _Left] = {}  # by the layer's index
        self._buffers: Buffers | None = None  # of all layers

    def update(self, cache: Any, key: torch.Tensor, value: torch.Tensor, index: int) -> Pair:
        """Adds a token's key and value (B, G, 1, E); returns the layer's (B, G, K + 1, E), as `cache.update`."""
        layer = cache.layers[index]
        keys = layer.keys
        if type(layer) is not DynamicLayer or keys.nbytes < LEAST_BYTES or not _is_in_place(key):
            return cache.update(key, value, index)
        left, buffers = self._left.get(index), None
        if left is None or left.keys is not keys or left.values is not layer.values:
            # Reserves space from the second token on; a single token would pay for a copy.
            now = cache.update(key, value, index)
        else:
            length, buffers = keys.shape[2], left.buffers
            if buffers is None or buffers[0].shape[2] == length:
                buffers = _with_room(keys), _with_room(layer.values)
            buffers[0].narrow(2, length, 1).copy_(key)
            buffers[1].narrow(2, length, 1).copy_(value)
            now = buffers[0].narrow(2, 0, length + 1), buffers[1].narrow(2, 0, length + 1)
            layer.keys, layer.values = now
        self._left[index] = _Left(ref(layer), now[0], now[1], buffers)
        return now

    def buffers(self, cache: Any, dtype: torch.dtype) -> Buffers | None:
        """What the cache holds, with room for one token more; None where its layers are not of one length.

        Once the token is there, `extend` says so to the cache.
        """
        layers: list[Any] = cache.layers if holds_all_seen(cache, self._windows) else []
        if not layers:
            return None
        kept, length = self._buffers, layers[0].get_seq_length()
        if (
            (kept is not None and kept.room() > 0 and kept.length == length)  # torch's step may have written a token
            and all(map(self._is_left, count(), layers, kept.pairs))
        ):
            return kept
        for layer, window in zip(layers, self._windows, strict=True):
            if not (layer.is_initialized and layer.keys.ndim == 4 and layer.get_seq_length() == length):
                return None
            if layer.keys.shape[2] != _seen(layer, window, length):
                return None
            if layer.keys.dtype != dtype or not _is_in_place(layer.keys):
                return None
        pairs = [(_with_room(layer.keys, LEAST_ROOM), _with_room(layer.values, LEAST_ROOM)) for layer in layers]
        self._buffers = Buffers(pairs, length, [length - layer.keys.shape[2] for layer in layers])
        return self._buffers

    def _is_left(self, index: int, layer: Any, buffers: Pair) -> bool:
        """Whether a layer is as `extend` left it, in these buffers."""
        was = self._left.get(index)
        return was is not None and was.keys is layer.keys and was.values is layer.values and was.buffers is buffers

    def is_before_prompt(self, cache: Any) -> bool:
        """Whether nothing is in any layer of a cache yet, which `buffers` takes."""
        return holds_all_seen(cache, self._windows) and not any(layer.is_initialized for layer in cache.layers)

    def for_prompt(
        self, cache: Any, rows: int, groups: int, tokens: int, width: int, dtype: torch.dtype
    ) -> Buffers | None:
        """Empty buffers for so many tokens and some more; None where the cache is not an empty one for them."""
        if not self.is_before_prompt(cache):
            return None
        self._buffers = Buffers.empty(len(cache.layers), rows, groups, tokens + LEAST_ROOM, width, dtype)
        return self._buffers

    def extend(self, cache: Any, buffers: Buffers, tokens: int = 1) -> None:
        """Makes the tokens that the buffers got a part of the cache."""
        buffers.length += tokens
        for index, (layer, pair) in enumerate(zip(cache.layers, buffers.pairs, strict=True)):
            if not layer.is_initialized:
                layer.lazy_initialization(*pair)
            seen, stored = _seen(layer, self._windows[index], buffers.length), buffers.length - buffers.dropped[index]
            layer.keys, layer.values = (buffer.narrow(2, stored - seen, seen) for buffer in pair)
            if type(layer) is DynamicSlidingWindowLayer:
                layer.cumulative_length = buffers.length
            self._left[index] = _Left(ref(layer), layer.keys, layer.values, pair)

    def end(self) -> None:
        """Releases the reserved space of layers that outlive the call: a view is saved with its whole buffer."""
        for left in self._left.values():
            layer = left.layer()
            if left.buffers is None or layer is None or layer.keys is not left.keys or layer.values is not left.values:
                continue
            layer.keys = left.keys.clone(memory_format=torch.contiguous_format)
            layer.values = left.values.clone(memory_format=torch.contiguous_format)
        self._left.clear()
        self._buffers = None


def holds_all_seen(cache: Any, windows: Sequence[int | None]) -> bool:
    """Whether this is a growing cache whose layers keep all that a model of these windows sees."""
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and len(cache.layers) == len(windows)
        and all(
            type(layer) is DynamicLayer
            or (
                type(layer) is DynamicSlidingWindowLayer
                # transformers keeps all tokens for a window of one, and what a crop may bring back
                and 1 < layer.sliding_window == window
                and not layer.record_past
            )
            for layer, window in zip(cache.layers, windows, strict=True)
        )
    )


def _seen(layer: Any, window: int | None, length: int) -> int:
    """How many of `length` tokens a layer's tensors hold."""
    return length if window is None or type(layer) is DynamicLayer else min(length, window - 1)


def _is_in_place(new: torch.Tensor) -> bool:
    # autograd needs the keys of each step; off the CPU, calls cost more than copies
    return new.device.type == "cpu" and not torch.is_grad_enabled()


def _with_room(filled: torch.Tensor, least: int = 1) -> torch.Tensor:
    """A larger buffer that starts with `filled`."""
    rows, groups, length, width = filled.shape
    buffer = filled.new_empty(rows, groups, length + max(length // ROOM_SHARE, least), width)
    buffer.narrow(2, 0, length).copy_(filled)
    return buffer


__all__ = ["Buffers", "GrowingCache", "holds_all_seen"]
