"""The next-token loss straight from hidden states, without ever holding all the logits.

It works through the rows in chunks and forms the gradients in the same pass, because they need the same
logits: memory is one chunk of logits instead of several copies of all of them. The idea is that of Wijmans et al. 2024
("Cut Your Losses") and of Liger Kernel; this one is plain PyTorch and runs on any device. On CUDA a kernel does what
stands between the products.
Shapes: N rows (tokens), D hidden_size, V vocab_size.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from hf_decoder.engine.operators import may_call_operators, operator, runs_as_written
from hf_decoder.engine.precision import fast_dtype, product_dtype
from hf_decoder.engine.training.blocks import has_kernels
from hf_decoder.engine.training.fast_products import fast_products
from hf_decoder.model.loss_hf_decoder import (
    causal_lm_loss,
    check_targets,
    is_plain_linear,
    mean_loss,
    next_tokens,
    softcap,
)

# Elements of one chunk of logits, at least; large enough for full matmul speed.
CHUNK_ELEMENTS = 2**21
MIN_CHUNK_ROWS = 512
TILE_ROWS = 128
# Of one chunk where a kernel takes the logits as they are: 256 MiB in half precision. Each chunk more adds a read and
# a write of the weight's gradient, and few rows leave a part of a large GPU idle.
KERNEL_CHUNK_ELEMENTS = 2**27
# What a CPU works through at a time between the matmuls, small enough for its caches: logits in fp32, and rows of the
# weight's gradient. Elsewhere a chunk is done whole, because there it is the launches of kernels that cost.
BLOCK_ELEMENTS = 2**20
WEIGHT_ROWS = 2048


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
    """`causal_lm_loss` of `lm_head(hidden_states)`, (B, S, D), without holding the logits where the head allows it.

    The head allows it when it is a plain linear layer whose weight lies here in one piece, or does while FSDP2 has it
    gathered. One that an adapter wraps, a quantizer replaced, or tensor parallelism and ZeRO-3 sharded is called as it
    is, and its logits are held. So are they under the transforms of `torch.func`.

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
        # FSDP2's hooks around a call of the module gather its weight and, later, scatter the gradient; what they
        # surround here ends in the loss. It is divided in there too: they may round what comes out to half precision.
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
    """The loss from (B, S, D) and (B * S,) targets, with the head's weight at hand."""
    ignore_index, z_loss_coef, cap = settings
    targets = targets.to(hidden_states.device)
    weight, bias = cast(nn.Linear, lm_head).weight, cast(nn.Linear, lm_head).bias
    check_targets(targets, weight.shape[0], ignore_index)
    rows = hidden_states.reshape(-1, hidden_states.shape[-1])
    valid = targets != ignore_index
    if not torch.compiler.is_compiling():  # positions without a label never reach the head
        counted = valid.nonzero().squeeze(-1)
        # not by brackets, whose gradient is for rows that may be picked twice, which a GPU has to sort
        rows, targets = rows.index_select(0, counted), targets.index_select(0, counted)
    total = linear_cross_entropy(rows, weight, targets, bias, ignore_index, z_loss_coef, cap)
    return mean_loss(total, valid, num_items_in_batch)


def _is_gathered_when_called(lm_head: nn.Module) -> bool:
    """Whether FSDP2 made the head's class of a plain linear layer's, and nothing else is attached to it."""
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
        targets: (N,), `ignore_index` where a row does not count.
        bias: (V,).
        ignore_index: target of rows without loss.
        z_loss_coef: weight of the squared log-partition, added to every row that counts.
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
    """The sum, and the gradients that it needs, of rows, weight and bias, chunk by chunk."""
    needs_rows, needs_weight, needs_bias = needs
    grad_rows = torch.empty_like(rows) if needs_rows else None
    # fp32 whatever the weights' type: many chunks are added up, the first one in place of zeros
    grad_weight = torch.empty_like(weight, dtype=torch.float32) if needs_weight else None
    if grad_weight is not None and not rows.shape[0]:
        grad_weight.zero_()
    grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None and needs_bias else None
    total = torch.zeros((), dtype=torch.float32, device=rows.device)
    vocab_size = weight.shape[0]
    has_kernel = runs_as_written() and has_kernels(rows)
    chunk_rows = _chunk_rows(rows.shape[0], vocab_size, has_kernel)
    block_rows, weight_rows, on_cpu = chunk_rows, vocab_size, rows.device.type == "cpu"
    if on_cpu:
        block_rows, weight_rows = min(chunk_rows, max(1, BLOCK_ELEMENTS // vocab_size)), min(vocab_size, WEIGHT_ROWS)
    # the same memory serves every chunk: fresh pages would cost as much as the arithmetic
    all_logits = rows.new_empty(chunk_rows, vocab_size)
    buffer_shape = (0 if has_kernel else 2 if settings[2] is None else 3, block_rows, vocab_size)
    buffers = rows.new_empty(buffer_shape, dtype=torch.float32)
    adds_products = has_kernel and needs_weight and _adds_products_in_fp32(rows.device, rows.dtype)
    all_products = weight.new_empty(weight_rows if needs_weight and not adds_products else 0, weight.shape[1])
    # a CPU adds tensors of two types several times slower than of one
    upcast = torch.empty_like(all_products, dtype=torch.float32) if on_cpu else None
    if has_kernel:
        _assert_targets(targets, vocab_size, settings[0])

    for start in range(0, rows.shape[0], chunk_rows):
        chunk = rows[start : start + chunk_rows]
        target = targets[start : start + chunk_rows]
        logits = all_logits[: chunk.shape[0]]
        if bias is None:
            torch.mm(chunk, weight.t(), out=logits)
        else:
            torch.addmm(bias, chunk, weight.t(), out=logits)
        if has_kernel:
            from hf_decoder.engine.triton.training import cross_entropy

            total += cross_entropy(logits, target, *settings, needs_gradient=any(needs)).sum()
        else:
            for first in range(0, chunk.shape[0], block_rows):
                block = slice(first, first + block_rows)
                total += _loss_of_block(logits[block], target[block], buffers, settings, any(needs))
        if grad_rows is not None:
            torch.mm(logits, weight, out=grad_rows[start : start + chunk_rows])
        if grad_weight is not None and adds_products:
            _add_product(grad_weight, logits.t(), chunk, is_first=not start)
        elif grad_weight is not None:
            for first in range(0, vocab_size, weight_rows):
                part = grad_weight[first : first + weight_rows]
                product = all_products[: len(part)]
                torch.mm(logits[:, first : first + weight_rows].t(), chunk, out=product)
                if not start:
                    part.copy_(product)
                else:
                    part += product if upcast is None else upcast[: len(part)].copy_(product)
        if grad_bias is not None:
            grad_bias += logits.sum(0, dtype=torch.float32)
    return total, grad_rows, grad_weight, grad_bias


def _chunk_rows(rows: int, vocab_size: int, has_kernel: bool) -> int:
    """Rows of all chunks but the last."""
    limit = max(MIN_CHUNK_ROWS, (KERNEL_CHUNK_ELEMENTS if has_kernel else CHUNK_ELEMENTS) // vocab_size)
    if has_kernel and rows > limit:  # of about one size, in whole tiles of a product
        count = -(-rows // limit)
        limit = min(limit, -(-rows // (count * TILE_ROWS)) * TILE_ROWS)
    return min(limit, max(rows, 1))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, is_first: bool) -> None:
    """total (M, N), fp32, += a (M, K) @ b (K, N); the first product takes its place, whatever it holds."""
    kinds: dict[str, Any] = {} if a.dtype == torch.float32 else {"out_dtype": torch.float32}
    torch.addmm(total, a, b, **kinds, beta=0 if is_first else 1, out=total)


@cache
def _adds_products_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype can be added up in fp32 at once, which torch has for CUDA alone."""
    factor = torch.ones(8, 8, device=device, dtype=dtype)
    try:
        _add_product(torch.empty(8, 8, device=device), factor, factor, is_first=True)
    except RuntimeError:
        return False
    return True


def _assert_targets(targets: torch.Tensor, vocab_size: int, ignore_index: int) -> None:
    """What indexing would assert on the device, without waiting for it."""
    fits = (targets == ignore_index) | ((targets >= 0) & (targets < vocab_size))
    torch._assert_async(fits.all(), "a label is outside the vocabulary")


def _loss_of_block(
    logits: torch.Tensor,
    target: torch.Tensor,
    buffers: torch.Tensor,
    settings: tuple[int, float, float | None, float],
    needs_gradient: bool,
) -> torch.Tensor:
    """The summed loss of (N, V) logits, which its gradient replaces if needed; `buffers` is fp32 memory for N rows."""
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
    # a softmax is one call, whose exponentials are the quickest: its largest number says what all were divided by
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
    # a CPU can look whether there is a row to leave out; elsewhere the answer would be waited for
    if torch.compiler.is_compiling() or target.device.type != "cpu" or ignored.any():
        gradient.masked_fill_(ignored, 0.0)
    logits.copy_(gradient)
    return total


def _compute(rows, weight, bias, targets, needs, ignore_index, z_loss_coef, cap, smoothing) -> list[torch.Tensor]:
    settings = (ignore_index, z_loss_coef, cap, smoothing)
    all_rows, counted = rows, None
    if rows.device.type == "cpu":  # elsewhere the count would have to be waited for, which a captured graph cannot do
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


# in a compiled graph: traced, the chunks would be unrolled and their buffers no longer shared, and torch 2.11 would
# lose what is written into them, which are the gradients
_operator = operator(
    "linear_cross_entropy(Tensor rows, Tensor weight, Tensor? bias, Tensor targets, bool[] needs, int ignore_index, "
    "float z_loss_coef, float? cap, float smoothing) -> Tensor[]",
    _compute,
    _shapes,
)


class _LinearCrossEntropy(torch.autograd.Function):
    """Forms the gradients in the forward pass; the backward pass only scales them.

    What is multiplied in half precision is cast in here, so that gradients of fp32 tensors are never rounded to it.
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
        else:  # these are given away by the first backward pass; what is saved is for another one
            ctx.gradients = gradients
            ctx.save_for_backward(rows, weight, bias, targets)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            # `once_differentiable` would say so only if grad_total itself had a gradient
            raise RuntimeError("this loss has no second derivative; pass skip_logits=False for one that has")

        def scaled(grad, dtype):
            # grad_total is 1 / number of tokens: applied in fp32, so that half precision does not lose small values
            if grad is None or torch.compiler.is_compiling():  # the compiler makes one pass of two
                return None if grad is None else (grad * grad_total).to(dtype)
            # in place: a fresh copy of a large weight's gradient costs several times as much
            return torch.mul(
                grad, grad_total, out=grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
            )

        if torch.compiler.is_compiling():
            gradients = ctx.saved_tensors
        else:
            gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # the graph was kept, and this is not the first time
            *inputs, targets = ctx.saved_tensors
            inputs = [None if tensor is None else tensor.to(ctx.dtype) for tensor in inputs]
            gradients = _loss_and_gradients(*inputs, targets, ctx.needs, ctx.settings)[1:]
        return *map(scaled, gradients, ctx.dtypes), None, None, None, None


__all__ = ["linear_causal_lm_loss", "linear_cross_entropy"]
