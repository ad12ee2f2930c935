"""The formats of a GGUF file that stay packed, and the order of their bytes here.

A file holds a row after the other, each in blocks: scales, then codes. Here eight rows lie side by side, a tile: of
each block the scales of all eight, then four codes of each, the next four, and so on, as cpp/quantized.h reads them.
No byte changes.
"""

from typing import NamedTuple

import torch
from torch.nn.functional import pad

TILE = 8


class Format(NamedTuple):
    """One type of GGUF: its number there, columns of a block, and the parts of a block.

    Parts are (bytes, bytes that stay together).
    """

    kind: int
    columns: int
    parts: tuple[tuple[int, int], ...]

    @property
    def block_bytes(self) -> int:
        return sum(size for size, _ in self.parts)

    def row_bytes(self, columns: int) -> int:
        return columns // self.columns * self.block_bytes


_SCALES = (2, 2)  # in fp16
FORMATS = {
    "Q4_0": Format(2, 32, (_SCALES, (16, 4))),
    "Q8_0": Format(8, 32, (_SCALES, (32, 4))),
    "Q4_K": Format(12, 256, (_SCALES, _SCALES, (12, 1), (128, 4))),
    "Q5_K": Format(13, 256, (_SCALES, _SCALES, (12, 1), (32, 4), (128, 4))),
    "Q6_K": Format(14, 256, ((128, 4), (64, 4), (16, 1), _SCALES)),
}


def tiled(rows: torch.Tensor, form: Format) -> torch.Tensor:
    """A file's rows (M, bytes) -> (M', bytes), M' the next multiple of eight; rows that are added are zeros."""
    padded = pad(rows, (0, 0, 0, -len(rows) % TILE))
    blocks = padded.view(len(padded) // TILE, TILE, -1, form.block_bytes)
    parts = [
        part.unflatten(-1, (-1, unit)).permute(0, 2, 3, 1, 4).flatten(2)
        for part, (_, unit) in zip(blocks.split([size for size, _ in form.parts], -1), form.parts, strict=True)
    ]
    return torch.cat(parts, -1).view_as(padded)


__all__ = ["FORMATS", "Format", "tiled"]
