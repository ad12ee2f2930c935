"""Finds the compiled functions for what stands between the matrix products of training: Triton's, or C++ on a CPU.

Operator by operator, norms, rotations, gates and casts pass through memory a dozen times, on a CPU with fresh pages.
The compiled functions read and write each tensor once.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch.autograd import forward_ad
from transformers.utils import logging

from hf_decoder.engine.assumptions import DTYPES, PLAIN

logger = logging.get_logger(__name__)

MIN_KERNEL_ELEMENTS = 2**14  # with fewer, launches take longer than the work


def kernels_of(x: torch.Tensor) -> Any:
    """The module of the functions that take this tensor."""
    if has_kernels(x):
        from hf_decoder.engine.triton import training

        return training
    from hf_decoder.engine.training import compiled

    return compiled


def has_kernels(x: torch.Tensor) -> bool:
    """Whether Triton's kernels take this tensor."""
    return type(x) in PLAIN and x.dtype in DTYPES and kernels_run_on(x.device)


def is_nvidia_with_bf16(device: torch.device) -> bool:
    """Whether this is an NVIDIA GPU from Ampere on; a ROCm device is called cuda too."""
    return device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def kernels_run_on(device: torch.device) -> bool:
    """Whether this is such a GPU and Triton works, which needs a C compiler."""
    if not is_nvidia_with_bf16(device):
        return False
    try:
        from hf_decoder.engine.triton.training import gated_silu

        one = torch.ones(1, device=device)
        gated_silu(one, one)
    except ImportError:
        return False
    except Exception as error:
        logger.warning(f"Triton does not work here, so that training is slower: {error}")
        return False
    return True


class _NoContext:
    """What a `forward` may do with its context, where no gradient will be asked for."""

    needs_input_grad = (False,) * 8

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def applied(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """What `function.apply` gives. Without gradients its bookkeeping takes as long as the work on a small tensor."""
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:  # derivatives go forwards without gradients, too
        return function.apply(*inputs)
    return function.forward(_NoContext(), *inputs)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(..., D) -> (N, D)."""
    return x.reshape(-1, x.shape[-1])


def gradients_of_formula(
    formula: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], needs: Sequence[bool], grad: torch.Tensor
) -> list[torch.Tensor | None]:
    """Differentiable gradients of the inputs that need one, by autograd from the formula."""
    needed = [tensor for tensor, is_needed in zip(inputs, needs, strict=True) if is_needed]
    found = iter(torch.autograd.grad(formula(*inputs), needed, grad, create_graph=True))
    return [next(found) if is_needed else None for is_needed in needs]


__all__ = [
    "applied",
    "as_rows",
    "gradients_of_formula",
    "has_kernels",
    "is_nvidia_with_bf16",
    "kernels_of",
    "kernels_run_on",
]
