"""A modern decoder-only language model that is a plain Hugging Face model everywhere.

Importing this package registers the model with transformers' Auto classes.
"""

from hf_decoder.noise import quiet_imports

with quiet_imports():
    from hf_decoder.model.configuration_hf_decoder import HfDecoderConfig
    from hf_decoder.model.modeling_hf_decoder import (
        HfDecoderForCausalLM,
        HfDecoderForQuestionAnswering,
        HfDecoderForSequenceClassification,
        HfDecoderForTokenClassification,
        HfDecoderModel,
        HfDecoderPreTrainedModel,
    )
    from hf_decoder.registration import register

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

register()
