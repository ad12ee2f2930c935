"""Registers the classes with transformers' Auto classes; runs once, when `hf_decoder` is imported.

The tables that hold names instead of classes are completed by `model/registry_hf_decoder.py`, which travels with a
checkpoint. With the package imported, its classes win over a checkpoint's remote code.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_decoder.model.configuration_hf_decoder import HfDecoderConfig
from hf_decoder.model.modeling_hf_decoder import (
    HfDecoderForCausalLM,
    HfDecoderForQuestionAnswering,
    HfDecoderForSequenceClassification,
    HfDecoderForTokenClassification,
    HfDecoderModel,
)

AUTO_CLASSES = {
    AutoModel: HfDecoderModel,
    AutoModelForCausalLM: HfDecoderForCausalLM,
    AutoModelForSequenceClassification: HfDecoderForSequenceClassification,
    AutoModelForTokenClassification: HfDecoderForTokenClassification,
    AutoModelForQuestionAnswering: HfDecoderForQuestionAnswering,
}


def register() -> None:
    """Makes `AutoConfig`, `AutoModel` and the four heads find our classes. Harmless if repeated."""
    AutoConfig.register(HfDecoderConfig.model_type, HfDecoderConfig, exist_ok=True)
    for auto_class, model_class in AUTO_CLASSES.items():
        auto_class.register(HfDecoderConfig, model_class, exist_ok=True)
