"""Ctrl-C and SIGTERM in the long verbs: what is done is kept, what is half-done goes, a line says how to go on."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from made_up import SHAPE, made_text
from safetensors.torch import load_file
from transformers import Trainer

from hf_decoder.cli.main import main
from hf_decoder.evaluation import metrics
from hf_decoder.interop import quantization, verification

SIGNALS = [signal.SIGINT, signal.SIGTERM]
ROWS = [{"text": f"{word} film {n}", "label": label} for n in range(12) for word, label in (("good", 1), ("bad", 0))]
PAIRS = [{"prompt": f"the {a} sees", "completion": " the dog"} for a in ("cat", "dog", "bird")] * 4


@pytest.fixture
def rows(tmp_path):
    def write(rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def send(monkeypatch):
    """Has a signal come when `name` of `owner` is called for the `call`-th time."""

    def set_up(owner, name, number, call=1):
        function, calls = getattr(owner, name), [0]

        def called(*args, **kwargs):
            calls[0] += 1
            if calls[0] == call:
                os.kill(os.getpid(), number)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, called)

    return set_up


def stopped(capsys, argv, number) -> str:
    """Runs a verb that the signal `number` stops; returns the one line about it."""
    before = [signal.getsignal(one) for one in SIGNALS]
    capsys.readouterr()
    assert main(argv) == 128 + number
    assert [signal.getsignal(one) for one in SIGNALS] == before
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith(f"hf-decoder {argv[0]}: stopped")]
    assert f"stopped by {number.name}" in line and "Traceback" not in said
    return line


@pytest.mark.process
@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("flags", [[], ["--use_peft", "true"], ["--save_only_model", "true"]], ids=["full", "lora", "weights"])  # fmt: skip # noqa: E501
def test_finetune_saves_and_goes_on_to_the_same_weights(run, rows, send, tmp_path, capsys, number, flags):
    out = tmp_path / "out"
    argv = [
        "finetune",
        str(run.folder),
        "--train_file",
        rows(PAIRS),
        "--max_steps",
        "4",
        "--report_to",
        "none",
        *flags,
    ]
    argv += ["--per_device_train_batch_size", "2", "--bf16", "false", "--disable_tqdm", "true"]
    assert main([*argv, "--output_dir", str(tmp_path / "whole")]) == 0
    send(Trainer, "training_step", number, call=2)
    line = stopped(capsys, [*argv, "--output_dir", str(out)], number)
    assert f"after step 2, saved as {out}/checkpoint-2" in line and "--resume_from_checkpoint" in line
    assert not list(out.glob("*.safetensors"))
    assert main([*argv, "--output_dir", str(out), "--resume_from_checkpoint"]) == 0
    (weights,) = out.glob("*.safetensors")
    one, other = load_file(weights), load_file(tmp_path / "whole" / weights.name)
    assert all(torch.equal(one[name], other[name]) for name in other)


@pytest.mark.process
@pytest.mark.parametrize("verb", ["finetune", "pretrain"])
def test_a_training_stopped_before_its_first_step_leaves_nothing(run, rows, send, tmp_path, capsys, verb):
    out = tmp_path / "out"
    argv = {
        "finetune": ["finetune", str(run.folder), "--train_file", rows(PAIRS), "--report_to", "none"],
        "pretrain": ["pretrain", *run.flags],
    }[verb]
    send(Trainer, "train", signal.SIGTERM)
    # the second signal ends what the first one lets finish
    send(Trainer, "get_train_dataloader", signal.SIGINT)
    line = stopped(capsys, [*argv, "--output_dir", str(out)], signal.SIGINT)
    assert "starts from the beginning" in line
    assert not out.exists()


@pytest.mark.process
def test_what_comes_after_the_last_step_is_made_up_for(run, rows, send, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["finetune", str(run.folder), "--train_file", rows(PAIRS), "--max_steps", "3", "--report_to", "none"]
    argv += ["--output_dir", str(out), "--per_device_train_batch_size", "4", "--bf16", "false"]
    argv += ["--eval_strategy", "steps", "--eval_steps", "1000", "--validation_split_percentage", "20"]
    send(Trainer, "evaluate", signal.SIGTERM, call=2)  # the first call measures the start
    line = stopped(capsys, argv, signal.SIGTERM)
    assert "after step 3" in line
    before = load_file(out / "checkpoint-3" / "model.safetensors")
    assert main([*argv, "--resume_from_checkpoint"]) == 0
    after = load_file(out / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((out / "all_results.json").read_text())["train_steps"] == 3


@pytest.mark.process
def test_crossvalidate_keeps_its_folds(rows, send, tmp_path, capsys):
    out = tmp_path / "out"
    argv = ["crossvalidate", "--train_file", rows(ROWS), "--num_folds", "3", "--config_overrides", SHAPE]
    argv += ["--output_dir", str(out), "--num_train_epochs", "1"]
    send(Trainer, "train", signal.SIGTERM)
    line = stopped(capsys, argv, signal.SIGTERM)
    assert "starts from the beginning" in line and not out.exists()
    send(Trainer, "train", signal.SIGINT, call=2)
    line = stopped(capsys, argv, signal.SIGINT)
    assert f"{out} keeps 1 of 3 folds; the same command goes on" in line
    assert main(argv) == 0
    assert len(json.loads((out / "crossvalidation_results.json").read_text())["folds"]) == 3


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("verb", ["eval", "quantize", "convert"])
def test_what_is_written_at_the_end_leaves_nothing_behind(run, send, tmp_path, capsys, verb, number):
    folder = tmp_path / "made"
    text = tmp_path / "text.txt"
    text.write_text(made_text(3, 20), encoding="utf-8")
    argv, owner, name = {
        "eval": (["eval", str(run.folder), "--text_file", str(text), "--output_dir", str(folder / "out")], metrics, "score_text"),  # noqa: E501
        "quantize": (["quantize", str(run.folder), "--text_file", str(text), "--methods", "torchao_int8", "--output_dir", str(folder / "out")], quantization, "decoding_speed"),  # noqa: E501
        "convert": (["convert", str(run.folder), str(folder / "out")], verification, "verify"),
    }[verb]  # fmt: skip
    folder.mkdir()
    send(owner, name, number)
    assert "the same command starts from the beginning" in stopped(capsys, argv, number)
    assert not list(folder.iterdir())


def test_what_a_killed_process_left_is_deleted_and_what_a_live_one_writes_is_not(run, tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, written = (tmp_path / f".out.{number}.partial" for number in (dead.pid, os.getppid()))
    others = tmp_path / f".other.{dead.pid}.partial"
    for folder in (left, written, others):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
    assert main(["convert", str(run.folder), str(tmp_path / "out")]) == 0
    assert not left.exists() and written.exists() and others.exists()


def test_a_forked_worker_ends_by_the_signal_and_says_nothing(run_python):
    said = run_python(
        """
        import os, signal, time
        from hf_decoder.safety.interrupts import interrupt, on_signal
        with on_signal(interrupt):
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
            time.sleep(0.5)
            os.kill(worker, signal.SIGTERM)
            print(os.WTERMSIG(os.waitpid(worker, 0)[1]) == signal.SIGTERM)
        """
    )
    assert said == "True\n"
