"""Keeps the layers of bitsandbytes in a form that computes, trains and saves correctly.

On a CPU with AVX512-BF16, bitsandbytes (0.50.2) packs the 4-bit weight of a layer in its first forward pass in eval
mode. Products with packed weights are faster, but have no gradient, so that in a training that goes on after an
evaluation the layers below learn from the residual stream alone; saving a packed weight leaves its scales transposed,
in the file and in the model; and a layer whose sizes the packed blocks do not divide fails in its forward pass. A head
that shares its table with the embeddings cannot be quantized, and is a layer without a quantized weight where the list
of modules to leave out does not name it.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_decoder.engine.assumptions import modules_below

_SWITCH = "support_avx512bf16_for_cpu"  # what a layer asks before it packs its weight
_PACKED_ROWS = 32
_LIBRARY = "bitsandbytes"  # without which, imported, there are no such layers to look for


def settle_layers(model: nn.Module, training: bool) -> None:
    """In training, nothing is packed any more, and what is packed is unpacked; else all is packed that can be.

    A weight that was packed has its scales rounded to bf16 from then on. One that has trained stays as it is: a model
    that is loaded anew decodes faster.
    """
    for module in _layers(model):
        if training:
            _unpack(module)
        if training or not _fits(module):
            setattr(module, _SWITCH, False)


def unpack_layers(model: nn.Module) -> None:
    """Puts packed weights into the form that is saved; a forward pass may pack them again."""
    for module in _layers(model):
        _unpack(module)


def settle_tied_head(model: Any) -> None:
    """A plain layer in place of a quantized one that holds the embeddings' table."""
    if _LIBRARY not in sys.modules:
        return
    head: Any = model.get_output_embeddings()
    if type(head).__module__.startswith(f"{_LIBRARY}.") and head.weight is model.get_input_embeddings().weight:
        plain = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
        plain.weight = head.weight
        model.set_output_embeddings(plain)


def _layers(model: nn.Module) -> Iterator[Any]:
    """Those that may be packed."""
    if _LIBRARY not in sys.modules:
        return
    # Trainer asks at every step, so not by `modules()`, nor for an attribute that a module lacks: 0.4 ms of 40M
    # parameters, where this takes 0.03
    yield from (module for module in modules_below(model) if vars(module).get(_SWITCH))


def _fits(module: Any) -> bool:
    state = getattr(module.weight, "quant_state", None)
    block = 64 if state is None else state.blocksize
    return module.out_features % _PACKED_ROWS == 0 and module.in_features % block == 0


def _unpack(module: Any) -> None:
    weight = module.weight
    state: Any = getattr(weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return
    functional: Any = sys.modules["bitsandbytes.functional"]  # which made the layer
    weight.data, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    if state.absmax.ndim == 2:  # (blocks of a row, rows), as the packed form has it
        state.absmax = state.absmax.T.reshape(-1).to(torch.float32)
    weight.quant_state = state


__all__ = ["settle_layers", "settle_tied_head", "unpack_layers"]
