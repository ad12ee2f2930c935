"""`hf-decoder finetune --task`: each stage moves its measure the right way, is resumable, and counts what it skips."""

import json
import multiprocessing
import shutil
import signal
import sys
from itertools import pairwise

import pytest
import torch
from huggingface_hub import ModelCard
from made_up import SHAPE, child, kill_in_save
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from hf_decoder.cli.arguments import parse_verb
from hf_decoder.cli.main import main
from hf_decoder.data.tokenization import train_tokenizer

pytestmark = pytest.mark.process

pytest.importorskip("trl")
QUICK = ["--report_to", "none", "--disable_tqdm", "true", "--bf16", "false", "--logging_steps", "1"]
PROMPTS = [f"the {a} {verb}" for a in ("cat", "dog", "bird") for verb in ("sees", "hears", "likes")]
ANSWERS = {True: " the dog", False: " xx"}
KTO = [{"prompt": p, "completion": ANSWERS[n % 2 == 0], "label": n % 2 == 0} for p in PROMPTS for n in range(4)]
PAIRS = [{"prompt": p, "chosen": ANSWERS[True], "rejected": ANSWERS[False]} for p in PROMPTS]
ASKED = [{"prompt": p, "letter": "e"} for p in PROMPTS]
TEXTS = [{"prompt": p, "completion": ANSWERS[True]} for p in PROMPTS]
REWARDS = """
import time

def letters(completions, letter, **columns):
    return [text.count(one) / max(len(text), 1) for text, one in zip(completions, letter)]

def raises(completions, **columns):
    return [1 / 0 for _ in completions]

def nan(completions, **columns):
    return [float("nan")] * len(completions)

def short(completions, **columns):
    return [1.0]

def text(completions, **columns):
    return ["good"] * len(completions)

def endless(completions, **columns):
    time.sleep(1000)

def leaves(completions, **columns):
    raise SystemExit(0)

def late(completions, trainer_state, **columns):
    return [1 / (3 - trainer_state.global_step) for _ in completions]
"""
RL = ["--per_device_train_batch_size", "16", "--max_completion_length", "8", "--num_generations", "8"]
# task -> rows, and flags with which they are learned in seconds
STAGES = {
    "kto": (KTO, ["--per_device_train_batch_size", "8", "--learning_rate", "1e-2"]),
    "reward": (PAIRS, ["--learning_rate", "1e-2"]),
    "grpo": (ASKED, [*RL, "--reward_funcs", "made_up_rewards:letters", "--learning_rate", "1e-2"]),
    "rloo": (ASKED, [*RL, "--reward_funcs", "made_up_rewards:letters", "--learning_rate", "1e-2"]),
}


@pytest.fixture(autouse=True)
def rewards(tmp_path, monkeypatch):
    (tmp_path / "made_up_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("made_up_rewards", None)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def argv_of(task, folder, tmp_path, rows, *flags, out="out"):
    train = write(tmp_path / "train.jsonl", rows)
    held = write(tmp_path / "held.jsonl", STAGES.get(task, (TEXTS,))[0][:4])
    argv = ["finetune", str(folder), "--task", task, "--train_file", train, "--validation_file", held, *QUICK, *flags]
    return [*argv, "--output_dir", str(tmp_path / out)]


def results_of(out):
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return json.loads((out / "all_results.json").read_text()), history


@pytest.mark.parametrize(
    "task, measure, bad, reason",
    [
        ("kto", "eval_rewards/margins", {"prompt": "the", "completion": "x", "label": "maybe"}, "neither true nor"),
        ("reward", "eval_margin", {"prompt": "the", "chosen": "x", "rejected": "x"}, "chosen and rejected are the"),
        ("grpo", "eval_reward", {"prompt": "the cat"}, "no 'letter', which a reward reads"),
        ("rloo", "eval_reward", {"prompt": "the cat " * 200, "letter": "e"}, "prompt has more than the 120 tokens"),
    ],
)  # fmt: skip
def test_a_stage_moves_its_measure_and_counts_what_it_skips(run, tmp_path, capsys, task, measure, bad, reason):
    rows, flags = STAGES[task]
    assert main(argv_of(task, run.folder, tmp_path, [*rows, bad], *flags, "--max_steps", "20")) == 0
    out, printed = tmp_path / "out", capsys.readouterr().out
    results, history = results_of(out)
    before = next(entry for entry in history if measure in entry)
    assert before["step"] == 0 and results[measure] > before[measure] + max(before[measure], 0.03)
    assert f"1 of {len(rows) + 1} rows skipped: " in printed and reason in printed
    assert results["skipped_rows"] == 1 and results["train_rows"] == len(rows)
    (change,) = (line for line in printed.splitlines() if line.startswith("the stage changed"))
    assert change.startswith("the stage changed, on the held-out rows: ") and " -> " in change
    card = ModelCard.load(out / "README.md")
    assert "{{" not in card.content and " -> " in card.text and str(tmp_path) not in card.content
    assert (out / "loss_curve.png").stat().st_size > 1000
    tokenizer = AutoTokenizer.from_pretrained(out)
    if task == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(out).eval()
        good, poor = (model(**tokenizer(PROMPTS[0] + ANSWERS[one] + "<|endoftext|>", return_tensors="pt")).logits for one in (True, False))  # fmt: skip # noqa: E501
        assert good.shape == (1, 1) and good > poor
    else:
        model, start = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (out, run.folder))
        text = (out / "samples.md").read_text()
        ids = tokenizer(PROMPTS[0], return_tensors="pt")
        for one, heading in ((start, "Before"), (model, "After")):
            answer = tokenizer.decode(one.generate(**ids, do_sample=False, max_new_tokens=64)[0, ids.input_ids.shape[1] :], skip_special_tokens=True)  # fmt: skip # noqa: E501
            assert f"{heading}:\n\n```text\n{answer}\n```" in text
    if task in ("grpo", "rloo"):
        assert results["eval_kl"] > 0 and before["eval_kl"] == pytest.approx(0, abs=1e-5)
        assert any(entry.get("sampling_tokens_per_second", 0) > 0 for entry in history)


@pytest.mark.parametrize("task", ["kto", "reward", "rloo", "distillation"])
def test_a_stage_resumes_as_if_uninterrupted(run, tmp_path, task):
    rows, flags = STAGES.get(task, (TEXTS, ["--teacher", str(run.folder), "--learning_rate", "1e-2"]))
    flags = [*flags, "--max_steps", "4", "--save_steps", "2", "--save_total_limit", "5"]
    assert main(argv_of(task, run.folder, tmp_path, rows, *flags)) == 0
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    argv = argv_of(task, run.folder, tmp_path, rows, *flags, out="resumed")
    assert main([*argv, "--resume_from_checkpoint"]) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    changed = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("out", "resumed")]
    assert changed[0]["eval_loss"] == pytest.approx(changed[1]["eval_loss"], rel=0.5, abs=0.1)


def test_reinforcement_goes_on_where_it_was_killed(run, tmp_path):
    """A kill in the middle of writing the second checkpoint: the first one is gone on from."""
    flags = [*RL, "--reward_funcs", "regex:e", "--learning_rate", "1e-2", "--max_steps", "3", "--save_steps", "1"]
    assert main(argv_of("grpo", run.folder, tmp_path, ASKED, *flags)) == 0
    argv = argv_of("grpo", run.folder, tmp_path, ASKED, *flags, out="killed")
    context = multiprocessing.get_context("spawn")
    process = context.Process(
        target=child, args=(argv, str(tmp_path / "cache"), str(tmp_path / "log"), kill_in_save, 6)
    )
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log").read_text()
    assert main([*argv, "--resume_from_checkpoint"]) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "killed"))
    for name in one:
        torch.testing.assert_close(one[name], other[name])


@pytest.mark.parametrize(
    "reward, said",
    [
        ("made_up_rewards:raises", "reward 'made_up_rewards:raises' failed: ZeroDivisionError: division by zero"),
        ("made_up_rewards:leaves", "reward 'made_up_rewards:leaves' failed: SystemExit: 0"),
        ("made_up_rewards:nan", "reward 'made_up_rewards:nan' returned nan"),
        ("made_up_rewards:short", "reward 'made_up_rewards:short' returned 1 values for "),
        ("made_up_rewards:text", "reward 'made_up_rewards:text' returned 'good', which is no number"),
        ("made_up_rewards:endless", "reward 'made_up_rewards:endless' did not end within 0.5 s"),
        ("made_up_rewards:missing", "made_up_rewards has no function missing"),
        ("no_such_module:f", "no_such_module cannot be imported: ModuleNotFoundError"),
        ("python_parse", "reward 'python_parse' is unknown"),
        ("regex:(", "is no regular expression"),
        ("length:few", "needs a number of tokens: length:64"),
        ("exact_match", "no 'reference', which a reward reads"),
    ],
)
def test_a_reward_that_fails_is_named_in_one_line(fails, run, tmp_path, reward, said):
    flags = [*RL, "--max_steps", "2", "--reward_timeout", "0.5"]
    assert said in fails(*argv_of("grpo", run.folder, tmp_path, ASKED, *flags, "--reward_funcs", reward))


def test_what_was_saved_before_a_reward_failed_is_kept(fails, run, tmp_path):
    rows, flags = STAGES["grpo"]
    flags = [*RL, "--max_steps", "5", "--save_steps", "1", "--reward_funcs", "made_up_rewards:late"]
    flags += ["--eval_strategy", "no", "--validation_split_percentage", "0"]
    argv = argv_of("grpo", run.folder, tmp_path, rows, *flags)
    argv = [word for word in argv if word not in ("--validation_file", str(tmp_path / "held.jsonl"))]
    assert "made_up_rewards:late' failed: ZeroDivisionError" in fails(*argv)
    assert (tmp_path / "out" / "checkpoint-3" / "complete.json").is_file()
    rewards = tmp_path / "made_up_rewards.py"
    rewards.write_text(REWARDS.replace("3 - trainer", "30 - trainer"))
    sys.modules.pop("made_up_rewards")
    assert main([*argv, "--resume_from_checkpoint"]) == 0
    assert results_of(tmp_path / "out")[0]["train_steps"] == 5


def test_several_rewards_are_weighed(run, tmp_path):
    reward = tmp_path / "scores"
    assert main(argv_of("reward", run.folder, tmp_path, PAIRS, "--max_steps", "2", out="scores")) == 0
    names = ["length:8", "regex:e", f"reward_model:{reward}", "made_up_rewards:letters"]
    flags = [*RL, "--max_steps", "1", "--reward_funcs", *names, "--reward_weights", "1", "2", "0.5", "4"]
    assert main(argv_of("grpo", run.folder, tmp_path, ASKED, *flags)) == 0
    results, _ = results_of(tmp_path / "out")
    means = [results[f"eval_rewards/{name}/mean"] for name in (*names[:2], "scores", names[3])]
    expected = sum(weight * mean for weight, mean in zip((1, 2, 0.5, 4), means, strict=True))
    assert results["eval_reward"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.process
def test_a_student_learns_more_from_a_teacher_than_without(run, tmp_path, capsys):
    """At equal steps on the same few lines; the teacher has seen more. The loss is that of the text in both."""
    lines = [{"text": line} for line in run.train_file.read_text().splitlines()]
    held = [{"text": line} for line in run.validation_file.read_text().splitlines()]
    many, few = write(tmp_path / "many.jsonl", lines[:600]), write(tmp_path / "few.jsonl", lines[:12])
    files = ["--validation_file", write(tmp_path / "held.jsonl", held), *QUICK, "--learning_rate", "1e-2"]
    flags, teacher = [*files, "--max_steps", "120", "--max_length", "64"], tmp_path / "teacher"
    assert main(["finetune", str(run.folder), "--train_file", many, *flags, "--output_dir", str(teacher)]) == 0
    shape = ["--preset", "nano", "--tokenizer_name", str(teacher), "--config_overrides", f"{SHAPE},hidden_size=16"]
    losses = {}
    for task, more in (("sft", []), ("distillation", ["--teacher", str(teacher)])):
        argv = ["finetune", "--task", task, *shape, "--train_file", few, *flags, *more]
        assert main([*argv, "--output_dir", str(tmp_path / task)]) == 0
        losses[task] = results_of(tmp_path / task)[0]["eval_loss"]
    assert losses["distillation"] < losses["sft"] - 0.05
    assert "the stage changed, on the held-out rows: loss 5" in capsys.readouterr().out


def test_a_teacher_of_other_tokens_is_refused(fails, run, tmp_path):
    other = tmp_path / "other"
    AutoModelForCausalLM.from_pretrained(run.folder).save_pretrained(other)
    train_tokenizer(["other words, other tokens"] * 4, vocab_size=290).save_pretrained(other)
    line = fails(*argv_of("distillation", run.folder, tmp_path, TEXTS, "--teacher", str(other)))
    assert f"--teacher {other} has another tokenizer than the student" in line
    assert "--task distillation and --teacher go together" in fails(
        *argv_of("distillation", run.folder, tmp_path, TEXTS)
    )


def test_nothing_stale_is_sampled_after_a_step(run, tmp_path):
    """After each optimizer step the next completions are those of the weights on disk, freshly loaded."""
    from hf_decoder.cli import finetune

    rows, flags = STAGES["grpo"]
    argv = argv_of("grpo", run.folder, tmp_path, rows, *flags, "--max_steps", "3", "--beta", "0")
    seen = []

    class Compare(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            model.save_pretrained(tmp_path / "now")
            fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "now").eval()
            ids = torch.arange(5, 45).view(4, 10)
            draw = {"do_sample": False, "max_new_tokens": 12, "return_dict_in_generate": True, "output_logits": True}
            for cache in (None, "static"):
                model.eval()
                found, expected = (one.generate(ids, cache_implementation=cache, **draw) for one in (model, fresh))
                model.train()
                assert torch.equal(found.sequences, expected.sequences)
                torch.testing.assert_close(torch.stack(found.logits), torch.stack(expected.logits))
            seen.append(torch.stack(expected.logits))

    task_args, model_args, args = parse_verb("finetune", argv[1:])
    trainer = (job := finetune._job(task_args, model_args, args)).trainer()
    finetune._settle(job, None)
    trainer.add_callback(Compare())
    trainer.train()
    assert len(seen) == 3 and all((one - other).abs().max() > 1e-3 for one, other in pairwise(seen))


def test_an_adapter_is_a_reward_model_and_is_trained_by_it(run, tmp_path):
    """The lines of its card load it; chats are sampled from a model with an adapter, too."""
    reward = tmp_path / "scores"
    peft = ["--use_peft", "true", "--lora_r", "4", "--max_steps", "1"]
    assert main(argv_of("reward", run.folder, tmp_path, PAIRS, *peft, out="scores")) == 0
    lines = ModelCard.load(reward / "README.md").text.split("```python\n")[1].split("```")[0]
    found = {}
    exec(lines.replace('"scores"', repr(str(reward))), found)
    assert found["model"].config.num_labels == 1
    chats = [{"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": "it"}]} for p in PROMPTS]
    held = write(tmp_path / "chats.jsonl", chats)
    flags = [*RL, *peft, "--reward_funcs", f"reward_model:{reward}", "exact_match", "--validation_file", held]
    assert main(argv_of("grpo", run.folder, tmp_path, chats, *flags)) == 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "user: the cat sees" in (tmp_path / "out" / "samples.md").read_text()
