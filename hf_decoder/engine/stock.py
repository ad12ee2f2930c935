"""What `attach` knows of transformers' Llama, Mistral, Qwen2 and Qwen3, whose modules have our names.

A stock config lacks some of our fields. `fields_of` gives those the values that the family's modules compute with.
`check_stock` refuses what the fast paths would compute otherwise than the stock modules.
"""

import os
import sys
from pathlib import Path
from typing import Any

import transformers

from hf_decoder.model import modeling_hf_decoder as modeling

# By model type: the family's name in classes, and which of the fields that caches read its layers read as well.
FAMILIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "llama": ("Llama", ()),
    "mistral": ("Mistral", ("sliding_window",)),
    "qwen2": ("Qwen2", ("sliding_window", "layer_types")),
    "qwen3": ("Qwen3", ("sliding_window", "layer_types")),
}
CACHE_FIELDS = ("sliding_window", "layer_types", "attention_chunk_size", "kv_sharing_modes")
KINDS = {"full_attention", "sliding_attention"}
# where the methods of its classes and of their twins are written
LIBRARIES = tuple(str(Path(file).parent) + os.sep for file in (transformers.__file__, __file__, modeling.__file__))


class StockConfig:
    """A view of a stock config that has all fields which the fast paths read."""

    final_logit_softcapping = None

    def __init__(self, config: Any):
        self._config, read = config, FAMILIES[config.model_type][1]
        self.sliding_window = config.sliding_window if "sliding_window" in read else None
        kind = "full_attention" if self.sliding_window is None else "sliding_attention"
        self.layer_types = config.layer_types if "layer_types" in read else [kind] * config.num_hidden_layers
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def fields_of(config: Any) -> Any:
    """The config itself if it is ours, else a view of it with our fields."""
    return StockConfig(config) if config.model_type in FAMILIES else config


def is_stock(kind: type) -> bool:
    """Whether this is one of the four classes itself, not a class of somebody's own over it."""
    rooms = {name: sys.modules.get(room_of(model_type)) for model_type, (name, _) in FAMILIES.items()}
    return any(kind is getattr(room, f"{name}ForCausalLM", None) for name, room in rooms.items())


def room_of(model_type: str) -> str:
    """The name of the module that defines the classes of a family."""
    return f"transformers.models.{model_type}.modeling_{model_type}"


def check_stock(model: Any) -> None:
    """Raises a ValueError for a stock model that the fast paths do not hold; it names what stands in the way."""
    config, name = model.config, type(model).__name__
    reason = _obstacle(config, name) or _obstacle_in_modules(model)
    if reason is not None:
        raise ValueError(f"attach(model) cannot take this {name}: {reason}")


def _obstacle(config: Any, name: str) -> str | None:
    family, read = FAMILIES.get(config.model_type, ("", ()))
    if f"{family}ForCausalLM" != name:
        return f"its config.model_type is {config.model_type!r}; load it with the config class of its own family"
    for field in CACHE_FIELDS:
        if field not in read and getattr(config, field, None) is not None:
            value = getattr(config, field)
            return f"config.{field}={value!r} is for its caches alone, its layers do not read it; set it to None"
    fields = fields_of(config)
    strange = set(fields.layer_types) - KINDS
    if strange or len(fields.layer_types) < config.num_hidden_layers:
        found = f"{len(fields.layer_types)} entries" if not strange else repr(min(strange))
        return f"config.layer_types has {found}; give each layer full_attention or sliding_attention"
    if "sliding_attention" in fields.layer_types and fields.sliding_window is None:
        return "config.layer_types has sliding_attention, but config.sliding_window is None; set the window"
    if getattr(config, "quantization_config", None) is not None:
        return "it is quantized (config.quantization_config); load it without, or leave it as it is"
    return None


def _obstacle_in_modules(model: Any) -> str | None:
    frequencies = getattr(getattr(model.model, "rotary_emb", None), "inv_freq", None)
    width = fields_of(model.config).head_dim
    if frequencies is not None and 2 * len(frequencies) != width:
        return (
            f"config.rope_parameters rotates {2 * len(frequencies)} of {width} dimensions of a head; remove "
            "partial_rotary_factor, which its layers do not compute"
        )
    for kind in {type(module) for module in model.modules()}:
        if kind.__module__ == type(model).__module__ and not _is_of_library(kind.forward):
            return f"{kind.__name__}.forward was replaced; call attach(model) without that patch or kernel library"
    return None


def _is_of_library(function: Any) -> bool:
    """Whether a method and all its wrappers are code of transformers or of ours."""
    while function is not None:
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(LIBRARIES):
            return False
        function = getattr(function, "__wrapped__", None)
    return True


__all__ = ["FAMILIES", "StockConfig", "check_stock", "fields_of", "is_stock"]
