"""A growing KV cache in buffers with space for more tokens.

`DynamicLayer` copies its whole cache into new tensors for every token. Here a token is written in place.

Shapes: B rows, G key/value heads, K cached tokens, E head_dim.
"""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple
from weakref import ref

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer

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
    """All layers in buffers of one length, in the shape of a static cache: what the C++ step fills."""

    def __init__(self, pairs: Sequence[Any], length: int):
        """length: the tokens that are there."""
        self.pairs, self.length = pairs, length
        self._filled = torch.zeros((), dtype=torch.int64, device="cpu")  # the step counts in there
        self.layers = [
            SimpleNamespace(keys=keys, values=values, cumulative_length=self._filled, is_initialized=True)
            for keys, values in pairs
        ]

    @classmethod
    def empty(cls, layers: int, rows: int, groups: int, length: int, width: int, dtype: torch.dtype) -> "Buffers":
        """Room for so many tokens."""
        shape = (2, rows, groups, length, width)
        pairs = [torch.empty(shape, dtype=dtype, device="cpu").unbind() for _ in range(layers)]
        return cls(pairs, 0)

    def get_seq_length(self) -> int:
        return self.length

    def has_room(self) -> bool:
        return self.length < self.pairs[0][0].shape[2]


class GrowingCache:
    """Extends a cache in place during one call of `generate()`.

    Each position of a buffer is written once, so earlier states of a layer stay as they were. If other code has
    cropped, reordered or extended a layer, its buffers start again.
    """

    def __init__(self) -> None:
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
        """What the cache holds, with room for one token more; None where its layers are not of one kind and length.

        Once the token is there, `extend` says so to the cache.
        """
        layers: list[Any] = cache.layers if type(cache) is DynamicCache and not cache.offloading else []
        if not layers or not all(type(layer) is DynamicLayer and layer.is_initialized for layer in layers):
            return None
        found = self._buffers
        if found is not None and found.has_room() and len(layers) == len(found.pairs):
            left = map(self._left.get, range(len(layers)))
            if all(
                was is not None and was.keys is layer.keys and was.values is layer.values and was.buffers is pair
                for was, layer, pair in zip(left, layers, found.pairs, strict=True)
            ):
                return found
        length = layers[0].keys.shape[2]
        if not all(
            _is_in_place(layer.keys) and layer.keys.dtype == dtype and layer.keys.shape[2] == length
            for layer in layers
        ):
            return None
        pairs = [(_with_room(layer.keys, LEAST_ROOM), _with_room(layer.values, LEAST_ROOM)) for layer in layers]
        self._buffers = Buffers(pairs, length)
        return self._buffers

    def for_prompt(
        self, cache: Any, rows: int, groups: int, tokens: int, width: int, dtype: torch.dtype
    ) -> Buffers | None:
        """Empty buffers for so many tokens and some more; None where the cache is not an empty one for them."""
        if not is_empty(cache):
            return None
        self._buffers = Buffers.empty(len(cache.layers), rows, groups, tokens + LEAST_ROOM, width, dtype)
        return self._buffers

    def extend(self, cache: Any, buffers: Buffers, tokens: int = 1) -> None:
        """Makes the tokens that the buffers got a part of the cache."""
        buffers.length += tokens
        for index, (layer, pair) in enumerate(zip(cache.layers, buffers.pairs, strict=True)):
            if not layer.is_initialized:
                layer.lazy_initialization(*pair)
            layer.keys, layer.values = (buffer.narrow(2, 0, buffers.length) for buffer in pair)
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


def is_empty(cache: Any) -> bool:
    """Whether nothing is in any layer of a cache of growing ones yet."""
    return (
        type(cache) is DynamicCache
        and not cache.offloading
        and bool(cache.layers)
        and all(type(layer) is DynamicLayer and not layer.is_initialized for layer in cache.layers)
    )


def _is_in_place(new: torch.Tensor) -> bool:
    # autograd needs the keys of each step; off the CPU, calls cost more than copies
    return new.device.type == "cpu" and not torch.is_grad_enabled()


def _with_room(filled: torch.Tensor, least: int = 1) -> torch.Tensor:
    """A larger buffer that starts with `filled`."""
    rows, groups, length, width = filled.shape
    buffer = filled.new_empty(rows, groups, length + max(length // ROOM_SHARE, least), width)
    buffer.narrow(2, 0, length).copy_(filled)
    return buffer


__all__ = ["Buffers", "GrowingCache", "is_empty"]
