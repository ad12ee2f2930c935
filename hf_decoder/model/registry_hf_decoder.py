"""Enters the class names into the tables that transformers and PEFT look models up in by name.

This travels with the checkpoint, because a pipeline or an adapter asks these tables also when the model came as remote
code. Nothing is imported for that: tables are completed at the moment that their module is imported.
"""

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

MODEL_TYPE = "hf_decoder"

# What `auto_map` says in a saved config: auto class -> class in the files beside it.
AUTO_MAP = {
    "AutoConfig": "configuration_hf_decoder.HfDecoderConfig",
    "AutoModel": "modeling_hf_decoder.HfDecoderModel",
    "AutoModelForCausalLM": "modeling_hf_decoder.HfDecoderForCausalLM",
    "AutoModelForSequenceClassification": "modeling_hf_decoder.HfDecoderForSequenceClassification",
    "AutoModelForTokenClassification": "modeling_hf_decoder.HfDecoderForTokenClassification",
    "AutoModelForQuestionAnswering": "modeling_hf_decoder.HfDecoderForQuestionAnswering",
}
CONFIGS, MODELS = "transformers.models.auto.configuration_auto", "transformers.models.auto.modeling_auto"
PEFT_TABLES = "peft.utils.constants"
NAME_TABLES = {
    "MODEL_MAPPING_NAMES": "HfDecoderModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "HfDecoderForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "HfDecoderForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "HfDecoderForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "HfDecoderForQuestionAnswering",
}


def register_names() -> None:
    """Completes the tables of transformers and of PEFT, each now or once it is imported. Harmless if repeated."""
    once_imported(MODELS, _complete_model_tables)
    once_imported(PEFT_TABLES, _complete_peft_tables)


def once_imported(name: str, complete: Callable[[ModuleType], None]) -> None:
    """Calls `complete` with the module of that name: now if it is imported, or else when it has been."""
    if name in sys.modules:
        complete(sys.modules[name])
    elif (name, complete.__name__) not in map(_awaited, sys.meta_path):
        sys.meta_path.insert(0, _Awaiting(name, complete))


def _complete_model_tables(modeling_auto: ModuleType) -> None:
    for table, class_name in NAME_TABLES.items():
        getattr(modeling_auto, table)[MODEL_TYPE] = class_name


def _complete_peft_tables(constants: ModuleType) -> None:
    """Every tuner's default for Llama is right for us too: the modules have the same names."""
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "llama" in table:
            table.setdefault(MODEL_TYPE, table["llama"])


class _Awaiting(MetaPathFinder):
    """Waits for the import of a module, completes it when it has been filled, and is gone."""

    def __init__(self, name: str, complete: Callable[[ModuleType], None]):
        self.name, self.complete = name, complete
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


def _awaited(finder: Any) -> tuple[str, str] | None:
    """By names, since copies of this file that came with checkpoints wait for the same."""
    if type(finder).__name__ != _Awaiting.__name__:
        return None
    return finder.name, finder.complete.__name__


__all__ = ["AUTO_MAP", "once_imported", "register_names"]
