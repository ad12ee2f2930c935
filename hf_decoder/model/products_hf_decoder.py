"""The matrix products of a decoding step: a few rows times a matrix, which is read at the rate of the memory.

Shapes: B rows, M outputs, N inputs.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import finalize

import torch
from torch import nn
from torch.nn.functional import linear

from .blocks_hf_decoder import PLAIN
from .int8_hf_decoder import Int8Weights, int8_linear, int8_weights
from .operators_hf_decoder import operator
from .parts_hf_decoder import MIN_HALF_ROWS, fast_dtype, linear_in_parts, product_dtype

LONG_ROW = 2048
SPLIT, MIN_SPLIT_ELEMENTS = 4, 2**17
MAX_TRANSPOSED_ROWS = 16


class Weights(NamedTuple):
    """What a linear map multiplies with."""

    weight: torch.Tensor  # (M, N)
    bias: torch.Tensor | None  # (M,)


class PackedWeights(NamedTuple):
    """The same, packed by oneDNN, which the compiler takes as an input in no other form than this."""

    handle: torch.Tensor  # () of the packed weight, which is freed with it
    outputs: int  # M
    bias: torch.Tensor | None


AnyWeights = Weights | PackedWeights | Int8Weights


def weights_of(module: nn.Linear) -> AnyWeights:
    """The module's own tensors, the same objects at every call."""
    return int8_weights(module.weight, module.bias) or Weights(module.weight, module.bias)


def _plain(weights: AnyWeights) -> Weights | None:
    """These weights if they are no more than numbers: quantized ones have products, and a layout, of their own."""
    return weights if isinstance(weights, Weights) and type(weights.weight) in PLAIN else None


def joined(several: Sequence[AnyWeights]) -> tuple[AnyWeights, ...]:
    """Weights of one product in place of several, where they can be joined: its outputs lie side by side."""
    plain = [weights for weights in map(_plain, several) if weights is not None]
    biases = [weights.bias for weights in plain if weights.bias is not None]
    if len(plain) < len(several) or len(biases) not in (0, len(several)):
        return tuple(several)
    weight = torch.cat([weights.weight.detach() for weights in plain])
    return (Weights(weight, torch.cat(biases) if biases else None),)


def packed_weights(weights: AnyWeights) -> AnyWeights:
    """A copy in the layout that oneDNN's products of a few rows read fastest; what has a layout of its own stays."""
    plain = _plain(weights)
    if plain is None:
        return weights
    weight = torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach())
    handle = torch.tensor(next(_handles))
    _packed[int(handle)] = weight
    finalize(handle, _packed.pop, int(handle))
    return PackedWeights(handle, weight.shape[0], plain.bias)


def multiply(x: torch.Tensor, weights: AnyWeights) -> torch.Tensor:
    """x (B, 1, N) -> (B, 1, M), in the quickest way."""
    if isinstance(weights, PackedWeights):
        return _packed_linear(x, *weights)
    if isinstance(weights, Weights) and _may_be_turned(x, weights.weight):
        return _multiply_turned(x, *weights)
    return multiply_as_modules(x, weights)


def multiply_as_modules(x: torch.Tensor, weights: Weights | Int8Weights) -> torch.Tensor:
    """x (B, 1, N) -> (B, 1, M), the same numbers that the linear map gives when it is called, under autocast too."""
    dtype = product_dtype(x)
    if isinstance(weights, Int8Weights):
        return int8_linear(x.to(dtype), weights)
    # quantized weights have products of their own; a graph is for any number of rows
    in_parts = type(weights.weight) in PLAIN and not torch.compiler.is_compiling() and x.shape[0] >= MIN_HALF_ROWS
    if in_parts and fast_dtype(x.device, dtype) != dtype:
        with torch.autocast(x.device.type, enabled=False):
            return linear_in_parts(x.to(dtype), *weights)
    return linear(x, *weights)


def multiply_row(x: torch.Tensor, weights: AnyWeights) -> torch.Tensor:
    """x (N,) -> (M,), on a CPU, in few calls.

    MKL's matrix-vector product of fp32 keeps to one thread: parts of a weight, as a batch, do not. Measured on two
    AVX2 cores: 7 to 17 GB/s of weights against 5 to 11, the larger the faster.
    """
    weight: Any = weights[0]
    if not isinstance(weights, Weights) or type(weight) not in PLAIN:
        return multiply(x.view(1, 1, -1), weights).view(-1)
    in_parts = weight.dtype == torch.float32 and weight.numel() >= MIN_SPLIT_ELEMENTS
    if in_parts and weight.shape[0] % SPLIT == 0 and weight.is_contiguous():
        inputs = weight.shape[1]
        # a column by its strides too: with those of a row MKL takes a kernel that is slower than the one product
        column = x.as_strided((SPLIT, inputs, 1), (0, 1, inputs))
        product = torch.bmm(weight.view(SPLIT, -1, inputs), column).view(-1)
    else:
        product = torch.mv(weight, x)
    return product if weights.bias is None else product + weights.bias


def _may_be_turned(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x (B, 1, N) is a few rows in fp32 on a CPU.

    MKL multiplies the weight by these, not these by the weight, about twice as fast (40M parameters, 24 tokens: 0.53
    against 1.05 s of two rows, 0.55 against 1.31 of four, 0.90 against 1.40 of eight, 1.19 against 1.56 of sixteen).
    """
    if type(weight) not in PLAIN or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return False
    # a graph is for any number of rows
    return x.shape[0] > 1 and (torch.compiler.is_compiling() or x.shape[0] <= MAX_TRANSPOSED_ROWS)


def _multiply_turned(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = torch.mm(weight, x.squeeze(1).t()).t().contiguous().unsqueeze(1)
    return product if bias is None else product + bias


def multiply_written_out(x: torch.Tensor, weights: AnyWeights) -> torch.Tensor:
    """x (1, 1, N) -> (1, 1, M): a sum that the compiler fuses with what comes before and after it.

    Measured on two cores in bf16, one step of 40M parameters: 1.9 ms against 2.7 with matrix products called from the
    graph. From rows of some thousand numbers on torch's own kernel is faster (46 against 44 GB/s in a whole step);
    of int8 it reads only two thirds of what such a sum does.
    """
    if isinstance(weights, Int8Weights):
        product = _sums(x, weights.values) * weights.scales.float().view(-1)
    elif isinstance(weights, PackedWeights) or weights.weight.shape[1] > LONG_ROW:
        return multiply_row(x.view(-1), weights).view(1, 1, -1)
    else:
        product = _sums(x, weights.weight)
    if weights.bias is not None:
        product = product + weights.bias.float()
    return product.to(x.dtype).view(1, 1, -1)


def _sums(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (1, 1, N), weight (M, N) -> (M,) in fp32.

    The compiler makes one loop of parts of equal shape, with a running sum for each: a single one waits for itself.
    Measured on two cores: 26 against 17 GB/s of int8 weights, 31 against 28 of bf16; eight parts 24 and 28.
    """
    x = x.float().view(1, -1)
    parts = next(parts for parts in (4, 2, 1) if weight.shape[0] % parts == 0)
    return torch.cat([(x * rows.float()).sum(-1) for rows in weight.chunk(parts)])


_handles = itertools.count()
_packed: dict[int, torch.Tensor] = {}


def _multiply_packed(x: torch.Tensor, handle: torch.Tensor, outputs: int, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, _packed[int(handle)], bias, "none", [], "")


# the compiler takes oneDNN's own operator with constant weights alone
_packed_linear = operator(
    "packed_linear(Tensor x, Tensor handle, int outputs, Tensor? bias) -> Tensor",
    _multiply_packed,
    lambda x, handle, outputs, bias: x.new_empty(*x.shape[:-1], outputs),
)

__all__ = [
    "AnyWeights",
    "PackedWeights",
    "Weights",
    "joined",
    "multiply",
    "multiply_as_modules",
    "multiply_row",
    "multiply_written_out",
    "packed_weights",
    "weights_of",
]
