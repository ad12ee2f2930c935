"""Two processes that train together do what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_up import SHAPE, made_text
from safetensors.torch import load_file

from hf_decoder.cli.main import main
from hf_decoder.training.checkpoints import is_complete

ROWS = 68
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_two_processes_equal_one_and_only_the_first_speaks(tmp_path):
    text = tmp_path / "train.txt"
    text.write_text(made_text(1, 760), encoding="utf-8")
    flags = ["--train_file", str(text), "--vocab_size", "300", "--block_size", "64", "--config_overrides", SHAPE]
    flags += ["--max_steps", "8", "--save_steps", "4", "--bf16", "false", "--optim", "sgd"]
    flags += ["--learning_rate", "0.1", "--eval_steps", "4"]
    # Every step takes all rows, whatever their order.
    alone, together = tmp_path / "alone", tmp_path / "together"
    assert main(["pretrain", *flags, "--per_device_train_batch_size", str(ROWS), "--output_dir", str(alone)]) == 0
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [*launch, str(ROOT / "scripts" / "pretrain.py"), *flags, "--ddp_backend", "gloo"]
    command += ["--per_device_train_batch_size", str(ROWS // 2), "--output_dir", str(together)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    for once in ("corpus: ", "training text", "bits per byte (xz", "These lines load it"):
        assert done.stdout.count(once) == 1, done.stdout
    assert f"blocks          {ROWS:>14,}" in done.stdout
    one, two = load_file(alone / "model.safetensors"), load_file(together / "model.safetensors")
    for name in one:
        # the same rows in each step, summed in another order
        torch.testing.assert_close(two[name], one[name], atol=2e-4, rtol=2e-3, msg=lambda m, n=name: f"{n}: {m}")
    last = together / "checkpoint-8"
    assert is_complete(last)
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in last.iterdir()}
