"""`hf-decoder finetune`: only the same run goes on, a gradient without a number ends it, no flag is passed over."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

from hf_decoder.cli.main import main
from hf_decoder.training.checkpoints import MARK, is_complete

pytest.importorskip("trl")
QUICK = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--report_to", "none", "--disable_tqdm", "true"]
QUICK += ["--logging_steps", "1", "--bf16", "false"]
TEXTS = [{"text": "the cat sees the dog. " * n} for n in (1, 3, 5, 20)]
LABELS = [{"text": f"the cat {n}", "label": ("neg", "pos")[n % 2]} for n in range(12)]
PAIRS = [{"prompt": f"the {a} sees", "completion": f" the {b}"} for a in ("cat", "dog") for b in ("cat", "dog")]
PREFERENCES = [{"prompt": "the cat", "chosen": " sees the dog", "rejected": " xx"} for _ in range(8)]
KTO = [{"prompt": "the cat", "completion": " sees the dog" * n, "label": n % 2 == 0} for n in range(1, 9)]
CHATS = [{"messages": [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sees"}]}] * 4
RL = ["--reward_funcs", "regex:e", "--num_generations", "4", "--max_completion_length", "4"]


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def argv_of(run, tmp_path, rows, *flags, task="sft"):
    train = write(tmp_path / "train.jsonl", rows)
    argv = ["finetune", str(run.folder), "--task", task, "--train_file", train, "--output_dir", str(tmp_path / "out")]
    return [*argv, *QUICK, *flags]


@pytest.mark.process
@pytest.mark.parametrize(
    "task, rows, flags, changes",
    [
        (
            "classification",
            LABELS,
            ["--class_names", "neg", "pos"],
            [
                (["--class_names", "pos", "neg"], "class_names was ['neg', 'pos'] and is ['pos', 'neg'] now"),
                (["--max_length", "3"], "max_length was 128 and is 3 now"),
            ],
        ),
        (
            "sft",
            TEXTS,
            ["--max_length", "64"],
            [
                (["--max_length", "16"], "max_length was 64 and is 16 now"),
                (["--packing", "false"], "packing was True and is False now"),
                (["--dropout", "0.1"], "dropout was 0.0 and is 0.1 now"),
            ],
        ),
        ("sft", CHATS, [], [(["--assistant_only_loss", "false"], "assistant_only_loss was True and is False now")]),
        ("sft", PAIRS, [], [(["--prompt_template", "{prompt}:"], "prompt_template was None and is '{prompt}:' now")]),
        ("preference", PREFERENCES, [], [(["--beta", "0.5"], "beta was 0.1 and is 0.5 now")]),
    ],
    ids=["classes", "text", "chats", "pairs", "preferences"],
)
def test_a_run_goes_on_with_the_same_rows_classes_and_loss(fails, run, tmp_path, task, rows, flags, changes):
    argv = argv_of(run, tmp_path, rows, "--save_steps", "1", *flags, task=task)
    assert main([*argv, "--max_steps", "1"]) == 0
    for change, words in changes:
        assert f"the task differs, {words}" in fails(*argv, *change, "--resume_from_checkpoint")
    if task == "sft" and rows is TEXTS:  # what is unset and what it comes to are the same
        assert main([*argv, "--packing", "true", "--max_steps", "1", "--resume_from_checkpoint"]) == 0
    mark = tmp_path / "out" / "checkpoint-1" / MARK  # a checkpoint of an older version tells nothing of it
    told = json.loads(mark.read_text())
    del told["run"]["task"]
    mark.write_text(json.dumps(told))
    assert main([*argv, *changes[-1][0], "--resume_from_checkpoint"]) == 0


STAGES = {
    "sft": (PAIRS, []),
    "classification": (LABELS, []),
    "preference": (PREFERENCES, []),
    "kto": (KTO, []),
    "reward": (PREFERENCES, []),
    "distillation": (PAIRS, ["--teacher", "MODEL"]),
    "grpo": (PAIRS * 2, RL),
    "rloo": (PAIRS * 2, RL),
}


@pytest.mark.process
@pytest.mark.parametrize("task", STAGES)
def test_a_gradient_without_a_number_stops_before_the_step(fails, run, tmp_path, monkeypatch, task):
    rows, flags = STAGES[task]
    training_step, steps = Trainer.training_step, []

    def poisoned(self, model, *args, **kwargs):
        loss = training_step(self, model, *args, **kwargs)
        steps.append(loss)
        if len(steps) == 3:
            for parameter in model.parameters():
                parameter.grad *= float("nan")
        return loss

    monkeypatch.setattr(Trainer, "training_step", poisoned)
    flags = [str(run.folder) if flag == "MODEL" else flag for flag in flags]
    argv = argv_of(run, tmp_path, rows, *flags, "--max_steps", "5", "--save_steps", "1", task=task)
    assert "the gradient is not finite at step 3" in fails(*argv, "--validation_split_percentage", "0")
    (last,) = (tmp_path / "out").glob("checkpoint-*")
    assert last.name == "checkpoint-2" and is_complete(last)
    assert all(torch.isfinite(weight).all() for weight in load_file(last / "model.safetensors").values())
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.process
@pytest.mark.parametrize("task", ["sft", "classification", "preference"])
def test_a_learning_rate_that_ruins_the_weights_ends_the_run(fails, run, tmp_path, task):
    argv = argv_of(run, tmp_path, STAGES[task][0], "--learning_rate", "1e30", "--max_steps", "4", task=task)
    assert "--learning_rate" in fails(*argv)
    assert not (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.process
def test_a_class_whose_only_row_is_held_out_is_a_class(run, tmp_path):
    rows = [{"text": f"the cat {n}", "label": f"class {n:02}"} for n in range(20)]
    assert main(argv_of(run, tmp_path, rows, task="classification")) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert sorted(config["label2id"]) == [row["label"] for row in rows]


def test_a_label_that_the_training_file_does_not_have_is_refused(fails, run, tmp_path):
    held = write(tmp_path / "held.jsonl", [*LABELS, {"text": "new", "label": "neutral"}])
    argv = argv_of(run, tmp_path, LABELS, "--validation_file", held, task="classification")
    assert "1 of 13 labels are outside the label map, first 'neutral'" in fails(*argv)


@pytest.mark.process
@pytest.mark.parametrize(
    "flags, steps",
    [([], [0, 1, 2, 2]), (["--eval_strategy", "no"], [0, 2]), (["--eval_steps", "2"], [0, 2, 2])],
    ids=["unset", "no", "eval_steps"],
)
def test_held_out_rows_are_measured_when_the_flags_say(run, tmp_path, flags, steps):
    held = write(tmp_path / "held.jsonl", PAIRS)  # an epoch is a step
    assert main(argv_of(run, tmp_path, PAIRS, "--validation_file", held, *flags)) == 0
    history = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in history if "eval_loss" in entry] == steps


@pytest.mark.parametrize(
    "rows, flags, reason",
    [
        (PAIRS, ["--lora_r", "8"], "--lora_r goes with an adapter; add --use_peft"),
        (PAIRS, ["--lora_target_modules", "q_proj"], "--lora_target_modules goes with an adapter"),
        (PAIRS, ["--lora_dropout", "0"], "--lora_dropout goes with an adapter"),
        (PAIRS, ["--use_rslora", "true"], "--use_rslora goes with an adapter"),
        (PAIRS, ["--lora_r", "8", "--adapter_name_or_path", "x"], "--lora_r shapes a new adapter"),
        (PAIRS, ["--model_revision", "v2"], "--model_revision"),
        (TEXTS, ["--prompt_template", "X {prompt}"], "--prompt_template is for prompts of text, and the rows hold t"),
        (CHATS, ["--prompt_template", "X {prompt}"], "--prompt_template is for prompts of text, and the rows hold m"),
        (LABELS, ["--task", "classification", "--prompt_template", "X {prompt}"], "the rows hold text and label"),
        (PAIRS, ["--validation_completion_file", "x"], "--validation_completion_file goes with --validation_file"),
        (PAIRS, ["--class_names", "a", "b"], "--class_names goes with --task classification"),
        (PAIRS, ["--alpha", "0.9"], "--alpha goes with --task distillation"),
        (PAIRS, ["--reward_timeout", "5"], "--reward_timeout goes with --task grpo and rloo"),
        (PAIRS, ["--learning_rate", "nan"], "--learning_rate nan must be at least 0, and finite"),
        (PAIRS, ["--learning_rate", "inf"], "--learning_rate inf must be at least 0, and finite"),
        (PAIRS, ["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps 0 must be at least 1"),
        (PAIRS, ["--per_device_train_batch_size", "0"], "--per_device_train_batch_size 0 must be at least 1"),
        (PAIRS, ["--per_device_eval_batch_size", "0"], "--per_device_eval_batch_size 0 must be at least 1"),
        (PAIRS, ["--max_steps", "0"], "--max_steps 0 trains nothing"),
        (PAIRS, ["--max_steps", "-1", "--num_train_epochs", "-1"], "--num_train_epochs -1 must be more than 0"),
        (PAIRS, ["--task", "grpo", "--reward_funcs", "regex:e", "--num_generations", "0"], "--num_generations 0"),
    ],
)  # fmt: skip
def test_a_flag_without_effect_or_sense_is_refused(fails, run, tmp_path, rows, flags, reason):
    assert reason in fails(*argv_of(run, tmp_path, rows, *flags))
    assert not (tmp_path / "out").exists()


def test_a_new_model_takes_no_flag_of_a_trained_one(fails, run, tmp_path):
    argv = argv_of(run, tmp_path, PAIRS, "--preset", "nano", "--tokenizer_name", str(run.folder))
    argv.remove(str(run.folder))
    assert "--dtype and --attn_implementation" in fails(*argv, "--dtype", "bfloat16")
