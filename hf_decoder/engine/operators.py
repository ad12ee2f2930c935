"""Custom operators: functions that a compiled graph calls as a whole instead of tracing them."""

import re
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad


def operator(schema: str, compute: Callable, shapes: Callable) -> Any:
    """Registers an operator for tensors of any device.

    Args:
        schema: as `torch.library` takes it, `name(Tensor x, ...) -> Tensor`.
        compute: computes new tensors, never an input or a view of one.
        shapes: takes the same inputs; returns empty tensors with the outputs' shapes, dtypes and strides.
    """
    # one namespace per module, because a process may hold several copies of this code (the package, and from the Hub)
    namespace, name = re.sub(r"\W", "_", compute.__module__), schema.partition("(")[0]
    if not hasattr(getattr(torch.ops, namespace), name):
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(schema)
        library.impl(name, compute, "CompositeExplicitAutograd")
        library.impl(name, shapes, "Meta")
        _libraries.append(library)  # its operators live as long as it does
    return getattr(getattr(torch.ops, namespace), name).default


def may_call_operators() -> bool:
    """Whether torch.compile is tracing; not torch.export, whose graphs must run without our operators."""
    # reads the flag, because torch 2.11 compiles a call of is_exporting() into True
    return torch.compiler.is_compiling() and not getattr(torch.compiler, "_is_exporting_flag", False)


def runs_as_written() -> bool:
    """Whether no compiler, tracer or transform of `torch.func` looks inside a function."""
    # `torch.jit.is_tracing` without its two Python calls, because each layer asks a dozen times
    return not (torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active())


def runs_unseen() -> bool:
    """Whether, besides, no derivatives go forwards and no mode sees a call of `linear`, which it may change."""
    return runs_as_written() and forward_ad._current_level < 0 and not torch._C._len_torch_function_stack()


_libraries: list[torch.library.Library] = []

__all__ = ["may_call_operators", "operator", "runs_as_written", "runs_unseen"]
