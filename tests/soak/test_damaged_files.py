"""A checkpoint with a truncated file or a flipped bit gives an error of one line, or the exact weights."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.cli import load_model
from hf_decoder.training.checkpoints import MARK, CheckpointKeeper, checkpoint_to_resume

SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer) -> Path:
    """A checkpoint that Trainer wrote and the keeper marked."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = HfDecoderForCausalLM(HfDecoderConfig(vocab_size=len(tokenizer), **SHAPE))
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    args = TrainingArguments(folder, max_steps=2, save_steps=2, report_to="none", use_cpu=True, disable_tqdm=True)
    Trainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[CheckpointKeeper({})]).train()
    return folder / "checkpoint-2"


def damage(path: Path, choose: random.Random) -> str:
    """Truncates a file or flips one of its bits; returns what it did."""
    data = bytearray(path.read_bytes())
    place = choose.randrange(len(data))
    if choose.random() < 0.5:
        path.write_bytes(data[:place])
        return f"{path.name} cut to {place} bytes"
    bit = choose.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"{path.name}: bit {bit} of byte {place} turned over"


def try_damage(checkpoint: Path, folder: Path, cases: int, seed: int) -> tuple[int, int]:
    """Damages one file at a time; returns how many cases were refused, and how many were loaded and exact."""
    choose = random.Random(seed)
    exact = load_file(checkpoint / "model.safetensors")
    broken = Path(shutil.copytree(checkpoint, folder / checkpoint.name))
    files = sorted(path.name for path in checkpoint.iterdir() if path.stat().st_size)
    assert {"model.safetensors", "optimizer.pt", MARK} <= set(files)
    refused = loaded = 0
    for _ in range(cases):
        # half of the cases hit the weights, the others any file
        name = "model.safetensors" if choose.random() < 0.5 else choose.choice(files)
        said = damage(broken / name, choose)
        try:
            resumed = checkpoint_to_resume(str(broken), folder)
        except ValueError as error:
            assert "\n" not in str(error) and str(broken) in str(error), said
            refused += 1
        else:
            assert resumed == str(broken)
            weights = load_file(broken / "model.safetensors")
            assert weights.keys() == exact.keys(), said
            assert all(torch.equal(weights[name], exact[name]) for name in exact), said
            assert name == MARK, said  # of the files that are listed, none gets by
            loaded += 1
        shutil.copy2(checkpoint / name, broken / name)
    return refused, loaded


def test_damaged_checkpoints_are_refused(checkpoint, tmp_path):
    refused, loaded = try_damage(checkpoint, tmp_path, 200, seed=0)
    assert refused > 190 and refused + loaded == 200


@pytest.mark.soak
def test_a_thousand_damaged_checkpoints_are_refused(checkpoint, tmp_path, figures):
    refused, loaded = try_damage(checkpoint, tmp_path, 1000, seed=1)
    figures(f"damaged checkpoint files: {refused} of 1,000 refused in one line, {loaded} resumed with exact weights")
    assert refused + loaded == 1000


@pytest.mark.parametrize("copies", ["in a checkpoint", "in a plain folder"])
def test_what_a_command_loads(checkpoint, tmp_path, copies):
    """A plain folder has no digests: a cut is always noticed, a flipped bit in a number cannot be."""
    choose = random.Random(2)
    folder = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    whole = (folder / "model.safetensors").read_bytes()
    if copies == "in a plain folder":
        (folder / MARK).unlink()
    for _ in range(20):
        (folder / "model.safetensors").write_bytes(whole[: choose.randrange(len(whole))])
        with pytest.raises(ValueError, match=r"model\.safetensors|damaged|cannot be loaded") as caught:
            load_model(str(folder))
        assert "\n" not in str(caught.value)
    turned = bytearray(whole)
    turned[-1] ^= 1  # in the last weight
    (folder / "model.safetensors").write_bytes(turned)
    if copies == "in a checkpoint":
        with pytest.raises(ValueError, match="not what was written"):
            load_model(str(folder))
    else:
        load_model(str(folder))
