"""Multiplies by the weights of torchao's int4 weight-only quantization for CPUs. Shapes: M outputs, N inputs."""

from functools import cache, partial
from typing import Any, NamedTuple

import torch

from hf_decoder.engine.calibration import bucket, choose, numbers
from hf_decoder.engine.int8 import is_of_torchao
from hf_decoder.engine.precision import PART_ELEMENTS
from hf_decoder.engine.single_precision import multiply_rows

BLOCKS = (32, 64)  # outputs that torch may pack side by side
MEASURED_SIZE, MEASURED_ROWS = 512, 256  # of a measurement; more rows count as 256


class Int4Weights(NamedTuple):
    """The tensors of a quantized linear layer, as cpp/int4.h describes them."""

    codes: torch.Tensor  # (M, N / 2), two codes per byte
    scales: torch.Tensor  # (N / group, M, 2), scale and zero of each group of inputs
    bias: torch.Tensor | None
    group: int

    @property
    def block(self) -> int:
        """How many outputs lie side by side; 0 if that is unknown."""
        return outputs_of_block() or 0

    def are_in_blocks(self) -> bool:
        """Whether all outputs lie in whole blocks of a known order."""
        return self.block > 0 and len(self.codes) % self.block == 0


def int4_weights(weight: Any, bias: torch.Tensor | None) -> Int4Weights | None:
    """The tensors of a quantized weight, the same objects at every call; None for other weights or off the CPU."""
    if (
        is_of_torchao(weight, "Int4OpaqueTensor")
        and weight.act_mapping_type is None  # activations are not quantized
        and weight.act_pre_scale is None
        and len(weight.block_size) == 2
        and weight.block_size[0] == 1
    ):
        found = Int4Weights(weight.qdata, weight.scale_and_zero, bias, weight.block_size[1])
        return found if _is_whole(found, *weight.shape) else None
    return None


def _is_whole(weights: Int4Weights, outputs: int, inputs: int) -> bool:
    """Whether there are as many numbers as C++ will read."""
    codes, scales, _, group = weights
    return (
        inputs % group == 0
        and codes.shape == (outputs, inputs // 2)
        and codes.dtype == torch.uint8
        and scales.shape == (inputs // group, outputs, 2)
    )


def int4_linear(x: torch.Tensor, weights: Int4Weights) -> torch.Tensor:
    """x (..., N) -> (..., M) in x's dtype; like torchao, it takes no notice of autocast.

    torch's kernel takes 13 s for 512 rows of a model of 40M in fp32, on two AVX2 cores, and 0.4 s in bf16.
    """
    dtype, bias = weights.scales.dtype, weights.bias
    rows = x.reshape(-1, x.shape[-1]).to(dtype).contiguous()
    way = "torch"
    with torch.autocast("cpu", enabled=False):
        if len(rows) > 1 and weights.are_in_blocks():
            count = bucket(len(rows), 2, MEASURED_ROWS)
            way = choose("int4 products", (dtype, count), WAYS, partial(_inputs, count, dtype))
        product = WAYS[way](rows, weights)
        product = product if bias is None else product + bias
    return product.view(*x.shape[:-1], len(weights.codes)).to(x.dtype)


def _by_torch(rows: torch.Tensor, weights: Int4Weights) -> torch.Tensor:
    codes, scales, _, group = weights
    return torch.ops.aten._weight_int4pack_mm_for_cpu(rows, codes, group, scales)


def _unpacked(rows: torch.Tensor, weights: Int4Weights) -> torch.Tensor:
    """Rows (R, N) -> (R, M), by weights that are unpacked in parts."""
    outputs, inputs = len(weights.codes), rows.shape[1]
    product, x = rows.new_empty(len(rows), outputs), rows.float()
    size = max(1, PART_ELEMENTS // inputs // weights.block) * weights.block
    for first in range(0, outputs, size):
        part = slice(first, first + size)
        product[:, part] = multiply_rows(x, _unpack(weights, part))
    return product


def _unpack(weights: Int4Weights, part: slice) -> torch.Tensor:
    """Those outputs of the weights (M', N) in fp32; they begin and end with a block."""
    codes, scales, _, group = weights
    inputs = 2 * codes.shape[1]
    pairs = codes[part].reshape(-1, inputs, weights.block // 2)
    halves = torch.stack((pairs & 15, pairs >> 4), 1)  # (M' / block, 2, N, block / 2)
    found = halves.mT.reshape(-1, inputs).float().unflatten(1, (-1, group)).sub_(8)
    scale, zero = scales[:, part].float().permute(2, 1, 0).unsqueeze(-1)
    return found.mul_(scale).add_(zero).flatten(1)


WAYS = {"torch": _by_torch, "unpacked": _unpacked}


def _inputs(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, Int4Weights]:
    size, group = MEASURED_SIZE, 32
    codes = torch.arange(size * size // 2, device="cpu").remainder(251).to(torch.uint8).view(size, -1)
    weights = Int4Weights(codes, numbers(size // group, size, 2, dtype=dtype), None, group)
    return numbers(rows, size, dtype=dtype), weights


@cache
def outputs_of_block() -> int | None:
    """How many outputs torch packs side by side on this machine; None if it packs in an order that is unknown here."""
    codes = torch.arange(64 * 32, dtype=torch.int32, device="cpu").mul(37).remainder(251).remainder(16).view(64, 32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1).flatten()
    for block in BLOCKS:
        low, high = codes.view(-1, 2, block // 2, 32).unbind(1)
        if torch.equal(packed, (low | high << 4).mT.flatten().to(torch.uint8)):
            return block
    return None


__all__ = ["Int4Weights", "int4_linear", "int4_weights", "outputs_of_block"]
