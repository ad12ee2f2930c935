"""Products in fp32 on a CPU: torch's, which MKL forms, or oneDNN's, as this machine is faster.

On two cores of an AMD EPYC with AVX-512 MKL multiplies at 200 GFLOP/s, and oneDNN at 450.
Shapes: R rows, N inputs, M outputs.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any

import torch
from torch.nn.functional import linear

from hf_decoder.engine.calibration import bucket, choose, numbers

MIN_ROWS = 16  # of layers that are looked at: fewer are the decode step's
MAX_TURNED_ROWS = 128  # more are as quick either way
MEASURED_SIZE = 512  # rows, inputs and outputs, at most
READ_ELEMENTS = 2**24  # of the weights that are measured in turn: more than caches hold, as in a model
MEASURED_ELEMENTS = 2**23  # of the weight of a single row, at most
COUNTED_ROWS = 8  # with more of them arithmetic takes longer than reading, and fewer weights are enough
PART_OUTPUTS = 2048
SPLIT = 4
ONEDNN = "oneDNN"


def in_turn(ways: Mapping[str, Callable]) -> dict[str, Callable]:
    """Candidates that multiply by one weight after another. A single one would stay in the caches."""
    return {name: partial(lambda way, x, weights: [way(x, weight) for weight in weights], ways[name]) for name in ways}


def read_weights(
    outputs: int, inputs: int, dtype: torch.dtype = torch.float32, rows: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """x (R, N), or (N,) of a single row, and several weights (K, M, N)."""
    x = numbers(rows, inputs, dtype=dtype) if rows else numbers(inputs, dtype=dtype)
    elements = READ_ELEMENTS // max(1, rows // COUNTED_ROWS)
    return x, numbers(max(1, elements // (outputs * inputs)), outputs, inputs, dtype=dtype)


def by_onednn(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """rows (..., N) times a dense weight (M, N), plus bias (M,) -> (..., M)."""
    count = rows.shape[:-1].numel()
    product = onednn_product(_padded(rows.reshape(count, -1)), weight, bias)
    return product[:count].view(*rows.shape[:-1], -1)


def onednn_product(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """rows (..., N) times weight (M, N), which is dense or packed by oneDNN, plus bias (M,) -> (..., M)."""
    bias = bias if bias is None else bias.contiguous()  # it is read as if it were
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


def padded_rows(count: int) -> int:
    """So many rows or up to a quarter more: oneDNN compiles a product for each number of rows, in 2 to 3 ms."""
    step = max(16, bucket(count, 1, 2**62) // 8)
    return -(-count // step) * step


def _padded(rows: torch.Tensor) -> torch.Tensor:
    """(R, N) with rows of zeros at the end, contiguous."""
    count = padded_rows(len(rows))
    if count == len(rows):
        return rows.contiguous()
    padded = rows.new_zeros(count, rows.shape[1])
    padded[: len(rows)] = rows
    return padded


def _turned(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """MKL may multiply the weight by a few rows faster than these by the weight."""
    product = torch.mm(weight, rows.t()).t().contiguous()
    return product if bias is None else product.add_(bias)


def _row_by_torch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.mv(weight, x)


def _row_in_parts(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x (N,) -> (M,). MKL may keep a row to one thread: parts of a weight, as a batch, it does not."""
    inputs = weight.shape[1]
    # a column by its strides too: with those of a row MKL takes a kernel that is slower than the one product
    column = x.as_strided((SPLIT, inputs, 1), (0, 1, inputs))
    return torch.bmm(weight.view(SPLIT, -1, inputs), column).view(-1)


ROW = {"torch": _row_by_torch, "in parts": _row_in_parts}
ONE_ROW = in_turn(ROW)
WAYS: dict[str, Callable[..., torch.Tensor]] = {"torch": linear, "turned": _turned}
if torch.backends.mkldnn.is_available():
    WAYS[ONEDNN] = by_onednn
FEW_ROWS = in_turn(WAYS)
MANY_ROWS = {name: way for name, way in FEW_ROWS.items() if name != "turned"}


def _transposed_by_torch(grads: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.mm(grads.t(), rows)


def _transposed_by_onednn(grads: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return onednn_product(_padded(grads).t(), _padded(rows).t())


def _transposed_inputs(rows: int, outputs: int, inputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    return numbers(rows, outputs), numbers(rows, inputs)


TRANSPOSED: dict[str, Callable[..., torch.Tensor]] = {"torch": _transposed_by_torch}
if torch.backends.mkldnn.is_available():
    TRANSPOSED[ONEDNN] = _transposed_by_onednn


def _may_use_onednn() -> bool:
    # a mode that looks at operators, such as torch's counter of FLOPs, does not know oneDNN's
    return torch._C._get_mkldnn_enabled() and not torch._C._len_torch_dispatch_stack()


def way_of_rows(rows: int, outputs: int, inputs: int) -> str:
    """The fastest way for a product of these sizes in fp32."""
    if not (rows and outputs and inputs and _may_use_onednn()):
        return "torch"
    return choose("rows in fp32", *_case(rows, outputs, inputs))


def _measured_rows(count: int) -> int:
    """A power of two; of rows that are padded the number within it with the most padding."""
    rows = bucket(count, 2, MEASURED_SIZE)
    return rows if padded_rows(count) == count else rows // 2 + 1


@lru_cache(maxsize=1024)
def _case(rows: int, outputs: int, inputs: int) -> tuple[tuple[int, ...], Mapping[str, Callable], Callable]:
    """What is measured for such a product: its key, candidates and inputs."""
    rows = _measured_rows(rows)
    sizes = bucket(outputs, 64, MEASURED_SIZE), bucket(inputs, 64, MEASURED_SIZE)
    candidates = FEW_ROWS if rows <= MAX_TURNED_ROWS else MANY_ROWS
    return (rows, *sizes), candidates, partial(read_weights, *sizes, rows=rows)


def multiply_row_of_weight(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x (N,) times weight (M, N), plus bias (M,) -> (M,), on a CPU; in fp32 in the fastest way."""
    way = "torch"
    if weight.dtype == torch.float32 and weight.numel() and weight.shape[0] % SPLIT == 0 and weight.is_contiguous():
        inputs = bucket(weight.shape[1], 2**6, 2**14)
        sizes = bucket(weight.shape[0], 2**6, MEASURED_ELEMENTS // inputs), inputs
        way = choose("one row", sizes, ONE_ROW, partial(read_weights, *sizes))
    product = ROW[way](x, weight)
    return product if bias is None else product + bias


def multiply_rows(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, out: torch.Tensor | None = None
) -> torch.Tensor:
    """rows (R, N) times weight (M, N), plus bias (M,) -> (R, M), which is written to `out` if that is given.

    Products of fp32 on a CPU are formed in the fastest way, others by torch.
    """
    way = "torch"
    if rows.is_cpu and rows.dtype == weight.dtype == torch.float32 and _is_dense(weight):
        if len(rows) == 1 and out is None:
            return multiply_row_of_weight(rows[0], weight, bias)[None]
        way = way_of_rows(len(rows), *weight.shape)
    if out is None:
        return WAYS[way](rows, weight, bias)
    if way != ONEDNN:
        return torch.mm(rows, weight.t(), out=out) if bias is None else torch.addmm(bias, rows, weight.t(), out=out)
    # part by part, because fresh pages for a large result take as long as the product
    padded = _padded(rows)
    for part in _parts(weight):
        out[:, part] = onednn_product(padded, weight[part], None if bias is None else bias[part])[: len(rows)]
    return out


def multiply_transposed(grads: torch.Tensor, rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """grads (R, M) and rows (R, N) -> (M, N), the gradient of a weight; as `multiply_rows`."""
    way = "torch"
    if rows.is_cpu and rows.dtype == grads.dtype == torch.float32 and rows.numel() and _may_use_onednn():
        key = _measured_rows(len(rows)), *(bucket(x.shape[1], 64, MEASURED_SIZE) for x in (grads, rows))
        way = choose("weight gradients in fp32", key, TRANSPOSED, partial(_transposed_inputs, *key))
    if way == "torch":
        return torch.mm(grads.t(), rows, out=out)
    if out is None:
        return TRANSPOSED[way](grads, rows)
    if len(out) > out.shape[1]:  # faster with the longer side as outputs, and it is copied anyway
        return out.copy_(onednn_product(_padded(rows).t(), _padded(grads).t()).t())
    return out.copy_(TRANSPOSED[way](grads, rows))


def _is_dense(matrix: torch.Tensor) -> bool:
    """Whether it or its transpose is contiguous: of others oneDNN forms products number by number."""
    return matrix.is_contiguous() or matrix.t().is_contiguous()


def _parts(weight: torch.Tensor) -> list[Any]:
    if not weight.is_contiguous():
        return [slice(None)]
    return [slice(first, first + PART_OUTPUTS) for first in range(0, len(weight), PART_OUTPUTS)]


__all__ = [
    "MIN_ROWS",
    "ONEDNN",
    "ROW",
    "by_onednn",
    "in_turn",
    "multiply_row_of_weight",
    "multiply_rows",
    "multiply_transposed",
    "onednn_product",
    "padded_rows",
    "read_weights",
    "way_of_rows",
]
