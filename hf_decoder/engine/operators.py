"""Custom operators: functions that a compiled graph calls whole instead of tracing them."""

import re
from collections.abc import Callable
from typing import Any

import torch


def operator(schema: str, compute: Callable, shapes: Callable) -> Any:
    """Registers an operator for tensors of any device.

    Args:
        schema: as `torch.library` takes it, `name(Tensor x, ...) -> Tensor`.
        compute: what it does; new tensors out, none of the inputs and no view of one.
        shapes: of the same inputs, empty tensors with the outputs' shapes, dtypes and strides.
    """
    # a namespace a module: a process may hold several of these (the package, and copies from the Hub)
    namespace, name = re.sub(r"\W", "_", compute.__module__), schema.partition("(")[0]
    if not hasattr(getattr(torch.ops, namespace), name):
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define(schema)
        library.impl(name, compute, "CompositeExplicitAutograd")
        library.impl(name, shapes, "Meta")
        _libraries.append(library)  # its operators live as long as it does
    return getattr(getattr(torch.ops, namespace), name).default


def may_call_operators() -> bool:
    """Whether torch.compile is at work, and not torch.export, whose graphs are for those who lack our operators."""
    # the flag itself, because torch 2.11 compiles a call of is_exporting() into True
    return torch.compiler.is_compiling() and not getattr(torch.compiler, "_is_exporting_flag", False)


def runs_as_written() -> bool:
    """Whether nothing looks inside a function: no compiler, no tracer, no transform of `torch.func`."""
    # asked a dozen times a layer: `torch.jit.is_tracing`, without its two calls of Python
    return not (torch.compiler.is_compiling() or torch._C._is_tracing() or torch._C._are_functorch_transforms_active())


_libraries: list[torch.library.Library] = []

__all__ = ["may_call_operators", "operator", "runs_as_written"]
