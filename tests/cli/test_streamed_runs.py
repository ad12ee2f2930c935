"""`hf-decoder pretrain --streaming`: the same job on text that is read while it trains, stopped and resumed."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from made_up import SHAPE, child, made_text
from safetensors.torch import load_file
from test_faults import PROCESSES

from hf_decoder.cli.main import main
from hf_decoder.data import streaming
from hf_decoder.training import run_rows
from hf_decoder.training.checkpoints import MARK, is_complete, last_complete

STEPS = 30


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(one: Path, other: Path) -> bool:
    ours, theirs = weights(one), weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("streamed") / "text"
    folder.mkdir()
    for name in range(3):
        rows = [json.dumps({"text": made_text(100 * name + seed, 1 + seed % 23)}) for seed in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "long.txt").write_text(made_text(9, 900), encoding="utf-8")
    made = ["--train_file", str(folder), "--streaming", "--shuffle_buffer_size", "50", "--vocab_size", "300"]
    made += ["--block_size", "64", "--config_overrides", SHAPE, "--max_steps", str(STEPS), "--save_steps", "5"]
    made += ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2", "--eval_steps", "15"]
    return [*made, "--save_total_limit", "20", "--validation_split_percentage", "10"]


@pytest.fixture(scope="module")
def undisturbed(flags, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert main(["pretrain", *flags, "--output_dir", str(folder)]) == 0
    return folder


@pytest.mark.process
def test_the_whole_job_is_done(undisturbed, capsys):
    results = json.loads((undisturbed / "all_results.json").read_text())
    assert results["num_input_tokens_seen"] == STEPS * 4 * 2 * 64
    assert results["eval_tokens"] > 100
    assert results["eval_loss"] < 4.5  # from 5.7, the logarithm of the vocabulary
    for name in ("README.md", "loss_curve.png", "samples.md", "tokenizer.json"):
        assert (undisturbed / name).stat().st_size
    assert "stream_0.json" in {path.name for path in (undisturbed / "checkpoint-5").iterdir()}


@pytest.mark.process
@pytest.mark.parametrize("step, skip", [(5, "false"), (20, "false"), (20, "true")])
def test_resumed_is_uninterrupted_bit_for_bit(flags, undisturbed, tmp_path, step, skip):
    folder = tmp_path / "resumed"
    shutil.copytree(undisturbed / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    more = ["--resume_from_checkpoint", "--ignore_data_skip", skip]  # it is our own place that counts, not Trainer's
    assert main(["pretrain", *flags, "--output_dir", str(folder), *more]) == 0
    assert equal(folder, undisturbed)
    state = json.loads((folder / "trainer_state.json").read_text())
    assert state["global_step"] == STEPS and (skip == "true" or state["epoch"] == 1.0)


@pytest.mark.process
def test_resumed_with_workers_and_dropout_is_uninterrupted_too(flags, tmp_path):
    more = [*flags, "--dataloader_num_workers", "2", "--max_steps", "12", "--save_steps", "7"]
    more[more.index("--config_overrides") + 1] = SHAPE + ",attention_dropout=0.1"
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main(["pretrain", *more, "--output_dir", str(whole)]) == 0
    shutil.copytree(whole / "checkpoint-7", resumed / "checkpoint-7")
    assert main(["pretrain", *more, "--output_dir", str(resumed), "--resume_from_checkpoint"]) == 0
    assert equal(resumed, whole)


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed(flags, undisturbed, tmp_path, number):
    folder, log = tmp_path / "killed", tmp_path / "log"

    def start(*more: str):
        argv = ["pretrain", *flags, "--output_dir", str(folder), *more]
        process = PROCESSES.Process(target=child, args=(argv, str(tmp_path / "cache"), str(log), None, 0))
        process.start()
        return process

    process = start()
    end = time.monotonic() + 60
    while not (folder / "checkpoint-10" / MARK).exists():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.002)
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == (-number if number == signal.SIGKILL else 128 + number), log.read_text()
    assert not (folder / "model.safetensors").exists() and is_complete(last_complete(folder))
    process = start("--resume_from_checkpoint")
    process.join(120)
    assert process.exitcode == 0, log.read_text()
    assert equal(folder, undisturbed)


@pytest.mark.parametrize(
    "more, words",
    [
        (["--shuffle_buffer_size", "40"], "shuffle_buffer_size was 50 and is 40 now"),
        (["--dataloader_num_workers", "1"], "dataloader_num_workers was 0 and is 1 now"),
        (["--block_size", "32"], "block_size was 64 and is 32 now"),
        (["--seed", "3"], "seed was 42 and is 3 now"),
        (
            ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4"],
            "per_device_train_batch_size was 4 and is 2 now",
        ),
    ],
)
def test_resuming_in_another_order_is_refused(fails, flags, undisturbed, tmp_path, more, words):
    folder = tmp_path / "other"
    shutil.copytree(undisturbed / "checkpoint-5", folder / "checkpoint-5")
    assert words in fails("pretrain", *flags, "--output_dir", str(folder), "--resume_from_checkpoint", *more)


def test_resuming_with_a_changed_text_is_refused(fails, flags, undisturbed, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(undisturbed / "checkpoint-5", folder / "checkpoint-5")
    text = shutil.copytree(flags[1], tmp_path / "text")
    (text / "long.txt").write_text((text / "long.txt").read_text().replace("cat", "dog", 1))
    other = [*flags, "--train_file", str(text), "--output_dir", str(folder), "--resume_from_checkpoint"]
    assert "the data differs, content" in fails("pretrain", *other)


@pytest.mark.process
@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_bad_byte_far_into_the_text_leaves_the_last_checkpoint(fails, flags, run, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(run_rows, "SAMPLE_CHARACTERS", 1000)
    for name in ("PIECE_CHARACTERS", "LONGEST_PIECE", "LOOK_BYTES"):
        monkeypatch.setattr(streaming, name, 1000)
    text = tmp_path / "a.txt"
    text.write_bytes(made_text(1, 4000).encode() + b"\xff")
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(made_text(3, 20), encoding="utf-8")
    folder = tmp_path / "model"
    more = ["--tokenizer_name", str(run.folder), "--validation_file", str(held_out), "--shuffle_buffer_size", "0"]
    more += ["--max_steps", "10000", "--dataloader_num_workers", workers, "--eval_strategy", "no"]
    line = fails("pretrain", *flags, *more, "--train_file", str(text), "--output_dir", str(folder))
    assert f"a.txt is not UTF-8 (byte 0xff at offset {text.stat().st_size - 1})" in line
    assert is_complete(last_complete(folder))


def test_the_number_of_steps_is_needed(fails, flags, tmp_path):
    line = fails("pretrain", *flags, "--max_steps", "-1", "--output_dir", str(tmp_path / "model"))
    assert "--streaming needs --max_steps" in line
    assert not (tmp_path / "model").exists()


@pytest.mark.process
def test_the_report_before_training(flags, tmp_path, capsys):
    text = tmp_path / "a.txt"
    text.write_text(made_text(1, 2000), encoding="utf-8")
    more = ["--train_file", str(text), "--max_steps", "1", "--output_dir", str(tmp_path / "model")]
    assert main(["pretrain", *flags, *more, "--tokenizer_type", "char"]) == 0
    said = capsys.readouterr().out
    size = text.stat().st_size
    (about,) = [int(line.split()[-1].replace(",", "")) for line in said.splitlines() if line.startswith("  bytes  ") and "about" in line]  # fmt: skip # noqa: E501
    assert about == pytest.approx(0.9 * size, rel=0.01)
    assert f"tokens seen     {4 * 2 * 64:>14,}" in said
    (share,) = [line.split()[-1] for line in said.splitlines() if "share of text" in line]
    characters = len(text.read_text(encoding="utf-8"))
    assert float(share.rstrip("%")) == pytest.approx(100 * 8 * 63 / (0.9 * characters), abs=0.1)
