"""Enters the class names into the tables that transformers and PEFT look models up in by name.

This travels with the checkpoint, because a pipeline or an adapter asks these tables also when the model came as remote
code. PEFT is neither needed nor imported here: its tables are completed at the moment that it is imported.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from types import ModuleType

from transformers.models.auto import modeling_auto

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
NAME_TABLES = {
    "MODEL_MAPPING_NAMES": "HfDecoderModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "HfDecoderForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "HfDecoderForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "HfDecoderForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "HfDecoderForQuestionAnswering",
}
PEFT_TABLES = "peft.utils.constants"


def register_names() -> None:
    """Completes the tables of transformers now, and those of PEFT now or once it is imported. Harmless if repeated."""
    for table, class_name in NAME_TABLES.items():
        getattr(modeling_auto, table)[MODEL_TYPE] = class_name
    if PEFT_TABLES in sys.modules:
        _complete_peft_tables(sys.modules[PEFT_TABLES])
    elif not any(type(finder).__name__ == _PeftTablesFinder.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftTablesFinder())


def _complete_peft_tables(constants: ModuleType) -> None:
    """Every tuner's default for Llama is right for us too: the modules have the same names."""
    for name, table in vars(constants).items():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(table, dict) and "llama" in table:
            table.setdefault(MODEL_TYPE, table["llama"])


class _PeftTablesFinder(MetaPathFinder):
    """Waits for the import of PEFT's tables, completes them when they have been filled, and is gone."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname != PEFT_TABLES:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return spec
        exec_module = spec.loader.exec_module

        def exec_and_complete(module: ModuleType) -> None:
            exec_module(module)
            _complete_peft_tables(module)

        spec.loader.exec_module = exec_and_complete  # type: ignore[method-assign]
        return spec


__all__ = ["AUTO_MAP", "register_names"]
