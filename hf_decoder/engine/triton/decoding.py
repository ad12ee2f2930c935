"""Triton kernels of the decode step on CUDA. A layer takes five kernels per token.

A small matrix-vector product on a GPU mostly waits for its first byte, so each kernel does as much as possible per
wait. It loads its weights before it reads the token, norms the token itself, and finishes with the gate, the residual
or the cache. Numbers are rounded where the modules round them.

Shapes: D hidden_size, H query heads, G key/value heads, E head_dim, R its rotated part, F intermediate_size, V
vocab_size, K cached tokens and the new one; M outputs and N inputs of a product.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:  # `has_kernels` checks for triton before
    raise ImportError("these kernels need triton, which comes with torch's builds for CUDA") from error

SPLITS = 32  # the most programs that share the keys of one key/value head
KEYS_PER_SPLIT = 256  # the least


@triton.jit
def _normed(x, weight, scale, dtype: tl.constexpr):
    """RMSNorm of x in fp32, rounded as the module rounds it."""
    return ((x * scale).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)


@triton.jit
def _wait(PDL: tl.constexpr):
    """Waits for the previous kernel, and lets the next one start to load its weights."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _scale_of(x_ptr, N, eps, BLOCK_N: tl.constexpr):
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        x = tl.load(x_ptr + columns, mask=columns < N, other=0.0).to(tl.float32)
        total += x * x
    return tl.rsqrt(tl.sum(total, 0) / N + eps)


@triton.jit
def _product(
    weight_ptr,
    rows,
    M,
    N,
    x_ptr,
    norm_ptr,
    eps,
    NORMED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """weight[rows] @ x (or its norm), (BLOCK_M,) in fp32. WHOLE: a block holds all N columns."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    offsets = rows[:, None].to(tl.int64) * N
    inside = rows[:, None] < M
    if WHOLE:
        columns = tl.arange(0, BLOCK_N)
        valid = columns < N
        weights = tl.load(weight_ptr + offsets + columns[None, :], mask=inside & valid[None, :], other=0.0)
        if NORMED:
            norm = tl.load(norm_ptr + columns, mask=valid, other=0.0).to(tl.float32)
        _wait(PDL)
        x = tl.load(x_ptr + columns, mask=valid, other=0.0).to(tl.float32)
        if NORMED:
            x = _normed(x, norm, tl.rsqrt(tl.sum(x * x, 0) / N + eps), dtype)
        return tl.sum(weights.to(tl.float32) * x[None, :], 1)
    _wait(PDL)
    scale = 1.0
    if NORMED:
        scale = _scale_of(x_ptr, N, eps, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, N, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        valid = columns < N
        weights = tl.load(weight_ptr + offsets + columns[None, :], mask=inside & valid[None, :], other=0.0)
        x = tl.load(x_ptr + columns, mask=valid, other=0.0).to(tl.float32)
        if NORMED:
            norm = tl.load(norm_ptr + columns, mask=valid, other=0.0).to(tl.float32)
            x = _normed(x, norm, scale, dtype)
        total += weights.to(tl.float32) * x[None, :]
    return tl.sum(total, 1)


@triton.jit
def heads_kernel(
    hidden_ptr,  # (D,)
    norm_ptr,  # (D,)
    eps,
    query_ptr,  # (H * E, D)
    key_ptr,  # (G * E, D)
    value_ptr,  # (G * E, D)
    query_bias_ptr,
    key_bias_ptr,
    value_bias_ptr,
    out_ptr,  # (H * E + 2 * G * E,)
    N,
    query_rows,
    key_rows,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Queries, keys and values of the normed token."""
    block = tl.program_id(0)
    query_blocks, key_blocks = tl.cdiv(query_rows, BLOCK_M), tl.cdiv(key_rows, BLOCK_M)
    weight_ptr, bias_ptr, first, rows_in_all, before = query_ptr, query_bias_ptr, block, query_rows, 0
    if block >= query_blocks + key_blocks:
        weight_ptr, bias_ptr, first = value_ptr, value_bias_ptr, block - query_blocks - key_blocks
        rows_in_all, before = key_rows, query_rows + key_rows
    elif block >= query_blocks:
        weight_ptr, bias_ptr, first = key_ptr, key_bias_ptr, block - query_blocks
        rows_in_all, before = key_rows, query_rows
    rows = first * BLOCK_M + tl.arange(0, BLOCK_M)
    total = _product(weight_ptr, rows, rows_in_all, N, hidden_ptr, norm_ptr, eps, True, WHOLE, BLOCK_M, BLOCK_N, PDL)
    if HAS_BIAS:
        total += tl.load(bias_ptr + rows, mask=rows < rows_in_all, other=0.0).to(tl.float32)
    tl.store(out_ptr + before + rows, total.to(out_ptr.dtype.element_ty), mask=rows < rows_in_all)


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
def attention_kernel(
    heads_ptr,  # (H * E + 2 * G * E,)
    query_norm_ptr,
    key_norm_ptr,
    eps,
    frequency_ptr,
    attention_scaling,
    scaling,
    state_ptr,  # int64: tokens in the cache, position of the new one, first token that is seen, size of the buffers
    buffers_ptr,  # addresses of the layer's cache: keys and values (G, size, E)
    out_ptr,  # (H * E,)
    sums_ptr,  # (SPLITS, H, E) fp32: results of a group's programs, for the last of them
    weights_ptr,  # (SPLITS, 2, H) fp32: largest score and sum of the exponentials
    arrived_ptr,  # (G,) int32, zeros
    H: tl.constexpr,
    G: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    NORMED: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SPLITS: tl.constexpr,
    KEYS_PER_SPLIT: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """Attention of one group's query heads over a part of the keys; writes the new key and value into the cache."""
    group, split = tl.program_id(0), tl.program_id(1)
    dtype: tl.constexpr = heads_ptr.dtype.element_ty
    per_group: tl.constexpr = H // G
    # the state was written two kernels ago, so there is no need to wait
    past, position, first = tl.load(state_ptr), tl.load(state_ptr + 1), tl.load(state_ptr + 2)
    length = tl.load(state_ptr + 3)
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
        columns = tl.arange(0, BLOCK_E)
        in_head = columns < E
        inside = valid[:, None] & in_head[None, :]
        query = _rotated(
            heads_ptr + group * per_group * E, rows, valid, query_norm_ptr, eps, frequency_ptr, position,
            attention_scaling, E, R, BLOCK_E, NORMED, ROPE,
        )  # fmt: skip
        largest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
        weight = tl.zeros((BLOCK_H,), tl.float32)
        total = tl.zeros((BLOCK_H, BLOCK_E), tl.float32)
        base = group.to(tl.int64) * length * E
        if past < start + size:
            one = tl.arange(0, 1)
            new_key = _rotated(
                heads_ptr + (H + group) * E, one, one < 1, key_norm_ptr, eps, frequency_ptr, position,
                attention_scaling, E, R, BLOCK_E, NORMED, ROPE,
            )  # fmt: skip
            new_value = tl.load(heads_ptr + (H + G + group) * E + columns, mask=in_head, other=0.0)
            place = base + past * E + columns
            tl.store(keys + place[None, :], new_key.to(dtype), mask=in_head[None, :])
            tl.store(values + place, new_value, mask=in_head)
            largest = tl.sum(query * new_key, 1) * scaling
            weight = tl.full((BLOCK_H,), 1.0, tl.float32)
            total += new_value.to(tl.float32)[None, :]
        query = query.to(dtype)
        for begin in range(tl.maximum(start, first // BLOCK_K * BLOCK_K), stop, BLOCK_K):
            token = begin + tl.arange(0, BLOCK_K)
            seen = (token >= first) & (token < stop)
            place = base + token.to(tl.int64)[:, None] * E + columns[None, :]
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
            total = total * shrunk[:, None] + tl.dot(part.to(dtype), value, input_precision=PRECISION)
            largest = new_largest
        head = group * per_group + rows
        place = head[:, None] * E + columns[None, :]
        if count == 1:
            tl.store(out_ptr + place, (total / weight[:, None]).to(dtype), mask=inside)
        else:
            tl.store(weights_ptr + split * 2 * H + head, largest, mask=valid)
            tl.store(weights_ptr + split * 2 * H + H + head, weight, mask=valid)
            tl.store(sums_ptr + split * H * E + place, total, mask=inside)
            tl.debug_barrier()  # all threads have stored before one of them reports it
            if tl.atomic_add(arrived_ptr + group, 1, sem="acq_rel") == count - 1:
                _combine(sums_ptr, weights_ptr, out_ptr, head, place, valid, inside, count, H, E, BLOCK_H, BLOCK_E)
                tl.store(arrived_ptr + group, 0)


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


@triton.jit
def gate_kernel(
    hidden_ptr,  # (D,)
    norm_ptr,  # (D,)
    eps,
    gate_ptr,  # (F, D)
    up_ptr,  # (F, D)
    gate_bias_ptr,
    up_bias_ptr,
    out_ptr,  # (F,)
    M,
    N,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """silu(gate) * up of the normed token."""
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < M
    offsets = rows[:, None].to(tl.int64) * N
    if WHOLE:
        columns = tl.arange(0, BLOCK_N)
        valid = columns < N
        mask = inside[:, None] & valid[None, :]
        gates = tl.load(gate_ptr + offsets + columns[None, :], mask=mask, other=0.0)
        ups = tl.load(up_ptr + offsets + columns[None, :], mask=mask, other=0.0)
        norm = tl.load(norm_ptr + columns, mask=valid, other=0.0).to(tl.float32)
        _wait(PDL)
        x = tl.load(hidden_ptr + columns, mask=valid, other=0.0).to(tl.float32)
        x = _normed(x, norm, tl.rsqrt(tl.sum(x * x, 0) / N + eps), dtype)
        gate = tl.sum(gates.to(tl.float32) * x[None, :], 1)
        up = tl.sum(ups.to(tl.float32) * x[None, :], 1)
    else:
        _wait(PDL)
        scale = _scale_of(hidden_ptr, N, eps, BLOCK_N)
        gate_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, N, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            valid = columns < N
            mask = inside[:, None] & valid[None, :]
            gates = tl.load(gate_ptr + offsets + columns[None, :], mask=mask, other=0.0)
            ups = tl.load(up_ptr + offsets + columns[None, :], mask=mask, other=0.0)
            norm = tl.load(norm_ptr + columns, mask=valid, other=0.0).to(tl.float32)
            x = _normed(tl.load(hidden_ptr + columns, mask=valid, other=0.0).to(tl.float32), norm, scale, dtype)
            gate_sums += gates.to(tl.float32) * x[None, :]
            up_sums += ups.to(tl.float32) * x[None, :]
        gate = tl.sum(gate_sums, 1)
        up = tl.sum(up_sums, 1)
    if HAS_BIAS:
        gate += tl.load(gate_bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)
        up += tl.load(up_bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    gate = gate.to(dtype).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(out_ptr + rows, (activated * up.to(dtype).to(tl.float32)).to(dtype), mask=inside)


@triton.jit
def residual_kernel(
    x_ptr,  # (N,)
    weight_ptr,  # (D, N)
    bias_ptr,
    hidden_ptr,  # (D,), the residual, to which the product is added
    M,
    N,
    HAS_BIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Adds the last product of attention or MLP to the residual."""
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < M
    total = _product(weight_ptr, rows, M, N, x_ptr, x_ptr, 0.0, False, WHOLE, BLOCK_M, BLOCK_N, PDL)
    if HAS_BIAS:
        total += tl.load(bias_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    residual = tl.load(hidden_ptr + rows, mask=inside, other=0.0).to(tl.float32)
    tl.store(hidden_ptr + rows, (residual + total.to(dtype).to(tl.float32)).to(dtype), mask=inside)


@triton.jit
def head_kernel(
    hidden_ptr,  # (D,)
    norm_ptr,  # (D,)
    eps,
    weight_ptr,  # (V, D)
    logits_ptr,  # (V,)
    M,
    N,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """Logits of the normed token."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = _product(weight_ptr, rows, M, N, hidden_ptr, norm_ptr, eps, True, WHOLE, BLOCK_M, BLOCK_N, PDL)
    tl.store(logits_ptr + rows, total.to(logits_ptr.dtype.element_ty), mask=rows < M)


@triton.jit
def embedding_kernel(
    ids_ptr,  # (1,) int64
    weight_ptr,  # (V, D)
    hidden_ptr,  # (D,)
    N,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """The token's embedding."""
    _wait(PDL)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = columns < N
    place = tl.load(ids_ptr) * N + columns
    tl.store(hidden_ptr + columns, tl.load(weight_ptr + place, mask=valid, other=0.0), mask=valid)


@triton.jit
def advance_kernel(
    chosen_ptr,  # () int64, the next token
    ids_ptr,  # (1,) int64
    state_ptr,
    buffers_ptr,  # (layers, 4): the third is the address of a layer's length, int64
    layers,
    HAS_CHOICE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Counts one more token in the cache; if the next one was chosen here, writes it into text and ids."""
    past = tl.load(state_ptr) + 1
    tl.store(state_ptr, past)
    tl.store(state_ptr + 1, tl.load(state_ptr + 1) + 1)
    layer = tl.arange(0, BLOCK)
    lengths = tl.load(buffers_ptr + 4 * layer + 2, mask=layer < layers, other=0).to(tl.pointer_type(tl.int64))
    tl.store(lengths, tl.zeros((BLOCK,), tl.int64) + past, mask=layer < layers)
    if HAS_CHOICE:
        token = tl.load(chosen_ptr)
        tl.store(ids_ptr, token)
        text = tl.load(state_ptr + 4).to(tl.pointer_type(tl.int64))
        tl.store(text + past, token)
