import shutil
import socket
from pathlib import Path

import pytest
import torch

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "model"
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    HfDecoderForCausalLM(HfDecoderConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def alone(monkeypatch, tmp_path):
    """Refuses every connection, and notices whether code of the folder was run."""

    def refuse(*args, **kwargs):
        raise AssertionError("went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    trace = tmp_path / "was_run"
    yield f"from pathlib import Path\nPath({str(trace)!r}).touch()\nclass Model: ...\nclass HfDecoderConfig: ...\n"
    assert not trace.exists()
