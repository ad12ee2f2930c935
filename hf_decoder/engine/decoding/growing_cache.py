"""A growing key/value cache in buffers that have room for tokens to come.

`DynamicLayer` joins what it has and what is new into new tensors at every token, which reads and writes all of the
cache where attention reads it once.

Shapes: B rows, G key/value heads, K cached tokens, E head_dim.
"""

from typing import Any, NamedTuple
from weakref import ref

import torch
from transformers.cache_utils import DynamicLayer

LEAST_BYTES = 2**17  # of a layer's keys: joining fewer costs less than the calls that it takes here
ROOM_SHARE = 8  # room for one token more for so many that are there

Pair = tuple[torch.Tensor, torch.Tensor]


class _Left(NamedTuple):
    """What a layer was left with, and the buffers of which that is a part, if it is."""

    layer: ref
    keys: torch.Tensor
    values: torch.Tensor
    buffers: Pair | None


class GrowingCache:
    """Extends a cache in place while one call of `generate()` lasts.

    A place of a buffer is written once. So whoever holds an earlier state of a layer, which is the first K places,
    keeps it as it was; and a layer whose keys are others than it was left with here, since someone else has cut,
    chosen from or extended them, begins anew.
    """

    def __init__(self) -> None:
        self._left: dict[int, _Left] = {}  # by the layer's index

    def update(self, cache: Any, key: torch.Tensor, value: torch.Tensor, index: int) -> Pair:
        """One token's key and value (B, G, 1, E) added, all of the layer's (B, G, K + 1, E), as by `cache.update`."""
        layer = cache.layers[index]
        keys = layer.keys
        if type(layer) is not DynamicLayer or keys.nbytes < LEAST_BYTES or not _is_in_place(key):
            return cache.update(key, value, index)
        left, buffers = self._left.get(index), None
        if left is None or left.keys is not keys or left.values is not layer.values:
            # Reserves space from the second token on: for a single one it would be one copy more.
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
        """Takes the room from layers that outlive the call, since a view is saved with all that it is a view of."""
        for left in self._left.values():
            layer = left.layer()
            if left.buffers is None or layer is None or layer.keys is not left.keys or layer.values is not left.values:
                continue
            layer.keys = left.keys.clone(memory_format=torch.contiguous_format)
            layer.values = left.values.clone(memory_format=torch.contiguous_format)
        self._left.clear()


def _is_in_place(new: torch.Tensor) -> bool:
    # autograd keeps the keys of each step; elsewhere than on a CPU calls cost more than copies
    return new.device.type == "cpu" and not torch.is_grad_enabled()


def _with_room(filled: torch.Tensor) -> torch.Tensor:
    """A buffer that begins with `filled`."""
    rows, groups, length, width = filled.shape
    buffer = filled.new_empty(rows, groups, length + max(length // ROOM_SHARE, 1), width)
    buffer.narrow(2, 0, length).copy_(filled)
    return buffer


__all__ = ["GrowingCache"]
