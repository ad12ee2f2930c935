"""Registers the classes with transformers' Auto classes; runs once, when `hf_decoder` is imported.

The tables that hold names instead of classes are completed by `model/registry_hf_decoder.py`, which travels with a
checkpoint. With the package imported, its classes win over a checkpoint's remote code.

A model class takes seconds to import, with torch and most of transformers. So the tables are completed when they have
been made, now if transformers has done so, and the class behind an entry of ours is imported when it is looked up.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

from hf_decoder.model.registry_hf_decoder import AUTO_MAP, CONFIGS, MODEL_TYPE, MODELS, once_imported, register_names
from hf_decoder.noise import quiet_imports

# class -> the module of `hf_decoder.model` that has it
CLASSES = {name: module for module, name in (path.split(".") for path in AUTO_MAP.values())}
CLASSES["HfDecoderPreTrainedModel"] = "modeling_hf_decoder"


def load_class(name: str) -> Any:
    """The public class of that name, a key of `CLASSES`."""
    with quiet_imports():
        return getattr(importlib.import_module(f"hf_decoder.model.{CLASSES[name]}"), name)


class _LateClasses(dict):
    """A table of transformers', by config class, in which a string stands for a class of ours until asked for."""

    def __getitem__(self, config_class: Any) -> Any:
        entry = super().__getitem__(config_class)
        return load_class(entry) if isinstance(entry, str) else entry

    def values(self) -> Any:
        return [self[config_class] for config_class in self]

    def items(self) -> Any:
        return [(config_class, self[config_class]) for config_class in self]


def register() -> None:
    """Makes `AutoConfig`, `AutoModel` and the four heads find our classes. Harmless if repeated."""
    once_imported(CONFIGS, _register_config)
    once_imported(MODELS, _register_models)
    register_names()


def _register_config(configuration_auto: ModuleType) -> None:
    configuration_auto.AutoConfig.register(MODEL_TYPE, load_class("HfDecoderConfig"), exist_ok=True)


def _register_models(modeling_auto: ModuleType) -> None:
    config_class = load_class("HfDecoderConfig")
    for auto_name, path in AUTO_MAP.items():
        if auto_class := getattr(modeling_auto, auto_name, None):  # AutoConfig is elsewhere
            table = auto_class._model_mapping
            table._extra_content = _LateClasses(table._extra_content)
            table.register(config_class, path.partition(".")[2], exist_ok=True)
