"""A tiny text and one tiny run of `hf-decoder pretrain`, shared by the tests of the commands."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
from made_up import SHAPE, made_text

from hf_decoder.cli.main import main

STEPS = 6


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """Keeps the disk cache of `datasets` out of the home folder, and every test run apart from the one before."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@dataclass(frozen=True)
class Run:
    folder: Path
    train_file: Path
    validation_file: Path
    flags: list[str]
    steps: int
    printed: str


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Run:
    """A finished run; read it, or copy its folder before changing it."""
    base = tmp_path_factory.mktemp("pretrain")
    train_file, validation_file = base / "train.txt", base / "held_out.txt"
    train_file.write_text(made_text(1, 1500), encoding="utf-8")
    validation_file.write_text(made_text(2, 100), encoding="utf-8")
    flags = ["--train_file", str(train_file), "--validation_file", str(validation_file)]
    flags += ["--vocab_size", "300", "--block_size", "64", "--config_overrides", SHAPE, "--max_steps", str(STEPS)]
    flags += [
        "--per_device_train_batch_size",
        "4",
        "--eval_steps",
        "3",
        "--save_steps",
        "3",
        "--save_total_limit",
        "2",
    ]
    folder = base / "model"
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        assert main(["pretrain", *flags, "--output_dir", str(folder), "--license", "apache-2.0"]) == 0
    return Run(folder, train_file, validation_file, flags, STEPS, "\n".join(printed))


@pytest.fixture
def model_copy(run, tmp_path) -> Path:
    """A copy of the run's model, to be damaged."""
    folder = tmp_path / "model"
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("checkpoint-*"))
    return folder


@pytest.fixture
def fails(capsys):
    """Runs a verb that must fail for a reason of the user's; returns the one line it says."""

    def check(*argv: str) -> str:
        capsys.readouterr()
        assert main(list(argv)) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert lines[-1].startswith(f"hf-decoder {argv[0]}: error: ")
        assert not any("Traceback" in line for line in lines)
        return lines[-1]

    return check
