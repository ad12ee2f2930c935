"""The layers of a model whose weights stay in the blocks of a GGUF file.

Their weight is a parameter of bytes, in the order of `formats.tiled`, which no optimizer trains.
"""

import sys
from typing import Any

import torch
from torch import nn

from hf_decoder.engine.assumptions import register
from hf_decoder.engine.quantized.formats import FORMATS, TILE, Format
from hf_decoder.engine.quantized.products import BlockWeights, multiply_blocks, unpacked_rows


class PackedLinear(nn.Linear):
    """A linear map of packed weights. Adapters train on top of it, and cannot be merged into it."""

    def __init__(self, inputs: int, outputs: int, format_name: str, bias: bool = False):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.format_name = inputs, outputs, format_name
        self.weight = _room(inputs, outputs, self.form)
        self.register_parameter("bias", nn.Parameter(torch.empty(outputs)) if bias else None)

    @property
    def form(self) -> Format:
        return FORMATS[self.format_name]

    def weights(self) -> BlockWeights:
        """What it multiplies with, the same tensors at every call."""
        return BlockWeights(self.weight, self.bias, self.form, self.out_features, self.in_features)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return multiply_blocks(input, self.weights())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.format_name}"


class PackedEmbedding(nn.Module):
    """A table of packed rows."""

    max_norm = None

    def __init__(self, entries: int, width: int, format_name: str, dtype: torch.dtype):
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.format_name, self.dtype = entries, width, format_name, dtype
        self.weight = _room(width, entries, self.form)

    @property
    def form(self) -> Format:
        return FORMATS[self.format_name]

    def weights(self) -> BlockWeights:
        return BlockWeights(self.weight, None, self.form, self.num_embeddings, self.embedding_dim)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return unpacked_rows(input, self.weights(), self.dtype)

    def _apply(self, fn, recurse=True):
        """As of any module; `to(dtype)` changes the type of the rows, since it leaves bytes alone."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.format_name}"


class Table:
    """Stands where the decoding step has an embedding's weight."""

    def __init__(self, module: PackedEmbedding):
        self.module = module
        self.shape = (module.num_embeddings, module.embedding_dim)

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def device(self) -> torch.device:
        return self.module.weight.device

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        return self.module.forward(ids)

    def data_ptr(self) -> int:
        return self.module.weight.data_ptr()

    def new_zeros(self, *shape: Any) -> torch.Tensor:
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)


def _room(inputs: int, outputs: int, form: Format) -> nn.Parameter:
    shape = -(-outputs // TILE) * TILE, form.row_bytes(inputs)
    return nn.Parameter(torch.empty(shape, dtype=torch.uint8), requires_grad=False)


register(sys.modules[__name__])

__all__ = ["PackedEmbedding", "PackedLinear", "Table"]
