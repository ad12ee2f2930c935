"""Triton kernel of attention in the decode step on CUDA; the step's other kernels are in `decoding.py`.

Several programs share the keys of a group; the last of them to end combines what they found. Shapes: H query
heads, G key/value heads, E head_dim, R its rotated part.
"""

import triton
import triton.language as tl

from hf_decoder.engine.triton.decoding import _normed, _wait

SPLITS = 32  # the most programs that share the keys of one key/value head
KEYS_PER_SPLIT = 256  # the least


@triton.jit
def _rotated(
    x_ptr,  # heads of E numbers, at rows[:, None]
    rows,
    valid,
    norm_ptr,
    eps,
    frequency_ptr,  # (R / 2,)
    position,
    attention_scaling,
    E: tl.constexpr,
    R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NORMED: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Heads (len(rows), BLOCK_E), normed and rotated, in fp32, rounded as the modules round them."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    columns = tl.arange(0, BLOCK_E)
    inside = valid[:, None] & (columns < E)[None, :]
    x = tl.load(x_ptr + rows[:, None] * E + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 1) / E + eps)[:, None]
    if NORMED:
        x = _normed(x, tl.load(norm_ptr + columns, mask=columns < E, other=0.0).to(tl.float32)[None, :], scale, dtype)
    if ROPE:
        half: tl.constexpr = R // 2
        turned = columns < R
        other = tl.where(columns < half, columns + half, columns - half)
        y = tl.load(x_ptr + rows[:, None] * E + other[None, :], mask=valid[:, None] & turned[None, :], other=0.0)
        y = y.to(tl.float32)
        if NORMED:
            y = _normed(y, tl.load(norm_ptr + other, mask=turned, other=0.0).to(tl.float32)[None, :], scale, dtype)
        y = tl.where((columns < half)[None, :], -y, y)
        index = tl.where(columns < half, columns, columns - half)
        angle = position.to(tl.float32) * tl.load(frequency_ptr + index, mask=turned, other=0.0)
        cos = (tl.cos(angle) * attention_scaling).to(dtype).to(tl.float32)[None, :]
        sin = (tl.sin(angle) * attention_scaling).to(dtype).to(tl.float32)[None, :]
        rotated = (x * cos).to(dtype).to(tl.float32) + (y * sin).to(dtype).to(tl.float32)
        x = tl.where(turned[None, :], rotated.to(dtype).to(tl.float32), x)
    return x


@triton.jit
def _attend_to_new(
    query,  # (BLOCK_H, BLOCK_E)
    key_ptr,  # (E,), not yet normed and rotated
    value_ptr,  # (E,)
    cached_key_ptr,  # (E,), where they are written
    cached_value_ptr,
    norm_ptr,
    eps,
    frequency_ptr,
    position,
    attention_scaling,
    scaling,
    E: tl.constexpr,
    R: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
    NORMED: tl.constexpr,
    ROPE: tl.constexpr,
):
    """Writes the new key and value into the cache; starts the softmax of `_attend_to_cache` with them."""
    columns = tl.arange(0, BLOCK_E)
    in_head = columns < E
    one = tl.arange(0, 1)
    key = _rotated(
        key_ptr, one, one < 1, norm_ptr, eps, frequency_ptr, position, attention_scaling, E, R, BLOCK_E, NORMED, ROPE
    )
    value = tl.load(value_ptr + columns, mask=in_head, other=0.0)
    tl.store(cached_key_ptr + columns[None, :], key.to(value.dtype), mask=in_head[None, :])
    tl.store(cached_value_ptr + columns, value, mask=in_head)
    total = tl.zeros((BLOCK_H, BLOCK_E), tl.float32) + value.to(tl.float32)[None, :]
    return tl.sum(query * key, 1) * scaling, tl.full((BLOCK_H,), 1.0, tl.float32), total


@triton.jit
def _attend_to_cache(
    query,  # (BLOCK_H, BLOCK_E)
    keys,  # of one group: (size of the buffer, E)
    values,
    start,
    stop,
    first,  # the first token that is seen
    scaling,
    largest,  # (BLOCK_H,) of the scores so far
    weight,  # (BLOCK_H,) sum of their exponentials
    total,  # (BLOCK_H, BLOCK_E) sum of the values, weighted by them
    E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds the cached tokens from start to stop to a softmax that is summed up as it goes."""
    columns = tl.arange(0, BLOCK_E)
    in_head = columns < E
    for begin in range(start, stop, BLOCK_K):
        token = begin + tl.arange(0, BLOCK_K)
        seen = (token >= first) & (token < stop)
        place = token.to(tl.int64)[:, None] * E + columns[None, :]
        cached = (token < stop)[:, None] & in_head[None, :]
        key = tl.load(keys + place, mask=cached, other=0.0)
        value = tl.load(values + place, mask=cached, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * scaling
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, 1))
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        shrunk = tl.exp(largest - reference)
        part = tl.exp(scores - reference[:, None])
        weight = weight * shrunk + tl.sum(part, 1)
        total = total * shrunk[:, None] + tl.dot(part.to(query.dtype), value, input_precision=PRECISION)
        largest = new_largest
    return largest, weight, total


@triton.jit
def attention_kernel(
    heads_ptr,  # (H * E + 2 * G * E,)
    query_norm_ptr,
    key_norm_ptr,
    eps,
    frequency_ptr,
    attention_scaling,
    scaling,
    state_ptr,  # int64: tokens in the cache, position of the new one, first token that is seen
    buffers_ptr,  # addresses of the layer's cache: keys and values (G, length, E); at last the length
    out_ptr,  # (H * E,)
    sums_ptr,  # (SPLITS, H, E) fp32: results of a group's programs, for the last of them
    weights_ptr,  # (SPLITS, 2, H) fp32: largest score and sum of the exponentials
    arrived_ptr,  # (G,) int32, zeros
    H: tl.constexpr, G: tl.constexpr, E: tl.constexpr, R: tl.constexpr, NORMED: tl.constexpr, ROPE: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_E: tl.constexpr, SPLITS: tl.constexpr,
    KEYS_PER_SPLIT: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attention of one group's query heads over a part of the keys; writes the new key and value into the cache."""
    group, split = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = heads_ptr.dtype.element_ty
    per_group: tl.constexpr = H // G
    # the state was written two kernels ago, so there is no need to wait
    past, position, first = tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2)
    length = tl.load(buffers_ptr + 3)
    # the compiler does not know that torch aligns its allocations
    keys = tl.multiple_of(tl.load(buffers_ptr).to(tl.pointer_type(dtype)), 16)
    values = tl.multiple_of(tl.load(buffers_ptr + 1).to(tl.pointer_type(dtype)), 16)
    _wait(PDL)
    size = tl.maximum(KEYS_PER_SPLIT, tl.cdiv(tl.cdiv(past + 1, SPLITS), KEYS_PER_SPLIT) * KEYS_PER_SPLIT)
    count = tl.cdiv(past + 1, size)
    start = split * size
    if start <= past:
        stop = tl.minimum(start + size, past)  # of the cached keys; the new one is in registers
        rows = tl.arange(0, BLOCK_H)
        valid = rows < per_group
        query = _rotated(
            heads_ptr + group * per_group * E, rows, valid, query_norm_ptr, eps, frequency_ptr, position,
            attention_scaling, E, R, BLOCK_E, NORMED, ROPE,
        )  # fmt: skip
        largest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        weight = tl.zeros((BLOCK_H,), tl.float32)
        total = tl.zeros((BLOCK_H, BLOCK_E), tl.float32)
        base = group.to(tl.int64) * length * E
        if past < start + size:
            largest, weight, total = _attend_to_new(
                query, heads_ptr + (H + group) * E, heads_ptr + (H + G + group) * E, keys + base + past * E,
                values + base + past * E, key_norm_ptr, eps, frequency_ptr, position, attention_scaling, scaling,
                E, R, BLOCK_H, BLOCK_E, NORMED, ROPE,
            )  # fmt: skip
        largest, weight, total = _attend_to_cache(
            query.to(dtype), keys + base, values + base, tl.maximum(start, first // BLOCK_K * BLOCK_K), stop, first,
            scaling, largest, weight, total, E, BLOCK_K, BLOCK_E, PRECISION,
        )  # fmt: skip
        _store_attention(
            out_ptr, sums_ptr, weights_ptr, arrived_ptr + group, group * per_group + rows, valid, split, count,
            largest, weight, total, H, E, BLOCK_H, BLOCK_E,
        )  # fmt: skip


@triton.jit
def _store_attention(
    out_ptr,
    sums_ptr,
    weights_ptr,
    arrived_ptr,
    head,
    valid,
    split,
    count,
    largest,
    weight,
    total,
    H: tl.constexpr,
    E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Writes the attention of one of `count` programs; the last of them to arrive combines all."""
    columns = tl.arange(0, BLOCK_E)
    inside = valid[:, None] & (columns < E)[None, :]
    place = head[:, None] * E + columns[None, :]
    if count == 1:
        tl.store(out_ptr + place, (total / weight[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
    else:
        tl.store(weights_ptr + split * 2 * H + head, largest, mask=valid)
        tl.store(weights_ptr + split * 2 * H + H + head, weight, mask=valid)
        tl.store(sums_ptr + split * H * E + place, total, mask=inside)
        tl.debug_barrier()  # all threads have stored before one of them reports it
        if tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == count - 1:
            _combine(sums_ptr, weights_ptr, out_ptr, head, place, valid, inside, count, H, E, BLOCK_H, BLOCK_E)
            tl.store(arrived_ptr, 0)


@triton.jit
def _combine(
    sums_ptr,
    weights_ptr,
    out_ptr,
    head,
    place,
    valid,
    inside,
    count,
    H: tl.constexpr,
    E: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Combines the attention of `count` programs, read past the L1 cache, which they do not share."""
    largest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_H,), tl.float32)
    total = tl.zeros((BLOCK_H, BLOCK_E), tl.float32)
    for split in range(count):
        other = tl.load(weights_ptr + split * 2 * H + head, mask=valid, other=0.0, cache_modifier=".cg")
        part = tl.load(weights_ptr + split * 2 * H + H + head, mask=valid, other=1.0, cache_modifier=".cg")
        found = tl.load(sums_ptr + split * H * E + place, mask=inside, other=0.0, cache_modifier=".cg")
        new_largest = tl.maximum(largest, other)
        reference = tl.where(new_largest == float("-inf"), 0.0, new_largest)
        shrunk, added = tl.exp(largest - reference), tl.exp(other - reference)
        weight = weight * shrunk + part * added
        total = total * shrunk[:, None] + found * added[:, None]
        largest = new_largest
    tl.store(out_ptr + place, (total / weight[:, None]).to(out_ptr.dtype.element_ty), mask=inside)
