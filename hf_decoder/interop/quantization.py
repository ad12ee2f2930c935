"""Quantization on load: the methods by name, and the size and speed of a checkpoint under each.

Each is a `quantization_config` of transformers, so that `from_pretrained(folder, quantization_config=...)` does the
same. Only the matrices of the layers are quantized; embeddings and head stay in bfloat16, tied or not.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_decoder.engine.bitsandbytes import unpack_layers

NONE = "none"
GROUP_SIZE = 32


def _torchao_int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def _torchao_int4() -> Any:
    # the only int4 format of torchao that computes on a CPU; the one in torchao.quantization needs a GPU
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(PrototypeInt4WeightOnlyConfig(group_size=GROUP_SIZE, set_inductor_config=False))


def _bitsandbytes_int8() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit=True)


def _bitsandbytes_nf4() -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def _quanto(bits: int) -> Callable[[], Any]:
    def make() -> Any:
        from transformers import QuantoConfig

        return QuantoConfig(weights=f"int{bits}")

    return make


# name -> module that must be installed, package that brings it, and the config
METHODS: dict[str, tuple[str, str, Callable[[], Any]]] = {
    "torchao_int8": ("torchao", "torchao", _torchao_int8),
    "torchao_int4": ("torchao", "torchao", _torchao_int4),
    "bitsandbytes_int8": ("bitsandbytes", "bitsandbytes", _bitsandbytes_int8),
    "bitsandbytes_nf4": ("bitsandbytes", "bitsandbytes", _bitsandbytes_nf4),
    "quanto_int8": ("optimum.quanto", "optimum-quanto", _quanto(8)),
    "quanto_int4": ("optimum.quanto", "optimum-quanto", _quanto(4)),
}


def installed(method: str) -> bool:
    """Whether the library of a method is there."""
    module = METHODS[method][0]
    return importlib.util.find_spec(module.partition(".")[0]) is not None and bool(importlib.util.find_spec(module))


def quantization_config(method: str) -> Any:
    """The `quantization_config` of a method; `None` for "none".

    Raises:
        ValueError: if there is no such method, or its library is not installed.
    """
    if method == NONE:
        return None
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; choose one of: {NONE}, {', '.join(METHODS)}")
    if not installed(method):
        raise ValueError(f"method {method} needs {METHODS[method][1]}: pip install {METHODS[method][1]}")
    return METHODS[method][2]()


def tensor_bytes(model: nn.Module) -> int:
    """Bytes that parameters and buffers hold in memory, scales of quantized weights included, shared ones once."""
    storages: dict[int, int] = {}

    def add(tensor: torch.Tensor) -> None:
        if hasattr(tensor, "__tensor_flatten__"):
            names, _ = tensor.__tensor_flatten__()
            for name in names:
                add(getattr(tensor, name))
        else:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()

    tensors = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        add(tensor)
        state = getattr(tensor, "quant_state", None)  # bitsandbytes keeps its 4-bit scales beside the weight
        for part in vars(state).values() if state is not None else ():
            if isinstance(part, torch.Tensor):
                add(part)
        for name in ("CB", "SCB"):  # and its 8-bit ones
            if isinstance(getattr(tensor, name, None), torch.Tensor):
                add(getattr(tensor, name))
    return sum(storages.values())


@dataclass(frozen=True)
class Measurement:
    """What a method gives; `disk_bytes` is `None` where transformers cannot save it."""

    method: str
    parameters: int
    disk_bytes: int | None
    memory_bytes: int
    perplexity: float
    tokens_per_second: float


def disk_bytes(model: Any) -> int | None:
    """Size of the saved weights, or `None` where the library has no form for them on disk."""
    unpack_layers(model)
    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder)
        except ValueError:  # what transformers and torchao raise
            return None
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def decoding_speed(model: Any, *, prompt_tokens: int = 16, new_tokens: int = 64, repeats: int = 3) -> float:
    """Tokens a second of greedy `generate`, one row: the median of `repeats` after a warm-up."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, prompt_tokens), generator=generator).to(model.device)
    settings = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    times = []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        times.append(time.perf_counter() - start)
    return new_tokens / statistics.median(times[1:])
