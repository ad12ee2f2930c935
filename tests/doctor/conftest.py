from pathlib import Path

import pytest
import torch
from patients import copy, patient, randomise, save, shape, train
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.data.documents import load_standard_library

logging.disable_progress_bar()


@pytest.fixture(scope="session")
def healthy(tmp_path_factory, tokenizer) -> dict[str, Path]:
    """One folder each of ours, Llama, Qwen3 and the patient without a defect."""
    root = tmp_path_factory.mktemp("healthy")
    torch.manual_seed(0)
    common = shape(tokenizer)
    models = {
        "ours": HfDecoderForCausalLM(HfDecoderConfig(**common, qk_norm=True, tie_word_embeddings=True)),
        "llama": LlamaForCausalLM(LlamaConfig(**common)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**common, head_dim=16, tie_word_embeddings=True)),
    }
    folders = {name: save(randomise(model), tokenizer, root / name) for name, model in models.items()}
    return folders | {"patient": patient(tokenizer, root / "patient", "none")}


@pytest.fixture(scope="session")
def trained(tmp_path_factory, tokenizer) -> Path:
    """A Llama that has learnt the text beside it, text.txt in the folder above."""
    root = tmp_path_factory.mktemp("trained")
    files = load_standard_library()["validation"]["text"]
    text = "\n\n".join(file[:4000] for file in files)[:60_000]
    (root / "text.txt").write_text(text, encoding="utf-8")
    torch.manual_seed(0)
    fields = {**shape(tokenizer), "num_key_value_heads": 4, "num_hidden_layers": 4}
    return save(train(LlamaForCausalLM(LlamaConfig(**fields)), tokenizer, text), tokenizer, root / "model")


@pytest.fixture
def ours(healthy, tmp_path) -> Path:
    """A copy of our healthy checkpoint, to be damaged."""
    return copy(healthy["ours"], tmp_path / "ours")


@pytest.fixture
def llama(healthy, tmp_path) -> Path:
    return copy(healthy["llama"], tmp_path / "llama")
