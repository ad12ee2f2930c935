"""Matrix products of a decode step: a few rows times a weight matrix, at the speed of memory.

Shapes: M outputs, N inputs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from hf_decoder.engine.assumptions import PLAIN
from hf_decoder.engine.int8 import Int8Weights, int8_linear, int8_weights
from hf_decoder.engine.precision import MIN_HALF_ROWS, fast_dtype, linear_in_parts, product_dtype

SPLIT, MIN_SPLIT_ELEMENTS = 4, 2**17
MAX_TRANSPOSED_ROWS = 16
HALF_PRECISION = (torch.bfloat16, torch.float16)


class Weights(NamedTuple):
    """The tensors of a linear layer."""

    weight: torch.Tensor  # (M, N)
    bias: torch.Tensor | None  # (M,)


class PackedWeights(NamedTuple):
    """The tensors of a linear layer, the weight packed by oneDNN."""

    packed: torch.Tensor
    bias: torch.Tensor | None


AnyWeights = Weights | PackedWeights | Int8Weights


@contextmanager
def reading_weights_once(input_ids: torch.Tensor, dtype: torch.dtype) -> Iterator[None]:
    """Makes torch use its own matrix-vector kernel for a single token in half precision on an AVX-512 CPU.

    It reads 42 to 48 GB/s of weights (two cores, bf16) and oneDNN's 23 to 32; plain reading gives 52.
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
    torch._C._set_mkldnn_enabled(False)  # only this flag; torch.backends.mkldnn.flags sets others too and warns
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(True)


def weights_of(module: nn.Linear) -> AnyWeights:
    """The module's own tensors, the same objects at every call."""
    return int8_weights(module.weight, module.bias) or Weights(module.weight, module.bias)


def _plain(weights: AnyWeights) -> Weights | None:
    """These weights if they are not quantized; quantized ones have their own products and layout."""
    return weights if isinstance(weights, Weights) and type(weights.weight) in PLAIN else None


def joined(several: Sequence[AnyWeights]) -> tuple[AnyWeights, ...]:
    """Joins the weights of several products into one with outputs side by side, if they can be joined."""
    plain = [weights for weights in map(_plain, several) if weights is not None]
    biases = [weights.bias for weights in plain if weights.bias is not None]
    if len(plain) < len(several) or len(biases) not in (0, len(several)):
        return tuple(several)
    weight = torch.cat([weights.weight.detach() for weights in plain])
    return (Weights(weight, torch.cat(biases) if biases else None),)


def packed_weights(weights: AnyWeights) -> AnyWeights:
    """A copy in oneDNN's fastest layout for a few rows; quantized weights are returned as they are."""
    plain = _plain(weights)
    if plain is None:
        return weights
    return PackedWeights(torch.ops.mkldnn._reorder_linear_weight(plain.weight.detach()), plain.bias)


def multiply(x: torch.Tensor, weights: AnyWeights) -> torch.Tensor:
    """x (..., N) -> (..., M), in the fastest way."""
    if isinstance(weights, PackedWeights):
        return torch.ops.mkldnn._linear_pointwise(x, weights.packed, weights.bias, "none", [], "")
    if isinstance(weights, Weights) and _may_be_turned(x, weights.weight):
        return _multiply_turned(x, *weights)
    return multiply_as_modules(x, weights)


def multiply_as_modules(x: torch.Tensor, weights: Weights | Int8Weights) -> torch.Tensor:
    """x (..., N) -> (..., M), with the same bits as a call of the linear layer, under autocast too."""
    dtype = product_dtype(x)
    if isinstance(weights, Int8Weights):
        return int8_linear(x.to(dtype), weights)
    # quantized weights have their own products
    in_parts = type(weights.weight) in PLAIN and _rows(x) >= MIN_HALF_ROWS
    if in_parts and fast_dtype(x.device, dtype) != dtype:
        with torch.autocast(x.device.type, enabled=False):
            return linear_in_parts(x.to(dtype), *weights)
    return linear(x, *weights)


def multiply_row(x: torch.Tensor, weights: AnyWeights) -> torch.Tensor:
    """x (N,) -> (M,), on a CPU, in few calls.

    MKL's fp32 matrix-vector product uses one thread, so a large weight becomes a batch of parts: 7 to 17 GB/s on two
    AVX2 cores against 5 to 11, the larger the faster.
    """
    weight: Any = weights[0]
    if not isinstance(weights, Weights) or type(weight) not in PLAIN:
        return multiply(x.view(1, 1, -1), weights).view(-1)
    in_parts = weight.dtype == torch.float32 and weight.numel() >= MIN_SPLIT_ELEMENTS
    if in_parts and weight.shape[0] % SPLIT == 0 and weight.is_contiguous():
        inputs = weight.shape[1]
        # with a column's strides; with a row's strides MKL chooses a kernel slower than the single product
        column = x.as_strided((SPLIT, inputs, 1), (0, 1, inputs))
        product = torch.bmm(weight.view(SPLIT, -1, inputs), column).view(-1)
    else:
        product = torch.mv(weight, x)
    return product if weights.bias is None else product + weights.bias


def _rows(x: torch.Tensor) -> int:
    return x.shape[:-1].numel()


def _may_be_turned(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x (..., N) is a few rows in fp32 on a CPU.

    MKL multiplies weight by rows about twice as fast as rows by weight (40M parameters, 24 tokens: 0.53 against 1.05 s
    for two rows, 0.55 against 1.31 for four, 0.90 against 1.40 for eight, 1.19 against 1.56 for sixteen).
    """
    if type(weight) not in PLAIN or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return False
    return 1 < _rows(x) <= MAX_TRANSPOSED_ROWS


def _multiply_turned(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t().contiguous().view(*x.shape[:-1], -1)
    return product if bias is None else product + bias


__all__ = [
    "AnyWeights",
    "PackedWeights",
    "Weights",
    "joined",
    "multiply",
    "multiply_as_modules",
    "multiply_row",
    "packed_weights",
    "reading_weights_once",
    "weights_of",
]
