"""Matrix products of a decode step: a few rows times a weight matrix, at the speed of memory.

Shapes: M outputs, N inputs.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from hf_decoder.engine.assumptions import PLAIN
from hf_decoder.engine.calibration import choose
from hf_decoder.engine.int4 import Int4Weights, int4_linear, int4_weights
from hf_decoder.engine.int8 import Int8Weights, int8_linear, int8_weights
from hf_decoder.engine.operators import runs_as_written, runs_unseen
from hf_decoder.engine.precision import MIN_HALF_ROWS, fast_dtype, linear_in_parts, product_dtype
from hf_decoder.engine.quantized.layers import PackedLinear
from hf_decoder.engine.quantized.products import BlockWeights, multiply_blocks
from hf_decoder.engine.single_precision import (
    ROW,
    in_turn,
    multiply_row_of_weight,
    multiply_rows,
    onednn_product,
    read_weights,
)
from hf_decoder.engine.switches import settings
from hf_decoder.engine.training.kernels import as_rows
from hf_decoder.model.loss_hf_decoder import is_plain_linear

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
        or choose("half a row", (dtype,), HALF_ROW, partial(read_weights, 2**12, 2**10, dtype)) == "torch"
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


HALF_ROW = in_turn({"torch": ROW["torch"], "without oneDNN": _row_without_onednn})


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
        return onednn_product(x, *weights)
    if isinstance(weights, BlockWeights):
        return multiply_blocks(x, weights)
    if isinstance(weights, Int8Weights):
        return int8_linear(x, weights)
    if isinstance(weights, Int4Weights):
        return int4_linear(x, weights)
    dtype = product_dtype(x)
    # quantized weights have their own products
    is_plain = type(weights.weight) in PLAIN
    if is_plain and x.shape[:-1].numel() >= MIN_HALF_ROWS and fast_dtype(x.device, dtype) != dtype:
        with torch.autocast(x.device.type, enabled=False):
            return linear_in_parts(x.to(dtype), *weights)
    if is_plain and dtype == torch.float32 and x.is_cpu and runs_as_written():
        return multiply_rows(as_rows(x), *weights).view(*x.shape[:-1], len(weights.weight))
    return linear(x, *weights)


def multiply_row(x: torch.Tensor, weights: AnyWeights) -> torch.Tensor:
    """x (N,) -> (M,), on a CPU, in few calls."""
    if not isinstance(weights, Weights) or type(weights.weight) not in PLAIN:
        return multiply(x.view(1, 1, -1), weights).view(-1)
    return multiply_row_of_weight(x, *weights)


def logits_of_row(head: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The head's product with a single row x (..., N) on a CPU, without gradients; None where it is not so plain."""
    if not (settings.decoding and runs_unseen() and x.is_cpu and not torch.is_grad_enabled()):
        return None
    if not (x.numel() == x.shape[-1] and type(x) in PLAIN and is_plain_linear(head)):
        return None
    weight = head.weight
    fits = weight.is_cpu and x.shape[-1] == weight.shape[1] and product_dtype(x) == x.dtype == weight.dtype
    if not fits or nn.modules.module._has_any_global_hook():
        return None
    with reading_weights_once(x[..., 0], x.dtype):
        return multiply_row(x.reshape(-1), Weights(weight, head.bias)).view(*x.shape[:-1], -1)


__all__ = [
    "AnyWeights",
    "PackedWeights",
    "Weights",
    "joined",
    "logits_of_row",
    "multiply",
    "multiply_row",
    "packed_weights",
    "reading_weights_once",
    "weights_of",
]
