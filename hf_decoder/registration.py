"""Registers the model with transformers and PEFT; runs once, when `hf_decoder` is imported.

With the package imported, its classes win over a checkpoint's remote code. A model class takes seconds to import, with
torch and most of transformers, so nothing is imported for this: a table is completed when its module has been
imported, now if it has been already, and the class behind an entry of ours is imported when it is looked up. This is
the package's one import hook; none travels with a checkpoint.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import wraps
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from hf_decoder.safety.quiet import quiet_imports

MODEL_TYPE = "hf_decoder"
CONFIG_CLASS = "HfDecoderConfig"
# auto class -> our class
HEADS = {
    "AutoModel": "HfDecoderModel",
    "AutoModelForCausalLM": "HfDecoderForCausalLM",
    "AutoModelForSequenceClassification": "HfDecoderForSequenceClassification",
    "AutoModelForTokenClassification": "HfDecoderForTokenClassification",
    "AutoModelForQuestionAnswering": "HfDecoderForQuestionAnswering",
}
CLASSES = (CONFIG_CLASS, "HfDecoderPreTrainedModel", *HEADS.values())


def load_class(name: str) -> Any:
    """The public class of that name, one of `CLASSES`: of models the fast one."""
    with quiet_imports():
        if name == CONFIG_CLASS:
            return importlib.import_module("hf_decoder.model.configuration_hf_decoder").HfDecoderConfig
        plain_class = getattr(importlib.import_module("hf_decoder.model.modeling_hf_decoder"), name)
        if name not in HEADS.values():
            return plain_class
        twins: Any = importlib.import_module("hf_decoder.engine.twins")
        twins.read_gguf = _read_gguf
        return twins.twin_of(plain_class)


def _read_gguf(path: Any) -> Any:
    """What the engine loads and the room `interop` reads; the engine knows no room above itself."""
    return importlib.import_module("hf_decoder.interop.conversion").read_gguf(path)


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
    once_imported("transformers.models.auto.configuration_auto", _register_config)
    once_imported("transformers.models.auto.modeling_auto", _register_models)
    once_imported("peft.utils.constants", _complete_peft_tables)
    once_imported("peft.tuners.tuners_utils", _refuse_to_merge_packed)


def _register_config(configuration_auto: ModuleType) -> None:
    configuration_auto.AutoConfig.register(MODEL_TYPE, load_class(CONFIG_CLASS), exist_ok=True)


def _register_models(modeling_auto: ModuleType) -> None:
    config_class = load_class(CONFIG_CLASS)
    for auto_name, class_name in HEADS.items():
        table = getattr(modeling_auto, auto_name)._model_mapping
        table._extra_content = _LateClasses(table._extra_content)
        table.register(config_class, class_name, exist_ok=True)


def _complete_peft_tables(constants: ModuleType) -> None:
    """Every tuner's default for Llama is right for us too: the modules have the same names."""
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "llama" in table:
            table.setdefault(MODEL_TYPE, table["llama"])


def _refuse_to_merge_packed(tuners_utils: ModuleType) -> None:
    """An adapter is merged by an addition to the numbers of a weight, and packed weights are bytes."""
    tuner = tuners_utils.BaseTuner
    check = tuner._check_merge_allowed
    if hasattr(check, "__wrapped__"):
        return

    @wraps(check)
    def check_packed(self: Any) -> None:
        if any(hasattr(module, "format_name") for module in self.model.modules()):
            raise ValueError(
                "an adapter cannot be merged into packed GGUF weights; load the file with "
                "quantization_config=GgufConfig(dequantize=True), put the adapter on top, and merge"
            )
        check(self)

    tuner._check_merge_allowed = check_packed


def once_imported(name: str, complete: Callable[[ModuleType], None]) -> None:
    """Calls `complete` with the module of that name: now if it is imported, or else when it has been."""
    if name in sys.modules:
        complete(sys.modules[name])
    elif (name, complete.__name__) not in (getattr(finder, "awaited", None) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaiting(name, complete))


class _Awaiting(MetaPathFinder):
    """Waits for the import of a module, completes it when it has been filled, and is gone."""

    def __init__(self, name: str, complete: Callable[[ModuleType], None]):
        self.name, self.complete = name, complete
        self.awaited = name, complete.__name__
        self._looks = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name or self._looks:
            return None
        self._looks = True
        try:
            spec = find_spec(fullname)  # by all the others, of which another one may wait for it, too
        finally:
            self._looks = False
        if spec is None or spec.loader is None:
            return spec
        exec_module = spec.loader.exec_module

        def exec_and_complete(module: ModuleType) -> None:
            exec_module(module)  # where this fails, somebody may try again
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.complete(module)

        spec.loader.exec_module = exec_and_complete  # type: ignore[method-assign]
        return spec


__all__ = ["CLASSES", "load_class", "register"]
