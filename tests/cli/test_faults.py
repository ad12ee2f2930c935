"""Runs that are killed, stopped, starved of disk or given nonsense: what is left, and where it leads."""

import functools
import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from made_up import SHAPE, child, kill_before_mark, kill_in_save, kill_late, made_text, starve
from safetensors.torch import load_file

from hf_decoder import HfDecoderForCausalLM
from hf_decoder.training.checkpoints import MARK, check_content, checkpoints, is_complete, last_complete, step_of

STEPS, SAVE_STEPS = 40, 5

# One process imports torch, the others fork from it.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["hf_decoder.cli.main", "hf_decoder.cli.pretrain", "datasets"])


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """Starts `hf-decoder pretrain` in a process of its own; returns the process and the file it prints to."""
    base = tmp_path_factory.mktemp("faults")
    # documents of several lengths, so that rows hold several and a document may span rows
    text = base / "train.jsonl"
    rows = [json.dumps({"text": made_text(seed, 1 + seed % 23)}) for seed in range(150)]
    text.write_text("\n".join(rows), encoding="utf-8")
    flags = ["--train_file", str(text), "--vocab_size", "300", "--block_size", "64", "--config_overrides", SHAPE]
    flags += ["--max_steps", str(STEPS), "--per_device_train_batch_size", "4", "--save_steps", str(SAVE_STEPS)]
    flags += ["--eval_steps", "20", "--save_total_limit", "1", "--validation_split_percentage", "10"]

    def start(folder: Path, *more: str, fault=None, number: int = 0):
        log = base / f"{folder.name}.log"
        argv = ["pretrain", *flags, "--output_dir", str(folder), *more]
        process = PROCESSES.Process(target=child, args=(argv, str(base / "cache"), str(log), fault, number))
        process.start()
        return process, log

    def run(folder: Path, *more: str, **options) -> tuple[int, str]:
        process, log = start(folder, *more, **options)
        process.join(120)
        assert process.exitcode is not None
        return process.exitcode, log.read_text(encoding="utf-8")

    run.start = start
    return run


@pytest.fixture(scope="module")
def undisturbed(job, tmp_path_factory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    code, said = job(folder)
    assert code == 0, said
    return load_file(folder / "model.safetensors")


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def resumes_to(job, folder: Path, expected: dict[str, torch.Tensor]) -> None:
    code, said = job(folder, "--resume_from_checkpoint")
    assert code == 0, said
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    (only,) = checkpoints(folder)  # nothing half-written is left, and the limit holds
    assert only.name == f"checkpoint-{STEPS}" and is_complete(only)


@pytest.mark.process
def test_killed_at_a_random_moment(job, undisturbed, tmp_path):
    folder = tmp_path / "killed"
    process, _ = job.start(folder)
    wait_for(lambda: (folder / f"checkpoint-{SAVE_STEPS}").exists())
    wait = random.Random().uniform(0, 0.6)
    time.sleep(wait)
    process.kill()
    process.join()
    print(f"killed {wait:.3f} s after the first checkpoint began")
    if last_complete(folder) is None:  # killed inside the first save
        code, said = job(folder, "--resume_from_checkpoint")
        assert code == 2 and "not whole" in said
        return
    resumes_to(job, folder, undisturbed)


def ended_or_saved(process: multiprocessing.Process, folder: Path, step: int) -> bool:
    return not process.is_alive() or any(step_of(path) >= step for path in checkpoints(folder))


@pytest.mark.soak
def test_killed_twenty_times(job, tmp_path, figures):
    """One run with a checkpoint every fifth step, killed twenty times, each time resumed where it was."""
    steps, kills = "400", 20
    whole = tmp_path / "whole"
    assert job(whole, "--max_steps", steps)[0] == 0
    expected = load_file(whole / "model.safetensors")
    choose = random.Random(int(time.time()))
    folder, moments, halves = tmp_path / "killed-often", [], 0
    for number in range(kills):
        last = last_complete(folder)
        # killed inside its first save a run has nothing to go on from
        flag = "--resume_from_checkpoint" if last else "--overwrite_output_dir"
        process, log = job.start(folder, "--max_steps", steps, flag)
        start = int(last.name.split("-")[1]) if last else 0
        if choose.random() < 0.8 or number == 0:  # the others die while they load, or in their first steps
            beyond = start + SAVE_STEPS * choose.randrange(1, 4)
            wait_for(functools.partial(ended_or_saved, process, folder, beyond))
            time.sleep(choose.uniform(0, 0.4))
        else:
            time.sleep(choose.uniform(0, 2))
        assert process.is_alive(), log.read_text(encoding="utf-8")  # else it was no kill
        process.kill()
        process.join()
        found = checkpoints(folder)
        halves += sum(not is_complete(path) for path in found)
        moments.append(step_of(found[-1]))
        last = last_complete(folder)
        assert last is not None or step_of(found[-1]) == SAVE_STEPS
        for path in found:
            if is_complete(path):
                check_content(path)
                load_file(path / "model.safetensors")
    code, said = job(folder, "--max_steps", steps, "--resume_from_checkpoint")
    assert code == 0, said
    weights = load_file(folder / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    figures(
        f"killed {kills} times in {steps} steps (last checkpoints {moments}; {halves} half-written): every checkpoint "
        "that is marked was readable, final weights bit-identical to the undisturbed run"
    )


# Of each checkpoint torch writes four files: arguments, optimizer, schedule and random state.
@pytest.mark.process
@pytest.mark.parametrize("fault, number", [(kill_in_save, 10), (kill_before_mark, 3)], ids=["in-save", "before-mark"])
def test_killed_while_saving(job, undisturbed, tmp_path, fault, number):
    folder = tmp_path / f"killed-{fault.__name__}"
    code, _ = job(folder, fault=fault, number=number)
    assert code == -signal.SIGKILL
    assert [(path.name, is_complete(path)) for path in checkpoints(folder)] == [
        ("checkpoint-10", True),
        ("checkpoint-15", False),
    ]
    resumes_to(job, folder, undisturbed)


@pytest.mark.process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_saves_first(job, undisturbed, tmp_path, number):
    folder = tmp_path / f"stopped-{number.name}"
    process, log = job.start(folder)
    wait_for(lambda: (folder / "checkpoint-5" / MARK).exists())
    os.kill(process.pid, number)
    process.join(60)
    said = log.read_text(encoding="utf-8")
    assert process.exitcode == 128 + number, said
    step = int(last_complete(folder).name.split("-")[1])
    assert 5 < step < STEPS
    assert f"stopped by {number.name} after step {step}" in said and "--resume_from_checkpoint" in said
    assert not (folder / "model.safetensors").exists()
    resumes_to(job, folder, undisturbed)


@pytest.mark.process
def test_killed_after_the_last_step_only_the_rest_is_done(job, undisturbed, tmp_path):
    folder = tmp_path / "killed-late"
    code, _ = job(folder, fault=kill_late)
    assert code == -signal.SIGKILL
    assert last_complete(folder).name == f"checkpoint-{STEPS}"
    resumes_to(job, folder, undisturbed)
    assert (folder / "README.md").is_file()


@pytest.mark.process
def test_full_disk_leaves_the_checkpoint_before(job, undisturbed, tmp_path):
    folder = tmp_path / "starved"
    code, said = job(folder, fault=starve, number=3)
    assert code == 2
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert "checkpoint-15 could not be written" in line and "checkpoint-10 is whole" in line
    assert "Traceback" not in said
    assert [(path.name, is_complete(path)) for path in checkpoints(folder)] == [("checkpoint-10", True)]
    resumes_to(job, folder, undisturbed)


def test_a_loss_that_is_no_number_stops_before_the_step(fails, run, tmp_path, monkeypatch):
    forward, calls = HfDecoderForCausalLM.forward, [0]

    @functools.wraps(forward)
    def poisoned(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if self.training:
            calls[0] += 1
            if calls[0] == 10:  # two batches a step: the second of step 5
                output.loss = output.loss * float("nan")
        return output

    monkeypatch.setattr(HfDecoderForCausalLM, "forward", poisoned)
    folder = tmp_path / "poisoned"
    line = fails("pretrain", *run.flags, "--gradient_accumulation_steps", "2", "--output_dir", str(folder))
    assert "loss is nan at step 5, batch 2 of 2" in line
    assert is_complete(folder / "checkpoint-3")
    assert not (folder / "checkpoint-6").exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--config_overrides", SHAPE.replace("num_hidden_layers=2", "num_hidden_layers=1")], ["num_hidden_layers"]),
        (["--block_size", "32"], ["block_size", "64", "32"]),
        (["--vocab_size", "290"], ["tokenizer", "290", "300"]),
        (["--per_device_train_batch_size", "2"], ["training", "rows_per_step was 4 and is 2 now"]),
        (["--gradient_accumulation_steps", "2"], ["training", "rows_per_step was 4 and is 8 now"]),
        (["--seed", "7"], ["training", "seed was 42 and is 7 now"]),
        (["--data_seed", "7"], ["training", "data_seed was None and is 7 now"]),
        (["--optim", "adamw_torch"], ["recipe", "optim was 'muon_adamw' and is 'adamw_torch' now"]),
        (["--learning_rate", "1e-3"], ["recipe", "learning_rate was 0.006 and is 0.001 now"]),
        (["--weight_decay", "0"], ["recipe", "weight_decay was 0.1 and is 0.0 now"]),
        (["--adam_beta2", "0.99"], ["recipe", "adam_beta2 was 0.95 and is 0.99 now"]),
        (["--max_grad_norm", "2"], ["recipe", "max_grad_norm was 1.0 and is 2.0 now"]),
        (["--warmup_steps", "2"], ["recipe", "warmup_steps was 0.05 and is 2.0 now"]),
        (["--lr_scheduler_type", "cosine"], ["recipe", "'warmup_stable_decay' and is 'cosine' now"]),
        (["--lr_scheduler_kwargs", '{"num_decay_steps": 2}'], ["recipe", "is {'num_decay_steps': 2} now"]),
        (["--streaming"], ["data"]),
    ],
)
def test_resuming_another_run_is_refused(fails, run, flags, words):
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    line = fails("pretrain", *run.flags, *flags, "--output_dir", str(run.folder), "--resume_from_checkpoint")
    assert all(word in line for word in words), line
    assert before == {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--max_steps", "5"], "--max_steps 5 ends the training after step 5"),
        (["--max_steps", "-1", "--num_train_epochs", "0.01"], "--num_train_epochs 0.01 ends the training after step"),
    ],
)
def test_resuming_behind_the_end_is_refused(fails, run, flags, words):
    line = fails("pretrain", *run.flags, *flags, "--output_dir", str(run.folder), "--resume_from_checkpoint")
    assert words in line and "checkpoint-6 has taken 6 steps" in line


def test_resuming_with_another_text_is_refused(fails, run, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text(run.train_file.read_text(encoding="utf-8").replace("cat", "dog", 1), encoding="utf-8")
    flags = [*run.flags, "--train_file", str(other), "--output_dir", str(run.folder), "--resume_from_checkpoint"]
    line = fails("pretrain", *flags)
    assert "the data differs" in line


def test_resuming_with_another_tokenizer_is_refused(fails, run, tmp_path):
    from hf_decoder.data.tokenization import train_tokenizer

    tokenizer = train_tokenizer([made_text(9, 300)], vocab_size=300)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    flags = ["--tokenizer_name", str(tmp_path / "tokenizer"), "--output_dir", str(run.folder)]
    assert "the tokenizer differs" in fails("pretrain", *run.flags, *flags, "--resume_from_checkpoint")
