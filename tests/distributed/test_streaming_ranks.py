"""`hf-decoder pretrain --streaming` in two processes, each with its own part of the text."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from rank_work import pretrain
from ranks import resumes_in_several, run_ranks
from safetensors.torch import load_file

from hf_decoder.training.checkpoints import is_complete

pytestmark = pytest.mark.process

SHAPE = "hidden_size=32,num_attention_heads=2,num_key_value_heads=1,num_hidden_layers=2,max_position_embeddings=128"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@resumes_in_several
@pytest.mark.parametrize("files", [2, 3], ids=["a-table-each", "rows-in-turn"])
def test_two_processes_read_their_own_and_go_on_to_the_bit(tmp_path, files):
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(files):
        rows = [
            json.dumps({"text": f"the cat {i % 7} of {number} sees the dog {i % 5}\n" * (i % 9)}) for i in range(90)
        ]
        (folder / f"{number}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    flags = ["--train_file", str(folder), "--streaming", "--shuffle_buffer_size", "20", "--vocab_size", "300"]
    flags += [
        "--block_size",
        "64",
        "--config_overrides",
        SHAPE,
        "--max_steps",
        "8",
        "--save_steps",
        "4",
        "--bf16",
        "false",
    ]
    flags += ["--per_device_train_batch_size", "4", "--eval_strategy", "no", "--save_total_limit", "2"]
    flags += ["--validation_split_percentage", "10"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run_ranks(2, pretrain, [*flags, "--output_dir", str(whole)], folder=tmp_path) == [0, 0]
    results = json.loads((whole / "all_results.json").read_text(encoding="utf-8"))
    assert results["num_input_tokens_seen"] == 8 * 2 * 4 * 64
    checkpoint = whole / "checkpoint-4"
    assert is_complete(checkpoint)
    places = [json.loads((checkpoint / f"stream_{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    assert [place["0"]["row"] for place in places] == [16, 16]  # four steps of four rows
    shutil.copytree(checkpoint, resumed / "checkpoint-4")
    argv = [*flags, "--output_dir", str(resumed), "--resume_from_checkpoint"]
    assert run_ranks(2, pretrain, argv, folder=tmp_path) == [0, 0]
    expected, found = (load_file(Path(run) / "model.safetensors") for run in (whole, resumed))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
