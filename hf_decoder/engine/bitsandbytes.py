"""Keeps the layers of bitsandbytes in a form that computes, trains and saves correctly.

On a CPU with AVX512-BF16, bitsandbytes (0.50.2) packs a layer's 4-bit weight in its first forward pass in eval mode.
Packed products are faster but have three faults. They have no gradient, so that layers below learn only from the
residual stream in training after an evaluation. Saving a packed weight transposes its scales, in the file and in the
model. A layer fails if the packed blocks do not divide its sizes. A tied head cannot be quantized either; unless it is
listed as a module to skip, it is a quantized layer without a quantized weight.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hf_decoder.engine.assumptions import modules_below

_SWITCH = "support_avx512bf16_for_cpu"  # a layer reads it before it packs its weight
_PACKED_ROWS = 32
_LIBRARY = "bitsandbytes"  # if it is not imported, there are no such layers


def settle_layers(model: nn.Module, training: bool) -> None:
    """Unpacks all weights for training and stops packing; else lets every layer pack that can.

    A weight that was packed keeps scales rounded to bf16. One that has trained is never packed again, so a newly
    loaded model decodes faster.
    """
    for module in _layers(model):
        if training:
            _unpack(module)
        if training or not _fits(module):
            setattr(module, _SWITCH, False)


def unpack_layers(model: nn.Module) -> None:
    """Unpacks weights for saving; a forward pass may pack them again."""
    for module in _layers(model):
        _unpack(module)


def settle_tied_head(model: Any) -> None:
    """Replaces a quantized head that shares the embeddings' weight with a plain linear layer."""
    if _LIBRARY not in sys.modules:
        return
    head: Any = model.get_output_embeddings()
    if type(head).__module__.startswith(f"{_LIBRARY}.") and head.weight is model.get_input_embeddings().weight:
        plain = nn.Linear(head.in_features, head.out_features, bias=False, device="meta")
        plain.weight = head.weight
        model.set_output_embeddings(plain)


def _layers(model: nn.Module) -> Iterator[Any]:
    """The layers that may be packed."""
    if _LIBRARY not in sys.modules:
        return
    # Trainer calls this at every step: 0.03 ms for 40M parameters, where `modules()` and `getattr` take 0.4
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
    functional: Any = sys.modules["bitsandbytes.functional"]
    weight.data, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    if state.absmax.ndim == 2:  # (blocks of a row, rows), as the packed form has it
        state.absmax = state.absmax.T.reshape(-1).to(torch.float32)
    weight.quant_state = state


__all__ = ["settle_layers", "settle_tied_head", "unpack_layers"]
