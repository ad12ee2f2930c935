"""The weights of torchao's int8 weight-only quantization: M outputs, N inputs."""

from typing import Any, NamedTuple

import torch


class Int8Weights(NamedTuple):
    """What a linear map multiplies with, one scale a row."""

    values: torch.Tensor  # (M, N), int8
    scales: torch.Tensor  # (M, 1)
    bias: torch.Tensor | None


def int8_weights(weight: Any, bias: torch.Tensor | None) -> Int8Weights | None:
    """The tensors that such a weight is made of, the same objects at every call; None of another, or not on a CPU."""
    kind = type(weight)
    if (
        kind.__name__ == "Int8Tensor"
        and kind.__module__.partition(".")[0] == "torchao"
        and weight.device.type == "cpu"
        and weight.act_quant_kwargs is None  # activations are not quantized too
        and weight.act_pre_scale is None
        and list(weight.block_size) == [1, weight.shape[1]]
        and tuple(weight.scale.shape) == (weight.shape[0], 1)
    ):
        return Int8Weights(weight.qdata, weight.scale, bias)
    return None


__all__ = ["Int8Weights", "int8_weights"]
