"""DeepSpeed's ZeRO-3 as `accelerate launch` starts it with our configuration, on CPUs: the losses of one process.

Needs the package deepspeed, which no extra of ours installs; its first run compiles a library, which takes minutes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hf_decoder.training.launch import configuration_file

pytestmark = pytest.mark.slow
pytest.importorskip("deepspeed", reason="the package deepspeed is not installed: pip install deepspeed")

HERE = Path(__file__).resolve().parent
SCRIPT = """
import json, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {root!r}]
from rank_work import new_model, rows
from transformers import Trainer, TrainingArguments

folder, batch, accumulation, resume = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
args = TrainingArguments(
    folder / "run", max_steps=6, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
    logging_steps=1, learning_rate=1e-3, lr_scheduler_type="constant", optim="adamw_torch", report_to="none",
    use_cpu=True, save_steps=3, disable_tqdm=True, dataloader_pin_memory=False,
)
model = new_model(hidden_size=256, intermediate_size=600)  # DeepSpeed leaves matrices below 100,000 whole
trainer = Trainer(model, args, train_dataset=rows())
trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-3") if resume == "resume" else None)
trainer.save_model(folder / "saved")
found = {{key: [log[key] for log in trainer.state.log_history if key in log] for key in ("loss", "grad_norm")}}
engine = trainer.model_wrapped
stage = engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else 0
found |= {{"stage": stage, "held": sum(parameter.numel() for parameter in model.parameters())}}
if trainer.is_world_process_zero():
    (folder / f"found{{resume}}.json").write_text(json.dumps(found))
"""


def train(folder: Path, launcher: list[str], batch: int, accumulation: int, resume: str = "") -> dict:
    folder.mkdir(exist_ok=True)
    script = folder / "train.py"
    script.write_text(SCRIPT.format(tests=str(HERE), root=str(HERE.parents[1])), encoding="utf-8")
    command = [sys.executable, *launcher, str(script), str(folder), str(batch), str(accumulation), resume]
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return json.loads((folder / f"found{resume}.json").read_text())


def close(one: list[float], other: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(one), torch.tensor(other), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_losses_are_those_of_one_process(accumulation, tmp_path):
    """Two processes that share the shards, fp32; clipping included, as the gradients are above its norm of 1."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(configuration_file("deepspeed_zero3"))]
    launcher += ["--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0"]
    alone = train(tmp_path / "alone", [], 8 // accumulation, accumulation)
    shards = train(tmp_path / "shards", launcher, 4 // accumulation, accumulation)
    assert shards["stage"] == 3 and shards["held"] < alone["held"] and max(alone["grad_norm"]) > 1
    close(shards["loss"], alone["loss"])
    close(shards["grad_norm"], alone["grad_norm"])

    saved = [load_file(tmp_path / name / "saved" / "model.safetensors") for name in ("alone", "shards")]
    assert saved[0].keys() == saved[1].keys()
    for name, tensor in saved[0].items():
        # Adam divides a gradient by its size, so that one which is only rounding moves by it: here by less than a
        # hundredth of the way, 6e-3, that six steps can take
        torch.testing.assert_close(saved[1][name], tensor, rtol=0.0, atol=6e-5)
    AutoModelForCausalLM.from_pretrained(tmp_path / "shards" / "saved")

    again = train(tmp_path / "shards", launcher, 4 // accumulation, accumulation, "resume")
    close(again["loss"], shards["loss"])
