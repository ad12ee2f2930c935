"""A Hub of one's own for each module, the client turned to it, and a small model to send there."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from loopback import Hub

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.modelcard import write_model_card

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def hub():
    with Hub() as running:
        yield running


@pytest.fixture(scope="module")
def hub_env(hub, tmp_path_factory) -> dict[str, str]:
    """The environment of a process that talks to `hub` as its owner, with caches of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    home = tmp_path_factory.mktemp("home")
    return {
        **kept,
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": "hf_owner",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1,localhost",
        "PYTHONPATH": str(ROOT),
    }


@pytest.fixture
def client(hub, hub_env, monkeypatch):
    """Turns the client of this process to `hub`; what it read from the environment at import is set anew."""
    for name, value in hub_env.items():
        monkeypatch.setenv(name, value)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", hub_env["HF_HOME"] + "/token")
    return hub


@pytest.fixture
def run_online(hub_env, tmp_path):
    """Runs code in a fresh process whose Hub is `hub`; returns what it prints. A failure shows all of it."""

    def run(code: str, *args: object, **env: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
            cwd=tmp_path,
            env={**hub_env, **env},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def write_folder(folder: Path, tokenizer, *, seed: int = 0, max_shard_size: str = "5GB", **overrides) -> Path:
    """A whole model folder, card and tokenizer included, small enough to send in no time."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "initializer_range": 0.2}
    special_tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = HfDecoderForCausalLM(HfDecoderConfig(**shape | special_tokens | overrides))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    write_model_card(folder, {"eval_loss": 2.5, "parameters": model.num_parameters()}, {"license": "apache-2.0"})
    (folder / "samples.md").write_text("a sample\n", encoding="utf-8")
    (folder / "loss_curve.png").write_bytes(b"\x89PNG\r\n")
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer) -> Path:
    """Read it, or copy it."""
    return write_folder(tmp_path_factory.mktemp("models") / "small", tokenizer)
