"""Linear maps computed part by part, in the precision that this machine multiplies fast.

A part of the weight is cast or scaled and multiplied while it is in the caches. A whole copy would go to memory and
back, on fresh pages.
Shapes: R rows, N inputs, M outputs.
"""

from functools import partial
from typing import Any

import torch

from hf_decoder.engine.calibration import choose, numbers
from hf_decoder.engine.single_precision import multiply_rows
from hf_decoder.engine.training.kernels import as_rows

# whether oneDNN has half-precision products for this CPU; else torch multiplies number by number
FAST_HALF_PRECISION = {
    torch.bfloat16: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
MIN_HALF_ROWS = 16  # with fewer rows that loop is as fast, because it reads the weights as they are
PART_ELEMENTS = 2**20  # of a weight: 4 MiB of fp32
PART_ROWS = 512


def cpu_has(*instructions: str) -> bool:
    """Whether this CPU has any of these `torch.cpu.get_capabilities`; False if torch cannot tell."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in instructions)


def fast_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """In which a device multiplies matrices of `dtype`: fp32 in place of what a CPU multiplies more slowly."""
    return dtype if device.type != "cpu" or dtype not in FAST_HALF_PRECISION or _is_fast(dtype) else torch.float32


@torch.compiler.assume_constant_result
def _is_fast(dtype: torch.dtype) -> bool:
    """Whether torch multiplies matrices of this type faster than their numbers in fp32."""
    ways = {"torch": partial(_product_in, dtype), "in fp32": partial(_product_in, torch.float32)}
    if not FAST_HALF_PRECISION[dtype]:  # what oneDNN says counts where nothing is measured
        ways = dict(reversed(ways.items()))
    inputs = partial(_product_inputs, dtype)
    return choose("products", (dtype,), ways, inputs) == "torch"


def _product_in(dtype: torch.dtype, rows: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The product of half precision by its own type, or as `linear_in_parts` forms it."""
    return multiply_rows(rows.to(dtype), weight.to(dtype)).to(rows.dtype)


def _product_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return numbers(128, 512, dtype=dtype), numbers(512, 512, dtype=dtype)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts to on this device; None if it is off."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a product with x: autocast's if it is on, except for fp64."""
    dtype = autocast_dtype(x.device)
    return x.dtype if dtype is None or x.dtype == torch.float64 else dtype


def linear_in_parts(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """x (..., N) times weight (M, N) -> (..., M), in x's dtype, on a CPU.

    Args:
        x: floating point.
        weight: floating point, which is rounded to x's dtype, or int8.
        bias: (M,).
        scales: (M, 1), multiplied with the outputs before the bias is added.
    """
    rows = as_rows(x)
    count, inputs = rows.shape
    outputs, dtype = weight.shape[0], fast_dtype(x.device, x.dtype)
    result = rows.new_empty(count, outputs)
    part_rows, part_outputs = min(count, PART_ROWS), min(outputs, max(1, PART_ELEMENTS // inputs))
    row_buffer, weight_buffer = (torch.empty(size, inputs, dtype=dtype) for size in (part_rows, part_outputs))
    for first in range(0, outputs, part_outputs):
        part = slice(first, first + part_outputs)
        of_weight = weight[part] if weight.dtype == torch.int8 else weight[part].to(x.dtype)
        of_weight = weight_buffer[: len(of_weight)].copy_(of_weight)
        for block in row_parts(rows):
            if first == 0 or part_rows < count:
                of_rows = row_buffer[: len(rows[block])].copy_(rows[block])
            product = multiply_rows(of_rows, of_weight)
            if scales is not None:
                product *= scales[part].view(-1)
            if bias is not None:
                product += bias[part].to(x.dtype)
            result[block, part] = product
    return result.view(*x.shape[:-1], outputs)


def row_parts(rows: torch.Tensor) -> list[slice]:
    """Slices of `PART_ROWS` rows of (R, N)."""
    return [slice(start, start + PART_ROWS) for start in range(0, len(rows), PART_ROWS)]


__all__ = [
    "FAST_HALF_PRECISION",
    "MIN_HALF_ROWS",
    "PART_ELEMENTS",
    "autocast_dtype",
    "cpu_has",
    "fast_dtype",
    "linear_in_parts",
    "product_dtype",
    "row_parts",
]
