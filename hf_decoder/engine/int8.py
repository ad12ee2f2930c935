"""Multiplies by the weights of torchao's int8 weight-only quantization. Shapes: M outputs, N inputs."""

from typing import Any, NamedTuple

import torch
from torch.nn.functional import linear

from hf_decoder.engine.precision import linear_in_parts

KERNEL_MULTIPLE = 16
MAX_KERNEL_ROWS = 16


class Int8Weights(NamedTuple):
    """The tensors of a quantized linear layer, with one scale per row."""

    values: torch.Tensor  # (M, N), int8
    scales: torch.Tensor  # (M, 1)
    bias: torch.Tensor | None


def is_of_torchao(weight: Any, name: str) -> bool:
    """Whether a weight on a CPU is of torchao's class of that name; torchao need not be installed."""
    kind = type(weight)
    is_named = kind.__name__ == name and kind.__module__.partition(".")[0] == "torchao"
    return is_named and weight.device.type == "cpu"


def int8_weights(weight: Any, bias: torch.Tensor | None) -> Int8Weights | None:
    """The tensors of a quantized weight, the same objects at every call; None for other weights or off the CPU."""
    if (
        is_of_torchao(weight, "Int8Tensor")
        and weight.act_quant_kwargs is None  # activations are not quantized
        and weight.act_pre_scale is None
        and list(weight.block_size) == [1, weight.shape[1]]
        and tuple(weight.scale.shape) == (weight.shape[0], 1)
    ):
        return Int8Weights(weight.qdata, weight.scale, bias)
    return None


def int8_linear(x: torch.Tensor, weights: Int8Weights) -> torch.Tensor:
    """x (..., N) -> (..., M) in x's dtype, on a CPU; like torchao, it takes no notice of autocast.

    A few rows in half precision use torch's own kernel, which reads the weights as they are: 1.5 ms for eight rows on
    two AVX2 cores, 4,864 x 896, against 3.5 in parts; 32 rows take 5.4 against 5. In fp32 it takes 4 ms per row.
    """
    values, scales, bias = weights
    is_compiling, rows = torch.compiler.is_compiling(), x.shape[:-1].numel()
    with torch.autocast("cpu", enabled=False):
        if not is_compiling and (x.dtype == torch.float32 or rows > MAX_KERNEL_ROWS):
            return linear_in_parts(x, values, bias, scales)
        scales = scales.to(x.dtype).view(-1)
        if x.shape[-1] % KERNEL_MULTIPLE:  # torch's bf16 kernel reads past the end of such rows (2.13)
            product = linear(x, values.to(x.dtype)) * scales
        else:
            product = torch._weight_int8pack_mm(x.reshape(rows, -1), values, scales).view(*x.shape[:-1], len(values))
    return product if bias is None else product + bias.to(x.dtype)


__all__ = ["Int8Weights", "int8_linear", "int8_weights", "is_of_torchao"]
