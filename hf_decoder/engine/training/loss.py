"""The next-token loss from hidden states, without ever holding all logits.

Rows go through the head in chunks, and the same pass forms the gradients from the chunk's logits. So memory holds one
chunk of logits instead of several copies of all. The idea is that of Wijmans et al. 2024 ("Cut Your Losses") and Liger
Kernel. This is plain PyTorch for any device; on CUDA a kernel computes what is between the products, on a CPU C++.
Shapes: N rows (tokens), D hidden_size, V vocab_size.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, cast

import torch
from torch import nn

from hf_decoder.engine.calibration import bucket, choose, numbers
from hf_decoder.engine.operators import may_call_operators, operator, runs_as_written
from hf_decoder.engine.precision import fast_dtype, product_dtype
from hf_decoder.engine.single_precision import multiply_rows, multiply_transposed
from hf_decoder.engine.switches import settings as engine_settings
from hf_decoder.engine.training import compiled
from hf_decoder.engine.training.fast_products import fast_products
from hf_decoder.engine.training.kernels import has_kernels
from hf_decoder.model.loss_hf_decoder import (
    causal_lm_loss,
    check_targets,
    is_plain_linear,
    mean_loss,
    next_tokens,
    softcap,
)

# Minimum elements of one chunk of logits; enough for full matmul speed.
CHUNK_ELEMENTS = 2**21
MIN_CHUNK_ROWS = 512
TILE_ROWS = 128
# The same for CUDA's kernel: 256 MiB in half precision. Every chunk reads and writes the weight's gradient, and few
# rows leave part of a large GPU idle.
KERNEL_CHUNK_ELEMENTS = 2**27
# Parts that fit a CPU's caches: elements of fp32 logits, or fewer where that is measured to be faster, and rows of the
# weight's gradient. Other devices take a whole chunk, because launches of kernels cost more there.
BLOCK_ELEMENTS = 2**20
SMALLER_BLOCKS = {"an eighth": 8, "a half": 2}  # by what share of that
WEIGHT_ROWS = 2048
MEASURED_ELEMENTS = 2**21  # of the logits that the sizes are compared by


def linear_causal_lm_loss(
    hidden_states: torch.Tensor,
    lm_head: nn.Module,
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    z_loss_coef: float = 0.0,
    final_logit_softcapping: float | None = None,
    **kwargs,
) -> torch.Tensor:
    """`causal_lm_loss` of `lm_head(hidden_states)`, (B, S, D), without holding the logits if the head allows it.

    The head must be a plain linear layer with its whole weight here, or with one that FSDP2 gathers. A head with an
    adapter, a quantized one, and one sharded by tensor parallelism or ZeRO-3 is called as it is and its logits are
    held. So they are under transforms of `torch.func`.

    Raises:
        ValueError: for a label outside the vocabulary (on a CPU).
    """
    targets = next_tokens(labels, shift_labels, ignore_index)
    settings = (ignore_index, z_loss_coef, final_logit_softcapping)
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        plain = gathered = False
    else:
        plain, gathered = is_plain_linear(lm_head), _is_gathered_when_called(lm_head)
    if plain:
        return _loss_of_rows(lm_head, hidden_states, targets, num_items_in_batch, settings)
    if gathered:
        # FSDP2's hooks around a call of the head gather its weight and later scatter the gradient, so the call
        # computes the loss. It divides the loss too, because the hooks may round the result to half precision.
        lm_head.forward = lambda hidden: _loss_of_rows(lm_head, hidden, targets, num_items_in_batch, settings)
        try:
            return lm_head(hidden_states)
        finally:
            del lm_head.forward
    with fast_products(hidden_states, lm_head):
        logits = lm_head(hidden_states)
    logits = softcap(logits, final_logit_softcapping)
    return causal_lm_loss(logits, None, logits.shape[-1], num_items_in_batch, ignore_index, targets, z_loss_coef)


def _loss_of_rows(
    lm_head: nn.Module,
    hidden_states: torch.Tensor,
    targets: torch.Tensor,
    num_items_in_batch: torch.Tensor | int | None,
    settings: tuple[int, float, float | None],
) -> torch.Tensor:
    """The mean loss of hidden states (B, S, D) and targets (B * S,), from the head's weight."""
    ignore_index, z_loss_coef, cap = settings
    targets = targets.to(hidden_states.device)
    weight, bias = cast(nn.Linear, lm_head).weight, cast(nn.Linear, lm_head).bias
    check_targets(targets, weight.shape[0], ignore_index)
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    valid = targets != ignore_index
    if not torch.compiler.is_compiling():  # positions without a label never reach the head
        counted = valid.nonzero().squeeze(-1)
        # not `rows[counted]`, whose gradient allows for repeated rows, which a GPU would have to sort
        rows, targets = rows.index_select(0, counted), targets.index_select(0, counted)
    total = linear_cross_entropy(rows, weight, targets, bias, ignore_index, z_loss_coef, cap)
    return mean_loss(total, valid, num_items_in_batch)


def _is_gathered_when_called(lm_head: nn.Module) -> bool:
    """Whether the head is a plain linear layer sharded by FSDP2, with no other hooks."""
    return (
        [base.__name__ for base in type(lm_head).__bases__] == ["FSDPModule", nn.Linear.__name__]
        and len(lm_head._forward_pre_hooks) <= 1
        and len(lm_head._forward_hooks) <= 1
        and "forward" not in lm_head.__dict__
        and not torch.compiler.is_compiling()
    )


def linear_cross_entropy(
    rows: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    ignore_index: int = -100,
    z_loss_coef: float = 0.0,
    final_logit_softcapping: float | None = None,
    label_smoothing: float = 0.0,
) -> torch.Tensor:
    """Summed cross-entropy of `rows @ weight.T + bias` against `targets`, softmax in fp32.

    Args:
        rows: (N, D).
        weight: (V, D).
        targets: (N,), `ignore_index` for rows that do not count.
        bias: (V,).
        ignore_index: target of rows without loss.
        z_loss_coef: weight of the squared log-partition of every row that counts.
        final_logit_softcapping: see `softcap`.
        label_smoothing: share of the target spread evenly over the vocabulary, as in `F.cross_entropy`.

    Returns:
        A scalar in fp32.
    """
    dtype = fast_dtype(rows.device, product_dtype(rows))
    settings = (ignore_index, z_loss_coef, final_logit_softcapping, label_smoothing)
    with torch.autocast(rows.device.type, enabled=False):
        return _LinearCrossEntropy.apply(rows, weight, bias, targets, torch.is_grad_enabled(), dtype, settings)


def _loss_and_gradients(
    rows: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    needs: Sequence[bool],
    settings: tuple[int, float, float | None, float],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """The summed loss, and the gradients of rows, weight and bias; None for those not needed."""
    needs_rows, needs_weight, needs_bias = needs
    vocab_size, on_cpu = weight.shape[0], rows.device.type == "cpu"
    has_kernel = runs_as_written() and has_kernels(rows)
    grad_rows = torch.empty_like(rows) if needs_rows else None
    grad_weight = _WeightGradient(rows, weight, has_kernel) if needs_weight else None
    grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
    total = torch.zeros((), dtype=torch.float32, device=rows.device)
    chunk_rows = chunk_rows_of(rows.shape[0], vocab_size, has_kernel)
    block_rows = chunk_rows
    in_cpp = _is_in_cpp(rows, vocab_size, settings)
    if on_cpu and not in_cpp:
        block_rows = min(chunk_rows, max(1, BLOCK_ELEMENTS // _share_of_block(rows.dtype, vocab_size) // vocab_size))
    # all chunks share this memory: fresh pages would cost as much as the arithmetic
    all_logits = rows.new_empty(chunk_rows, vocab_size)
    buffer_shape = (0 if has_kernel or in_cpp else 2 if settings[2] is None else 3, block_rows, vocab_size)
    buffers = rows.new_empty(buffer_shape, dtype=torch.float32)
    if has_kernel:
        _assert_targets(targets, vocab_size, settings[0])

    for start in range(0, rows.shape[0], chunk_rows):
        chunk = rows[start : start + chunk_rows]
        target = targets[start : start + chunk_rows]
        logits = all_logits[: chunk.shape[0]]
        multiply_rows(chunk, weight, bias, out=logits)
        if has_kernel:
            from hf_decoder.engine.triton.training import cross_entropy

            total += cross_entropy(logits, target, *settings, needs_gradient=any(needs)).sum()
        elif in_cpp:
            total += compiled.cross_entropy(logits, target, *settings[:2], needs_gradient=any(needs)).sum()
        else:
            for first in range(0, chunk.shape[0], block_rows):
                block = slice(first, first + block_rows)
                total += _loss_of_block(logits[block], target[block], buffers, settings, any(needs))
        if grad_rows is not None:
            multiply_rows(logits, weight.t(), out=grad_rows[start : start + chunk_rows])
        if grad_weight is not None:
            grad_weight.add(logits, chunk, is_first=not start)
        if grad_bias is not None:
            grad_bias += logits.sum(0, dtype=torch.float32)
    return total, grad_rows, None if grad_weight is None else grad_weight.total, grad_bias


class _WeightGradient:
    """Adds up the gradient of the weight over all chunks, in fp32 whatever the weight's dtype."""

    def __init__(self, rows: torch.Tensor, weight: torch.Tensor, has_kernel: bool):
        self.total = torch.empty_like(weight, dtype=torch.float32)  # the first chunk fills it
        if not rows.shape[0]:
            self.total.zero_()
        self.adds_products = has_kernel and _adds_products_in_fp32(rows.device, rows.dtype)
        on_cpu = rows.device.type == "cpu"
        self.part_rows = min(len(weight), WEIGHT_ROWS) if on_cpu else len(weight)
        self.products = weight.new_empty(0 if self.adds_products else self.part_rows, weight.shape[1])
        # a CPU adds tensors of two dtypes several times slower than of one
        self.upcast = torch.empty_like(self.products, dtype=torch.float32) if on_cpu else None

    def add(self, grad_logits: torch.Tensor, chunk: torch.Tensor, is_first: bool) -> None:
        """Adds grad_logits.T @ chunk, from (N, V) and (N, D)."""
        if self.adds_products:
            _add_product(self.total, grad_logits.t(), chunk, is_first)
            return
        for first in range(0, len(self.total), self.part_rows):
            part = self.total[first : first + self.part_rows]
            product = self.products[: len(part)]
            multiply_transposed(grad_logits[:, first : first + self.part_rows], chunk, out=product)
            if is_first:
                part.copy_(product)
            else:
                part += product if self.upcast is None else self.upcast[: len(part)].copy_(product)


def chunk_rows_of(rows: int, vocab_size: int, has_kernel: bool) -> int:
    """The rows of all chunks but the last."""
    limit = max(MIN_CHUNK_ROWS, (KERNEL_CHUNK_ELEMENTS if has_kernel else CHUNK_ELEMENTS) // vocab_size)
    if has_kernel and rows > limit:  # chunks of about equal size, in whole tiles of a product
        count = -(-rows // limit)
        limit = min(limit, -(-rows // (count * TILE_ROWS)) * TILE_ROWS)
    return min(limit, max(rows, 1))


def _is_in_cpp(rows: torch.Tensor, vocab_size: int, settings: tuple[int, float, float | None, float]) -> bool:
    """Whether C++ is faster than blocks, at hand, and for such a loss."""
    fits = settings[2] is None and not settings[3] and runs_as_written() and compiled.takes(rows)
    if not (fits and (engine_settings.ways is not None or compiled.is_ready())):
        return False
    vocab_size = bucket(vocab_size, 2**10, MEASURED_ELEMENTS // 4)
    candidates: dict[str, Callable] = {"torch": partial(_loss_in_blocks, None), "C++": _loss_in_cpp}
    key = (rows.dtype, vocab_size)
    return choose("loss", key, candidates, partial(_logits, *key)) == "C++"


def _share_of_block(dtype: torch.dtype, vocab_size: int) -> int:
    """What BLOCK_ELEMENTS is divided by where that is faster."""
    vocab_size = bucket(vocab_size, 2**10, MEASURED_ELEMENTS // 4)
    candidates = {name: partial(_loss_in_blocks, share) for name, share in {"whole": 1, **SMALLER_BLOCKS}.items()}
    way = choose("block of the loss", (dtype, vocab_size), candidates, partial(_logits, dtype, vocab_size))
    return SMALLER_BLOCKS.get(way, 1)


def _logits(dtype: torch.dtype, vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    rows = MEASURED_ELEMENTS // vocab_size
    return numbers(rows, vocab_size, dtype=dtype), torch.arange(rows, device="cpu") % vocab_size


def _loss_in_cpp(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The gradient of all rows."""
    gradient = logits.clone()
    compiled.cross_entropy(gradient, targets, -100, 0.0, needs_gradient=True)
    return gradient


def _loss_in_blocks(share: int | None, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The gradient of all rows; None: in the fastest blocks."""
    share = share or _share_of_block(logits.dtype, logits.shape[1])
    gradient, rows = logits.clone(), max(1, BLOCK_ELEMENTS // share // logits.shape[1])
    buffers = torch.empty(2, rows, logits.shape[1], dtype=torch.float32, device="cpu")
    for first in range(0, len(logits), rows):
        block = slice(first, first + rows)
        _loss_of_block(gradient[block], targets[block], buffers, (-100, 0.0, None, 0.0), needs_gradient=True)
    return gradient


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, is_first: bool) -> None:
    """total (M, N), fp32, += a (M, K) @ b (K, N); the first product overwrites the total."""
    kinds: dict[str, Any] = {} if a.dtype == torch.float32 else {"out_dtype": torch.float32}
    torch.addmm(total, a, b, **kinds, beta=0 if is_first else 1, out=total)


@cache
def _adds_products_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds products of this dtype to an fp32 tensor, which needs CUDA."""
    factor = torch.ones(8, 8, device=device, dtype=dtype)
    try:
        _add_product(torch.empty(8, 8, device=device), factor, factor, is_first=True)
    except RuntimeError:
        return False
    return True


def _assert_targets(targets: torch.Tensor, vocab_size: int, ignore_index: int) -> None:
    """Asserts valid targets on the device, without waiting for the result."""
    fits = (targets == ignore_index) | ((targets >= 0) & (targets < vocab_size))
    torch._assert_async(fits.all(), "a label is outside the vocabulary")


def _loss_of_block(
    logits: torch.Tensor,
    target: torch.Tensor,
    buffers: torch.Tensor,
    settings: tuple[int, float, float | None, float],
    needs_gradient: bool,
) -> torch.Tensor:
    """The summed loss of (N, V) logits, which become their gradient if needed; `buffers`: fp32 memory for N rows."""
    ignore_index, z_loss_coef, cap, smoothing = settings
    vocab_size = logits.shape[-1]
    ignored = (target == ignore_index).unsqueeze(-1)
    index = target.unsqueeze(-1).masked_fill(ignored, 0)
    scores = buffers[0, : logits.shape[0]].copy_(logits)
    slope = None
    if cap is not None:
        scores.div_(cap).tanh_()
        if needs_gradient:
            slope = torch.mul(scores, scores, out=buffers[1, : logits.shape[0]]).neg_().add_(1.0)
        scores.mul_(cap)
    largest = scores.amax(-1, keepdim=True)
    target_score = scores.gather(-1, index)
    if smoothing:
        target_score = target_score.lerp(scores.mean(-1, keepdim=True), smoothing)
    # one call of softmax has the fastest exponentials; its largest value gives the sum that all were divided by
    gradient = torch.softmax(scores, -1, out=buffers[-1, : logits.shape[0]])
    log_partition = largest - gradient.amax(-1, keepdim=True).log_()
    loss = log_partition - target_score
    if z_loss_coef:
        loss += z_loss_coef * log_partition.square()
    total = loss.masked_fill(ignored, 0.0).sum()
    if not needs_gradient:
        return total

    if z_loss_coef:
        gradient *= 1.0 + 2.0 * z_loss_coef * log_partition
    if smoothing:
        gradient -= smoothing / vocab_size
    gradient.scatter_add_(-1, index, torch.full_like(loss, smoothing - 1.0))
    if slope is not None:
        gradient *= slope
    # only a CPU can check for ignored rows without waiting for a device
    if torch.compiler.is_compiling() or target.device.type != "cpu" or ignored.any():
        gradient.masked_fill_(ignored, 0.0)
    logits.copy_(gradient)
    return total


def _compute(rows, weight, bias, targets, needs, ignore_index, z_loss_coef, cap, smoothing) -> list[torch.Tensor]:
    settings = (ignore_index, z_loss_coef, cap, smoothing)
    all_rows, counted = rows, None
    if rows.device.type == "cpu":  # elsewhere this would wait for the device, which a CUDA graph cannot do
        counted = (targets != ignore_index).nonzero().squeeze(-1)
        rows, targets = rows[counted], targets[counted]
    total, grad_rows, *grads = _loss_and_gradients(rows, weight, bias, targets, needs, settings)
    if grad_rows is not None and counted is not None:
        grad_rows = torch.zeros_like(all_rows).index_copy_(0, counted, grad_rows)
    results = (total, grad_rows, *grads)
    return [rows.new_empty(0) if result is None else result.contiguous() for result in results]


def _shapes(rows, weight, bias, targets, needs, *settings) -> list[torch.Tensor]:
    total = rows.new_empty((), dtype=torch.float32)
    grad_rows = rows.new_empty(rows.shape if needs[0] else 0)
    grad_weight = weight.new_empty(weight.shape, dtype=torch.float32) if needs[1] else rows.new_empty(0)
    grad_bias = bias.new_empty(bias.shape, dtype=torch.float32) if needs[2] else rows.new_empty(0)
    return [total, grad_rows, grad_weight, grad_bias]


# For compiled graphs. Tracing would unroll the chunks and give each its own buffers, and torch 2.11 would lose the
# gradients that are written into them.
_operator = operator(
    "linear_cross_entropy(Tensor rows, Tensor weight, Tensor? bias, Tensor targets, bool[] needs, int ignore_index, "
    "float z_loss_coef, float? cap, float smoothing) -> Tensor[]",
    _compute,
    _shapes,
)


class _LinearCrossEntropy(torch.autograd.Function):
    """Forms the gradients in the forward pass; the backward pass only scales them.

    The cast to half precision is in here, so that gradients of fp32 tensors are never rounded to it.
    """

    @staticmethod
    def forward(ctx, rows, weight, bias, targets, grad_enabled, dtype, settings):
        needs = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        ctx.needs, ctx.dtype, ctx.settings, ctx.gradients = needs, dtype, settings, None
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (rows, weight, bias)]
        inputs = [None if tensor is None else tensor.to(dtype) for tensor in (rows, weight, bias)]
        if may_call_operators():
            results = _operator(*inputs, targets, needs, *settings)
            total = results[0]
            gradients = [result if needed else None for result, needed in zip(results[1:], needs, strict=True)]
        else:
            total, *gradients = _loss_and_gradients(*inputs, targets, needs, settings)
        if torch.compiler.is_compiling():
            ctx.save_for_backward(*gradients)
        else:  # the first backward pass consumes the gradients; a second one recomputes them from what is saved
            ctx.gradients = gradients
            ctx.save_for_backward(rows, weight, bias, targets)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # `once_differentiable` would raise this only if grad_total itself had a gradient
            raise RuntimeError("this loss has no second derivative; pass skip_logits=False for one that has")

        def scaled(grad, dtype):
            # grad_total is 1 / number of tokens: applied in fp32, because half precision would lose small values
            if grad is None or torch.compiler.is_compiling():  # the compiler fuses both operations
                return None if grad is None else (grad * grad_total).to(dtype)
            # in place: a fresh copy of a large weight's gradient costs several times as much
            return torch.mul(
                grad, grad_total, out=grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
            )

        if torch.compiler.is_compiling():
            gradients = ctx.saved_tensors
        else:
            gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # a second backward pass over a retained graph
            *inputs, targets = ctx.saved_tensors
            inputs = [None if tensor is None else tensor.to(ctx.dtype) for tensor in inputs]
            gradients = _loss_and_gradients(*inputs, targets, ctx.needs, ctx.settings)[1:]
        return *map(scaled, gradients, ctx.dtypes), None, None, None, None


__all__ = ["chunk_rows_of", "linear_causal_lm_loss", "linear_cross_entropy"]
