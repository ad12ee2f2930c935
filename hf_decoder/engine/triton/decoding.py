"""Triton kernels of the decode step on CUDA. A layer takes five kernels per token.

A small matrix-vector product on a GPU mostly waits for its first byte, so each kernel does as much as possible per
wait. It loads its weights before it reads the token, norms the token itself, and finishes with the gate, the residual
or the cache. Numbers are rounded where the modules round them.

Attention is in `attention.py`. Shapes: D hidden_size, H query heads, G key/value heads, E head_dim, F
intermediate_size, V vocab_size; M outputs and N inputs of a product.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:  # `has_kernels` checks for triton before
    raise ImportError("these kernels need triton, which comes with torch's builds for CUDA") from error


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
def _two_products(
    gate_ptr,
    up_ptr,
    rows,
    M,
    N,
    x_ptr,
    norm_ptr,
    eps,
    WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PDL: tl.constexpr,
):
    """gate[rows] and up[rows] @ the norm of x, each (BLOCK_M,) in fp32: `_product` that norms x once for both."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
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
        x = tl.load(x_ptr + columns, mask=valid, other=0.0).to(tl.float32)
        x = _normed(x, norm, tl.rsqrt(tl.sum(x * x, 0) / N + eps), dtype)
        gate = tl.sum(gates.to(tl.float32) * x[None, :], 1)
        up = tl.sum(ups.to(tl.float32) * x[None, :], 1)
    else:
        _wait(PDL)
        scale = _scale_of(x_ptr, N, eps, BLOCK_N)
        gate_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        up_sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, N, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            valid = columns < N
            mask = inside[:, None] & valid[None, :]
            gates = tl.load(gate_ptr + offsets + columns[None, :], mask=mask, other=0.0)
            ups = tl.load(up_ptr + offsets + columns[None, :], mask=mask, other=0.0)
            norm = tl.load(norm_ptr + columns, mask=valid, other=0.0).to(tl.float32)
            x = _normed(tl.load(x_ptr + columns, mask=valid, other=0.0).to(tl.float32), norm, scale, dtype)
            gate_sums += gates.to(tl.float32) * x[None, :]
            up_sums += ups.to(tl.float32) * x[None, :]
        gate = tl.sum(gate_sums, 1)
        up = tl.sum(up_sums, 1)
    return gate, up


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
    gate, up = _two_products(gate_ptr, up_ptr, rows, M, N, hidden_ptr, norm_ptr, eps, WHOLE, BLOCK_M, BLOCK_N, PDL)
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
    buffers_ptr,  # (layers, 4): the third is the address of a layer's number of tokens, int64
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
        text = tl.load(state_ptr + 3).to(tl.pointer_type(tl.int64))
        tl.store(text + past, token)
