"""The next-token loss, from logits or straight from hidden states without ever holding all the logits.

Shapes: B batch, S tokens of a row, N counted tokens, D hidden_size, V vocab_size.
"""

import torch
from torch import nn
from transformers.utils.import_utils import is_tracing

# Rows of logits that are held at once: enough for full speed of the matrix products, few enough for little memory.
CHUNK_ROWS = 512


def softcap(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    """Returns cap * tanh(logits / cap), bounded by +-cap (Gemma 2, section 2); without a cap, the logits."""
    return logits if cap is None else cap * torch.tanh(logits / cap)


def is_traced(x: torch.Tensor) -> bool:
    """Whether a compiler, a tracer or a transform of `torch.func` is at work, so that code must not look at data."""
    return is_tracing(x) or torch._C._are_functorch_transforms_active()


def next_tokens(labels: torch.Tensor | None, shift_labels: torch.Tensor | None, ignore_index: int) -> torch.Tensor:
    """Flattens to (B * S,) the ids of the next tokens: of labels (B, S), shifted here, or of labels shifted already.

    Raises:
        ValueError: without either.
    """
    if shift_labels is not None:
        return shift_labels.reshape(-1)
    if labels is None:
        raise ValueError("a loss needs labels or shift_labels; both are None")
    return nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:].reshape(-1)


def check_targets(targets: torch.Tensor, vocab_size: int, ignore_index: int) -> None:
    """Raises a ValueError for an id outside the vocabulary. A GPU would wait for the answer; it asserts by itself."""
    if targets.device.type != "cpu" or is_traced(targets):
        return
    wrong = targets[(targets != ignore_index) & ((targets < 0) | (targets >= vocab_size))]
    if wrong.numel():
        raise ValueError(
            f"labels holds the id {wrong[0]}, but the vocabulary ends at {vocab_size - 1}; use the tokenizer that "
            f"belongs to this model, and {ignore_index} where no loss is wanted"
        )


def mean_loss(total: torch.Tensor, counted: torch.Tensor, num_items_in_batch: torch.Tensor | int | None):
    """Divides a summed loss by the counted tokens, or by `num_items_in_batch`; 0/0 is 0."""
    items = counted.sum() if num_items_in_batch is None else num_items_in_batch
    return total / torch.as_tensor(items, device=total.device).clamp(min=1)


def causal_lm_loss(
    logits: torch.Tensor,
    labels: torch.Tensor | None,
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    z_loss_coef: float = 0.0,
    **kwargs,
) -> torch.Tensor:
    """Computes transformers' `ForCausalLMLoss` with a z-loss; a batch without a single label gives 0 and not NaN.

    Args:
        logits: (B, S, V), upcast to fp32 here.
        labels: (B, S), aligned with the inputs and shifted here; unused when `shift_labels` is given.
        vocab_size: V.
        num_items_in_batch: what the summed loss is divided by; without it, the number of labels that count.
        ignore_index: label of positions without loss.
        shift_labels: (B, S), labels that are shifted already.
        z_loss_coef: weight of the mean squared log-partition (PaLM, section 5).

    Raises:
        ValueError: for a label outside the vocabulary (on a CPU).
    """
    targets = next_tokens(labels, shift_labels, ignore_index).to(logits.device)
    check_targets(targets, vocab_size, ignore_index)
    rows = logits.reshape(-1, vocab_size)
    # without gradients nothing is kept, so a few rows at a time need little memory
    size = max(len(rows), 1) if torch.is_grad_enabled() or is_traced(rows) else CHUNK_ROWS
    pairs = zip(rows.split(size), targets.split(size), strict=True)
    total = torch.stack([_summed_loss(*pair, ignore_index, z_loss_coef) for pair in pairs]).sum()
    return mean_loss(total, targets != ignore_index, num_items_in_batch)


def _summed_loss(rows: torch.Tensor, targets: torch.Tensor, ignore_index: int, z_loss_coef: float) -> torch.Tensor:
    rows = rows.float()
    total = nn.functional.cross_entropy(rows, targets, ignore_index=ignore_index, reduction="sum")
    if z_loss_coef:
        ignored = targets == ignore_index
        total = total + z_loss_coef * rows.logsumexp(-1).square().masked_fill(ignored, 0.0).sum()
    return total


def linear_causal_lm_loss(
    hidden_states: torch.Tensor,
    lm_head: nn.Linear,
    labels: torch.Tensor | None,
    num_items_in_batch: torch.Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: torch.Tensor | None = None,
    z_loss_coef: float = 0.0,
    final_logit_softcapping: float | None = None,
    **kwargs,
) -> torch.Tensor:
    """Computes `causal_lm_loss` of `lm_head(hidden_states)`, (B, S, D), without holding the logits.

    Positions without a label never reach the head. The logits are held where the head has a bias or is no plain linear
    layer with its whole weight here (adapters, quantization, sharding, hooks), and under compilers and `torch.func`.

    Raises:
        ValueError: for a label outside the vocabulary (on a CPU).
    """
    targets = next_tokens(labels, shift_labels, ignore_index).to(hidden_states.device)
    if is_traced(hidden_states) or not is_plain_linear(lm_head) or lm_head.bias is not None:
        logits = softcap(lm_head(hidden_states), final_logit_softcapping)
        return causal_lm_loss(logits, None, logits.shape[-1], num_items_in_batch, ignore_index, targets, z_loss_coef)
    check_targets(targets, lm_head.weight.shape[0], ignore_index)
    counted = targets != ignore_index
    places = counted.nonzero().squeeze(-1)
    rows = hidden_states.reshape(-1, hidden_states.shape[-1]).index_select(0, places)
    dtype, device_type = rows.dtype, rows.device.type
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:  # which autocast leaves alone
        dtype = torch.get_autocast_dtype(device_type)
    settings = (dtype, torch.is_grad_enabled(), z_loss_coef, final_logit_softcapping)
    with torch.autocast(device_type, enabled=False):
        total = _ChunkedCrossEntropy.apply(rows, lm_head.weight, targets[places], *settings)
    return mean_loss(total, counted, num_items_in_batch)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling this module is a product with its weight and nothing else."""
    return (
        type(module) is nn.Linear
        and type(module.weight) in (nn.Parameter, torch.Tensor)
        and not module.weight.is_meta
        and not (module._forward_pre_hooks or module._forward_hooks)
        and not (module._backward_pre_hooks or module._backward_hooks)
        and "forward" not in module.__dict__  # where accelerate puts its offloading
    )


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of rows (N, D) times weight (V, D), as fp32.

    Loss and gradients need the same logits, so one pass over a chunk of rows forms both, and the backward pass only
    scales (Wijmans et al. 2024, "Cut Your Losses"; Liger Kernel). Products are in `dtype`, all else in fp32.
    """

    @staticmethod
    def forward(ctx, rows, weight, targets, dtype, grad_enabled, z_loss_coef, cap):
        ctx.dtypes = rows.dtype, weight.dtype
        needs = [grad_enabled and needed for needed in ctx.needs_input_grad[:2]]
        rows, weight = rows.to(dtype), weight.to(dtype)
        grad_rows = torch.empty_like(rows) if needs[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        for start in range(0, len(rows), CHUNK_ROWS):
            chunk, target = rows[start : start + CHUNK_ROWS], targets[start : start + CHUNK_ROWS, None]
            scores = softcap(nn.functional.linear(chunk, weight).float(), cap)
            log_partition = scores.logsumexp(-1, keepdim=True)
            total += (log_partition - scores.gather(-1, target) + z_loss_coef * log_partition.square()).sum()
            if not any(needs):
                continue
            slope = None if cap is None else 1.0 - (scores / cap).square()
            gradient = scores.sub_(log_partition).exp_()
            if z_loss_coef:
                gradient *= 1.0 + 2.0 * z_loss_coef * log_partition
            gradient.scatter_add_(-1, target, torch.full_like(log_partition, -1.0))
            if slope is not None:
                gradient *= slope
            gradient = gradient.to(dtype)
            if grad_rows is not None:
                torch.mm(gradient, weight, out=grad_rows[start : start + CHUNK_ROWS])
            if grad_weight is not None:
                grad_weight += gradient.t() @ chunk
        ctx.save_for_backward(grad_rows, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        if torch.is_grad_enabled():  # under `create_graph`
            raise RuntimeError("this loss has no second derivative; call the model with skip_logits=False")
        gradients = [
            None if gradient is None else (gradient * grad_total).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None, None, None


__all__ = ["causal_lm_loss", "linear_causal_lm_loss", "softcap"]
