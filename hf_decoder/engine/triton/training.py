"""Triton kernels for the operations between the matrix products of training on CUDA: one pass over each tensor.

They compute in fp32 and round where the formulas of their callers round. A program takes a tile of about 16 numbers
per thread, so that several run on each multiprocessor. Sizes are fixed, because tuning takes minutes.

Shapes: N rows, D hidden_size or head_dim, B batch, S tokens, H heads, E head_dim, R its rotated part, V vocab_size.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

try:
    import triton
    import triton.language as tl
except ImportError as error:  # `has_kernels` checks for triton before
    raise ImportError("these kernels need triton, which comes with torch's builds for CUDA") from error

TILE = 2048
MAX_WARPS = 16
PROGRAMS = {4: 6, 8: 2, 16: 1}  # warps of a program that loops over rows -> programs per multiprocessor
VOCABULARY_BLOCK = 8192


_HERE = nullcontext()


def _device_of(x: torch.Tensor) -> AbstractContextManager:
    """Makes x's device current, because Triton launches on the current device."""
    index = x.get_device()
    return _HERE if index < 0 or index == torch.cuda.current_device() else torch.cuda.device(index)


@cache
def _multiprocessors(device: torch.device) -> int:
    return 2 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def _warps(elements: int) -> int:
    """Warps of a tile, at 16 numbers per thread."""
    return min(MAX_WARPS, max(4, elements // 512))


@cache
def _tile(width: int, elements: int) -> tuple[int, int, int]:
    """Rows, columns and warps of a tile of about so many numbers, for rows of this width."""
    block = triton.next_power_of_2(max(1, width))
    rows = max(1, elements // block)
    return rows, block, _warps(rows * block)


def _parts(count: int, size: int) -> int:
    """`triton.cdiv` without its microseconds."""
    return -(-count // size)


@triton.jit
def _rms_norm_kernel(
    x_ptr,  # (N, D)
    weight_ptr,  # (D,)
    out_ptr,  # (N, D)
    scale_ptr,  # (N,) fp32
    N,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    in_row = columns < D
    inside = (rows < N)[:, None] & in_row[None, :]
    offsets = rows.to(tl.int64)[:, None] * D + columns[None, :]
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    normed = (x * scale[:, None]).to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(out_ptr + offsets, (normed * weight[None, :]).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(scale_ptr + rows, scale, mask=rows < N)


@triton.jit
def _rms_norm_gradients_kernel(
    grad_ptr,  # (N, D)
    second_ptr,  # (N, D), added to the first
    third_ptr,  # (N, D)
    x_ptr,  # (N, D)
    weight_ptr,  # (D,)
    scale_ptr,  # (N,) fp32
    grad_x_ptr,  # (N, D)
    parts_ptr,  # (programs, D) fp32: the weight's gradient from the rows of each program
    N,
    D: tl.constexpr,
    GRADS: tl.constexpr,
    FOR_X: tl.constexpr,
    FOR_WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)
    in_row = columns < D
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    tile = tl.program_id(0)
    while tile * ROWS < N:
        rows = tile * ROWS + tl.arange(0, ROWS)
        inside = (rows < N)[:, None] & in_row[None, :]
        offsets = rows.to(tl.int64)[:, None] * D + columns[None, :]
        grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if GRADS > 1:
            grad += tl.load(second_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if GRADS > 2:
            grad += tl.load(third_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + rows, mask=rows < N, other=0.0)
        normed = x * scale[:, None]
        if FOR_WEIGHT:
            total += grad * normed
        if FOR_X:
            grad *= weight[None, :]
            along = tl.sum(grad * normed, 1) / D  # scaling a row does not change its norm
            grad_x = (grad - normed * along[:, None]) * scale[:, None]
            tl.store(grad_x_ptr + offsets, grad_x.to(grad_x_ptr.dtype.element_ty), mask=inside)
        tile += tl.num_programs(0)
    if FOR_WEIGHT:
        tl.store(parts_ptr + tl.program_id(0) * D + columns, tl.sum(total, 0), mask=in_row)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x (..., D) in `dtype` (None: that of the product with the weight), and the fp32 factors (N,)."""
    x, weight = x.contiguous(), weight.contiguous()
    width = weight.numel()
    count = x.numel() // width
    output = torch.empty_like(x, dtype=dtype or torch.result_type(weight, x))
    scales = x.new_empty(count, dtype=torch.float32)
    rows, block, warps = _tile(width, TILE)
    with _device_of(x):
        _rms_norm_kernel[(_parts(count, rows),)](
            x, weight, output, scales, count, eps, D=width, ROWS=rows, BLOCK=block, num_warps=warps
        )
    return output, scales


def rms_norm_gradients(
    grads: Sequence[torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    for_x: bool,
    for_weight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of x (..., D), and of the weight in fp32, from the sum of up to three gradients of the output."""
    first, second, third = (*(grad.contiguous() for grad in grads), None, None)[:3]
    x, weight = x.contiguous(), weight.contiguous()
    width = weight.numel()
    count = x.numel() // width
    rows, block, warps = _tile(width, TILE)
    programs = min(_parts(count, rows), _multiprocessors(x.device) * PROGRAMS[warps])
    grad_x = torch.empty_like(x) if for_x else None
    parts = x.new_empty(programs, width, dtype=torch.float32) if for_weight else None
    with _device_of(x):
        _rms_norm_gradients_kernel[(programs,)](
            first, second, third, x, weight, scales, grad_x, parts, count, D=width, GRADS=len(grads), FOR_X=for_x,
            FOR_WEIGHT=for_weight, ROWS=rows, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return grad_x, None if parts is None else parts.sum(0)


@triton.jit
def _gated_kernel(gate_ptr, up_ptr, out_ptr, N, BLOCK: tl.constexpr):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < N
    gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + offsets, (activated * up).to(dtype), mask=inside)


@triton.jit
def _gated_gradients_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    N,
    FOR_GATE: tl.constexpr,
    FOR_UP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < N
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    opened = 1.0 / (1.0 + tl.exp(-gate))
    if FOR_UP:
        activated = (gate * opened).to(dtype).to(tl.float32)
        tl.store(grad_up_ptr + offsets, (grad * activated).to(dtype), mask=inside)
    if FOR_GATE:
        up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        of_activated = (grad * up).to(dtype).to(tl.float32)
        grad_gate = of_activated * opened * (1.0 + gate * (1.0 - opened))
        tl.store(grad_gate_ptr + offsets, grad_gate.to(dtype), mask=inside)


def gated_silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, of one shape and dtype."""
    gate, up = gate.contiguous(), up.contiguous()
    output = torch.empty_like(up)
    with _device_of(up):
        _gated_kernel[(_parts(up.numel(), TILE),)](gate, up, output, up.numel(), BLOCK=TILE)
    return output


def gated_silu_gradients(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, for_gate: bool, for_up: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The gradients of gate and up."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate = torch.empty_like(gate) if for_gate else None
    grad_up = torch.empty_like(up) if for_up else None
    with _device_of(up):
        _gated_gradients_kernel[(_parts(up.numel(), TILE),)](
            grad, gate, up, grad_gate, grad_up, up.numel(), FOR_GATE=for_gate, FOR_UP=for_up, BLOCK=TILE
        )
    return grad_gate, grad_up


@triton.jit
def _rotate_rows(
    program,
    x_ptr,  # (B, H, S, E)
    x_batch,  # strides
    x_head,
    x_token,
    out_ptr,  # (B, S, H, E)
    cos_ptr,  # (B or 1, S, R)
    sin_ptr,  # (B or 1, S, R)
    angle_batch,
    tokens,  # of all texts, B * S
    S,
    H: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    BACKWARDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    half: tl.constexpr = R // 2
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    rows = program * ROWS + tl.arange(0, ROWS)
    in_rows = (rows < tokens * H)[:, None]
    head, token, batch = (rows % H).to(tl.int64), (rows // H % S).to(tl.int64), (rows // H // S).to(tl.int64)
    x_rows = (batch * x_batch + token * x_token + head * x_head)[:, None]
    angle_rows = (batch * angle_batch + token * R)[:, None]
    out_rows = rows.to(tl.int64)[:, None] * E
    columns = tl.arange(0, BLOCK)[None, :]
    inside = in_rows & (columns < half)
    a = tl.load(x_ptr + x_rows + columns, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + x_rows + half + columns, mask=inside, other=0.0).to(tl.float32)
    cos_a = tl.load(cos_ptr + angle_rows + columns, mask=inside, other=0.0).to(tl.float32)
    cos_b = tl.load(cos_ptr + angle_rows + half + columns, mask=inside, other=0.0).to(tl.float32)
    sin_a = tl.load(sin_ptr + angle_rows + columns, mask=inside, other=0.0).to(tl.float32)
    sin_b = tl.load(sin_ptr + angle_rows + half + columns, mask=inside, other=0.0).to(tl.float32)
    if BACKWARDS:
        turned_a, turned_b = a * cos_a + b * sin_b, b * cos_b - a * sin_a
    else:
        turned_a, turned_b = a * cos_a - b * sin_a, b * cos_b + a * sin_b
    tl.store(out_ptr + out_rows + columns, turned_a.to(dtype), mask=inside)
    tl.store(out_ptr + out_rows + half + columns, turned_b.to(dtype), mask=inside)
    if R < E:
        others = R + tl.arange(0, REST)[None, :]
        inside = in_rows & (others < E)
        rest = tl.load(x_ptr + x_rows + others, mask=inside, other=0.0)
        tl.store(out_ptr + out_rows + others, rest.to(tl.float32).to(dtype), mask=inside)


@triton.jit
def _rotation_kernel(
    query_ptr,  # (B, H, S, E)
    key_ptr,  # (B, G, S, E)
    cos_ptr,  # (B or 1, S, R)
    sin_ptr,  # (B or 1, S, R)
    turned_query_ptr,  # (B, S, H, E)
    turned_key_ptr,  # (B, S, G, E)
    tokens,  # of all texts, B * S
    S,
    query_batch,  # strides
    query_head,
    query_token,
    key_batch,
    key_head,
    key_token,
    angle_batch,
    H: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    BACKWARDS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    program = tl.program_id(0)
    of_query = tl.cdiv(tokens * H, ROWS)
    if program < of_query:
        _rotate_rows(
            program, query_ptr, query_batch, query_head, query_token, turned_query_ptr, cos_ptr, sin_ptr, angle_batch,
            tokens, S, H, E, R, BACKWARDS, ROWS, BLOCK, REST,
        )  # fmt: skip
    else:
        _rotate_rows(
            program - of_query, key_ptr, key_batch, key_head, key_token, turned_key_ptr, cos_ptr, sin_ptr, angle_batch,
            tokens, S, G, E, R, BACKWARDS, ROWS, BLOCK, REST,
        )  # fmt: skip


def rotated(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    dtypes: Sequence[torch.dtype],
    backwards: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates query (B, H, S, E) and key (B, G, S, E) by cos, sin (B or 1, S, R), or rotates them back.

    The results have layout (B, S, heads, E) and these dtypes.
    """
    batch, heads, length, head_dim = query.shape
    groups, rotary_dim = key.shape[1], cos.shape[-1]
    query = query if query.stride(-1) == 1 else query.contiguous()
    key = key if key.stride(-1) == 1 else key.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    turned_query = query.new_empty(batch, length, heads, head_dim, dtype=dtypes[0])
    turned_key = key.new_empty(batch, length, groups, head_dim, dtype=dtypes[1])
    tokens = batch * length
    rows, block, _ = _tile(rotary_dim // 2, TILE // 2)
    rest = _tile(head_dim - rotary_dim, 1)[1]
    with _device_of(query):
        _rotation_kernel[(_parts(tokens * heads, rows) + _parts(tokens * groups, rows),)](
            query, key, cos, sin, turned_query, turned_key, tokens, length, *query.stride()[:3], *key.stride()[:3],
            length * rotary_dim if cos.shape[0] > 1 else 0, H=heads, G=groups, E=head_dim, R=rotary_dim,
            BACKWARDS=backwards, ROWS=rows, BLOCK=block, REST=rest,
        )  # fmt: skip
    return turned_query.transpose(1, 2), turned_key.transpose(1, 2)


@triton.jit
def _tanh(x):
    return 1.0 - 2.0 / (1.0 + tl.exp(2.0 * x))


@triton.jit
def _write_gradient(
    logits_ptr,  # (V,) of one row
    target,
    largest,
    scale,
    cap,
    smoothing,
    V: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replaces the logits by the gradient: exp(score - largest) * scale, less the target's share."""
    columns = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        score = tl.load(logits_ptr + start + columns, mask=inside, other=0.0).to(tl.float32)
        if CAPPED:
            bent = _tanh(score / cap)
            score = bent * cap
        gradient = tl.exp(score - largest) * scale
        if SMOOTHED:
            gradient -= smoothing / V
        gradient += tl.where(start + columns == target, smoothing - 1.0, 0.0)
        if CAPPED:
            gradient *= 1.0 - bent * bent
        tl.store(logits_ptr + start + columns, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,  # (N, V); their gradient replaces them
    targets_ptr,  # (N,) int64
    losses_ptr,  # (N,) fp32
    ignore_index,
    z_loss_coef,
    cap,
    smoothing,
    V: tl.constexpr,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    NEEDS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: a first pass normalises the softmax, a second one writes the gradient."""
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * V
    target = tl.load(targets_ptr + row)
    columns = tl.arange(0, BLOCK)
    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if NEEDS_GRADIENT:
            for start in range(0, V, BLOCK):
                tl.store(logits_ptr + start + columns, tl.zeros((BLOCK,), dtype), mask=start + columns < V)
    else:
        target_score = tl.load(logits_ptr + target).to(tl.float32)
        if CAPPED:
            target_score = _tanh(target_score / cap) * cap
        largest = float("-inf")
        weights = tl.zeros((BLOCK,), tl.float32)
        scores = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            score = tl.load(logits_ptr + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            if CAPPED:
                score = tl.where(inside, _tanh(score / cap) * cap, float("-inf"))
            if SMOOTHED:
                scores += tl.where(inside, score, 0.0)
            new_largest = tl.maximum(largest, tl.max(score, 0))
            reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
            weights = weights * tl.exp(largest - reference) + tl.exp(score - reference)
            largest = new_largest
        weight_sum = tl.sum(weights, 0)
        log_partition = largest + tl.log(weight_sum)
        if SMOOTHED:
            target_score += smoothing * (tl.sum(scores, 0) / V - target_score)
        tl.store(losses_ptr + row, log_partition - target_score + z_loss_coef * log_partition * log_partition)
        if NEEDS_GRADIENT:
            scale = (1.0 + 2.0 * z_loss_coef * log_partition) / weight_sum
            _write_gradient(logits_ptr, target, largest, scale, cap, smoothing, V, CAPPED, SMOOTHED, BLOCK)


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    z_loss_coef: float,
    cap: float | None,
    smoothing: float,
    needs_gradient: bool,
) -> torch.Tensor:
    """Losses (N,) in fp32 of contiguous logits (N, V), which become their gradient if needed."""
    count, vocab_size = logits.shape
    losses = logits.new_empty(count, dtype=torch.float32)
    block = min(VOCABULARY_BLOCK, triton.next_power_of_2(vocab_size))
    with _device_of(logits):
        _cross_entropy_kernel[(count,)](
            logits, targets.contiguous(), losses, ignore_index, z_loss_coef, cap or 1.0, smoothing, V=vocab_size,
            CAPPED=cap is not None, SMOOTHED=smoothing > 0, NEEDS_GRADIENT=needs_gradient, BLOCK=block,
            num_warps=_warps(block),
        )  # fmt: skip
    return losses


__all__ = [
    "cross_entropy",
    "gated_silu",
    "gated_silu_gradients",
    "rms_norm",
    "rms_norm_gradients",
    "rotated",
]
