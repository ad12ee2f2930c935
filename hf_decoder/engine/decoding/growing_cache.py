"""A growing KV cache in buffers with space for more tokens.

`DynamicLayer` copies its whole cache into new tensors for every token. Here a token is written in place.

Shapes: B rows, G key/value heads, K cached tokens, E head_dim.
"""

from typing import Any, NamedTuple
from weakref import ref

import torch
from transformers.cache_utils import DynamicLayer

LEAST_BYTES = 2**17  # of a layer's keys; copying fewer is cheaper than the calls below
ROOM_SHARE = 8  # a buffer reserves space for one token per so many cached ones

Pair = tuple[torch.Tensor, torch.Tensor]


class _Left(NamedTuple):
    """The tensors of a layer after its last update, and the buffers that contain them, if any."""

    layer: ref
    keys: torch.Tensor
    values: torch.Tensor
    buffers: Pair | None


class GrowingCache:
    """Extends a cache in place during one call of `generate()`.

    Each position of a buffer is written once, so earlier states of a layer stay as they were. If other code has
    cropped, reordered or extended a layer, its buffers start again.
    """

    def __init__(self) -> None:
        self._left: dict[int, _Left] = {}  # by the layer's index

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

    def end(self) -> None:
        """Releases the reserved space of layers that outlive the call: a view is saved with its whole buffer."""
        for left in self._left.values():
            layer = left.layer()
            if left.buffers is None or layer is None or layer.keys is not left.keys or layer.values is not left.values:
                continue
            layer.keys = left.keys.clone(memory_format=torch.contiguous_format)
            layer.values = left.values.clone(memory_format=torch.contiguous_format)
        self._left.clear()


def _is_in_place(new: torch.Tensor) -> bool:
    # autograd needs the keys of each step; off the CPU, calls cost more than copies
    return new.device.type == "cpu" and not torch.is_grad_enabled()


def _with_room(filled: torch.Tensor) -> torch.Tensor:
    """A larger buffer that starts with `filled`."""
    rows, groups, length, width = filled.shape
    buffer = filled.new_empty(rows, groups, length + max(length // ROOM_SHARE, 1), width)
    buffer.narrow(2, 0, length).copy_(filled)
    return buffer


__all__ = ["GrowingCache"]
