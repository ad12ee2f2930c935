"""A modern decoder-only language model that is a plain Hugging Face model everywhere.

Importing this package registers the model with transformers' Auto classes. The classes themselves, and torch and
transformers with them, are imported when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

from hf_decoder.moved import explain_old_paths
from hf_decoder.registration import CLASSES, load_class, register

if TYPE_CHECKING:
    from hf_decoder.model.configuration_hf_decoder import HfDecoderConfig
    from hf_decoder.model.modeling_hf_decoder import (
        HfDecoderForCausalLM,
        HfDecoderForQuestionAnswering,
        HfDecoderForSequenceClassification,
        HfDecoderForTokenClassification,
        HfDecoderModel,
        HfDecoderPreTrainedModel,
    )

__version__ = "0.1.0"

__all__ = [
    "HfDecoderConfig",
    "HfDecoderForCausalLM",
    "HfDecoderForQuestionAnswering",
    "HfDecoderForSequenceClassification",
    "HfDecoderForTokenClassification",
    "HfDecoderModel",
    "HfDecoderPreTrainedModel",
]


def __getattr__(name: str) -> Any:
    if name not in CLASSES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found = load_class(name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
explain_old_paths()
