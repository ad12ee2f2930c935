"""transformers' own model tests (model, generation, pipeline, training, TP and FSDP), run on this package's classes.

The tests are not part of the transformers wheel. They are taken from a source checkout of the installed version, which
`TRANSFORMERS_SOURCE` names; `StockLlamaModelTest` runs beside ours, and a test that it passes has to pass for ours too
(see conftest.py).
"""

import atexit
import json
import os
import re
import shutil
import sys
import tempfile
import unittest
from pathlib import Path

import pytest
import transformers

SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if not SOURCE:
    pytest.skip(
        "TRANSFORMERS_SOURCE names no transformers checkout: "
        f"git clone --depth 1 --branch v{transformers.__version__} https://github.com/huggingface/transformers "
        "and set it to that folder",
        allow_module_level=True,
    )

root = Path(SOURCE).resolve()
if not (root / "tests/causal_lm_tester.py").is_file():
    raise ValueError(f"TRANSFORMERS_SOURCE={SOURCE} holds no tests/causal_lm_tester.py; name a transformers checkout")
version = re.search(r'^__version__ = "(.+)"', (root / "src/transformers/__init__.py").read_text("utf-8"), re.MULTILINE)
if version is None or version[1] != transformers.__version__:
    raise ValueError(
        f"TRANSFORMERS_SOURCE={SOURCE} is transformers {version and version[1]}, installed is "
        f"{transformers.__version__}; check out v{transformers.__version__}"
    )

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

if os.environ.get("HF_DECODER_ENGINE") == "0":  # the plain classes, as they travel
    import hf_decoder.model.modeling_hf_decoder as room
else:
    import hf_decoder as room
from hf_decoder import HfDecoderConfig  # noqa: E402

HfDecoderForCausalLM = room.HfDecoderForCausalLM
HfDecoderForQuestionAnswering = room.HfDecoderForQuestionAnswering
HfDecoderForSequenceClassification = room.HfDecoderForSequenceClassification
HfDecoderForTokenClassification = room.HfDecoderForTokenClassification
HfDecoderModel = room.HfDecoderModel

HEADS = (
    HfDecoderModel,
    HfDecoderForCausalLM,
    HfDecoderForQuestionAnswering,
    HfDecoderForSequenceClassification,
    HfDecoderForTokenClassification,
)
LLAMA_HEADS = (
    LlamaModel,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)


def write_tiny_models(folder: Path, classes: tuple[type[PreTrainedModel], ...]) -> None:
    """Writes what the pipeline tests otherwise download: one tiny model and tokenizer a class.

    The layout is the one that transformers' `TRANSFORMERS_TINY_MODEL_PATH` asks for: `<model_type>/<class name>` and
    a summary in `reports/`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # No `model_max_length`: with one, the text-generation test expects every model whose name it does not know to fail
    # on a prompt beyond it, and RoPE does not.
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    summary = {}
    for cls in classes:
        config = cls.config_class(
            vocab_size=len(vocab),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        target = folder / cls.config_class.model_type / cls.__name__
        cls(config).save_pretrained(target)
        tokenizer.save_pretrained(target)
        summary[cls.__name__] = {
            "tokenizer_classes": ["PreTrainedTokenizerFast"],
            "processor_classes": [],
            "model_classes": [cls.__name__],
        }
    (folder / "reports").mkdir()
    (folder / "reports/tiny_model_summary.json").write_text(json.dumps(summary), "utf-8")


# The pipeline tests read this variable when they are imported.
tiny_models = Path(tempfile.mkdtemp(prefix="tiny_models_"))
atexit.register(shutil.rmtree, tiny_models, ignore_errors=True)
write_tiny_models(tiny_models, HEADS + LLAMA_HEADS)
os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = str(tiny_models)

# Their package is called `tests`, and the ranks of the distributed tests import it by that name.
sys.path.insert(0, str(root))
from tests.causal_lm_tester import CausalLMModelTest as _CausalLMModelTest  # noqa: E402
from tests.causal_lm_tester import CausalLMModelTester  # noqa: E402

from tests import test_fsdp_mixin, test_tensor_parallel_mixin  # noqa: E402

# transformers runs its distributed tests for a few model types only.
for enabled in (
    test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES,
    test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES,
):
    enabled |= {"llama", HfDecoderConfig.model_type}

pytestmark = pytest.mark.slow


class StockLlamaModelTester(CausalLMModelTester):
    base_model_class = LlamaModel


class StockLlamaModelTest(_CausalLMModelTest, unittest.TestCase):
    """The yardstick: what the stock model passes here, ours passes."""

    model_tester_class = StockLlamaModelTester
    model_split_percents = (0.5, 0.7, 0.8)
    _torch_compile_train_cls = LlamaForCausalLM
    test_can_init_all_missing_weights_before_2023 = True  # ours has no copyright year to read the age from


class HfDecoderModelTester(CausalLMModelTester):
    config_class = HfDecoderConfig
    base_model_class = HfDecoderModel
    causal_lm_class = HfDecoderForCausalLM
    question_answering_class = HfDecoderForQuestionAnswering
    sequence_classification_class = HfDecoderForSequenceClassification
    token_classification_class = HfDecoderForTokenClassification


class HfDecoderModelTest(_CausalLMModelTest, unittest.TestCase):
    model_tester_class = HfDecoderModelTester
    model_split_percents = (0.5, 0.7, 0.8)
    _torch_compile_train_cls = HfDecoderForCausalLM
    test_can_init_all_missing_weights_before_2023 = True


class QkNormModelTester(HfDecoderModelTester):
    def __init__(self, parent: unittest.TestCase) -> None:
        super().__init__(parent, num_attention_heads=4, num_key_value_heads=2, qk_norm=True, attention_bias="qkv")


class HfDecoderQkNormModelTest(HfDecoderModelTest):
    """Grouped queries, a norm over each head and biases of the input projections."""

    model_tester_class = QkNormModelTester
    skipped_by_design = ("test_tp_generation_quantized",)

    def test_tp_generation_quantized(self):
        # Shards have other 8-bit scales than the whole matrix. The test allows a quarter of the tokens to differ.
        self.skipTest("stock Qwen3 with the same weights generates the same tokens, and fails")


class SlidingWindowModelTester(HfDecoderModelTester):
    def __init__(self, parent: unittest.TestCase) -> None:
        # The generation tests expect caches as long as the sequence in every layer (stock SmolLM3 fails nine of them
        # with a window of 4), so the window is longer than their sequences. Other tests set it to 2 themselves.
        layer_types = ["sliding_attention", "full_attention"]
        super().__init__(parent, sliding_window=128, layer_types=layer_types, no_rope_layers=[1, 0])


class HfDecoderSlidingWindowModelTest(HfDecoderModelTest):
    """A sliding-window layer that rotates and a full layer that does not."""

    model_tester_class = SlidingWindowModelTester
    # these skip themselves for every model with a sliding window
    skipped_by_design = ("test_custom_4d_attention_mask", "test_generate_with_quant_cache")
