"""A Hub of one's own for each module, the client turned to it, and a small model to send there."""

import json
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants
from loopback import Hub
from small_folder import write_folder

from hf_decoder.cli.main import main
from hf_decoder.doctor import DoctorReport
from hf_decoder.publishing import push as push_module


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


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer) -> Path:
    """Read it, or copy it."""
    return write_folder(tmp_path_factory.mktemp("models") / "small", tokenizer)


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


@pytest.fixture
def unexamined(monkeypatch):
    """A doctor that finds a model healthy unseen, where a test is about what comes after it."""
    monkeypatch.setattr("hf_decoder.doctor.run_doctor", lambda *args, **kwargs: DoctorReport("", "", "quick", ()))


@pytest.fixture
def unloaded(monkeypatch):
    """A fresh process that finds all logits equal unseen, where a test is about what comes before it."""
    figures = json.dumps({"max_difference": 0.0, "package_hidden": True})
    monkeypatch.setattr(push_module, "run_fresh", lambda *args, **kwargs: figures)


@pytest.fixture
def pushes(capsys):
    """Runs the command; returns its exit code and all that it said."""

    def run(*argv: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main(["push", *map(str, argv)])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out + said.err

    return run
