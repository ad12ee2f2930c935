"""Matrix products of a decode step: a few rows times a weight matrix, at the speed of memory.

Shapes: M outputs, N inputs.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from hf_decoder.engine.assumptions import PLAIN
from hf_decoder.engine.calibration import bucket, choose, numbers
from hf_decoder.engine.int4 import Int4Weights, int4_linear, int4_weights
from hf_decoder.engine.int8 import Int8Weights, int8_linear, int8_weights
from hf_decoder.engine.precision import MIN_HALF_ROWS, fast_dtype, linear_in_parts, product_dtype
from hf_decoder.engine.quantized.layers import PackedLinear
from hf_decoder.engine.quantized.products import BlockWeights, multiply_blocks

SPLIT = 4
MAX_TURNED_ROWS = 128  # more are as quick either way
MEASURED_ELEMENTS = 2**23  # of a weight, at most
READ_ELEMENTS = 2**24  # of the weights that are measured in turn: more than caches hold, as in a model
COUNTED_ROWS = 8  # with more of them arithmetic takes longer than reading, and fewer weights are enough
HALF_PRECISION = (torch.bfloat16, torch.float16)


class Weights(NamedTuple):
    """The tensors of a linear layer."""

    weight: torch.Tensor  # (M, N)
    bias: torch.Tensor | None  # (M,)


class PackedWeights(NamedTuple):
    """The tensors of a linear layer, the weight packed by oneDNN."""

    packed: torch.Tensor
    bias: torch.Tensor | None


AnyWeights = Weights | PackedWeights | Int8Weights | Int4Weights | BlockWeights


@contextmanager
def reading_weights_once(input_ids: torch.Tensor, dtype: torch.dtype) -> Iterator[None]:
    """Makes torch use its own matrix-vector kernel for a single token in half precision on a CPU, if that is faster.

    On two AVX-512 cores it reads 42 to 48 GB/s of weights in bf16 and oneDNN's 23 to 32; plain reading gives 52.
    """
    if (
        input_ids.numel() != 1
        or dtype not in HALF_PRECISION
        or input_ids.device.type != "cpu"
        or not torch._C._get_mkldnn_enabled()
        or choose("half a row", (dtype,), _in_turn(HALF_ROW), partial(_row_inputs, 2**12, 2**10, dtype)) == "torch"
    ):
        yield
        return
    with _without_onednn():
        yield


@contextmanager
def _without_onednn() -> Iterator[None]:
    torch._C._set_mkldnn_enabled(False)  # the flag alone: torch.backends.mkldnn.flags sets others too and warns
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(True)


def _row_without_onednn(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with _without_onednn():
        return torch.mv(weight, x)


def _row_in_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (N,) -> (M,). MKL may keep a row of fp32 to one thread: parts of a weight, as a batch, it does not."""
    inputs = weight.shape[1]
    # a column by its strides too: with those of a row MKL takes a kernel that is slower than the one product
    column = x.as_strided((SPLIT, inputs, 1), (0, 1, inputs))
    return torch.bmm(weight.view(SPLIT, -1, inputs), column).view(-1)


def _rows_turned(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (..., N) -> (..., M): MKL may multiply the weight by a few rows faster than these by the weight."""
    return torch.mm(weight, x.reshape(-1, x.shape[-1]).t()).t().contiguous().view(*x.shape[:-1], -1)


def _row_by_torch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.mv(weight, x)


HALF_ROW = {"torch": _row_by_torch, "without oneDNN": _row_without_onednn}
ROW = {"torch": _row_by_torch, "in parts": _row_in_parts}
FEW_ROWS: dict[str, Callable] = {"torch": linear, "turned": _rows_turned}


def _row_inputs(
    outputs: int, inputs: int, dtype: torch.dtype = torch.float32, rows: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (R, N), or (N,) of a single row, and several weights (K, M, N)."""
    x = numbers(rows, inputs, dtype=dtype) if rows else numbers(inputs, dtype=dtype)
    elements = READ_ELEMENTS // max(1, rows // COUNTED_ROWS)
    return x, numbers(max(1, elements // (outputs * inputs)), outputs, inputs, dtype=dtype)


def _in_turn(ways: Mapping[str, Callable]) -> dict[str, Callable]:
    """Candidates that multiply by one weight after another. A single one would stay in the caches."""
    return {name: partial(lambda way, x, weights: [way(x, weight) for weight in weights], ways[name]) for name in ways}


ROWS_IN_TURN, FEW_ROWS_IN_TURN = _in_turn(ROW), _in_turn(FEW_ROWS)


def _sizes(weight: torch.Tensor) -> tuple[int, int]:
    inputs = bucket(weight.shape[1], 2**6, 2**14)
    return bucket(weight.shape[0], 2**6, MEASURED_ELEMENTS // inputs), inputs


def weights_of(module: nn.Linear) -> AnyWeights:
    """The module's own tensors, the same objects at every call."""
    if isinstance(module, PackedLinear):
        return module.weights()
    of = module.weight, module.bias
    return int8_weights(*of) or int4_weights(*of) or Weights(*of)


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
    if isinstance(weights, Weights) and _are_turned(x, weights.weight):
        product = _rows_turned(x, weights.weight)
        return product if weights.bias is None else product + weights.bias
    if isinstance(weights, BlockWeights):
        return multiply_blocks(x, weights)
    if isinstance(weights, Int8Weights):
        return int8_linear(x, weights)
    if isinstance(weights, Int4Weights):
        return int4_linear(x, weights)
    dtype = product_dtype(x)
    # quantized weights have their own products
    in_parts = type(weights.weight) in PLAIN and _rows(x) >= MIN_HALF_ROWS
    if in_parts and fast_dtype(x.device, dtype) != dtype:
        with torch.autocast(x.device.type, enabled=False):
            return linear_in_parts(x.to(dtype), *weights)
    return linear(x, *weights)


def multiply_row(x: torch.Tensor, weights: AnyWeights) -> torch.Tensor:
    """x (N,) -> (M,), on a CPU, in few calls."""
    weight: Any = weights[0]
    if not isinstance(weights, Weights) or type(weight) not in PLAIN:
        return multiply(x.view(1, 1, -1), weights).view(-1)
    way = "torch"
    if weight.dtype == torch.float32 and weight.shape[0] % SPLIT == 0 and weight.is_contiguous():
        sizes = _sizes(weight)
        way = choose("one row", sizes, ROWS_IN_TURN, partial(_row_inputs, *sizes))
    product = ROW[way](x, weight)
    return product if weights.bias is None else product + weights.bias


def _rows(x: torch.Tensor) -> int:
    return x.shape[:-1].numel()


def _are_turned(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether x (..., N) is a few rows in fp32 on a CPU, which are faster so."""
    rows = _rows(x)
    if type(weight) not in PLAIN or x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32:
        return False
    if not 1 < rows <= MAX_TURNED_ROWS:
        return False
    sizes, rows = _sizes(weight), bucket(rows, 2, MAX_TURNED_ROWS)
    inputs = partial(_row_inputs, *sizes, rows=rows)
    return choose("few rows", (rows, *sizes), FEW_ROWS_IN_TURN, inputs) == "turned"


__all__ = [
    "AnyWeights",
    "PackedWeights",
    "Weights",
    "joined",
    "multiply",
    "multiply_row",
    "packed_weights",
    "reading_weights_once",
    "weights_of",
]
