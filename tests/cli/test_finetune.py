"""`hf-decoder finetune`: the tokens that carry loss are counted by hand, and what comes out loads and works."""

import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from made_up import SHAPE
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.cli import finetune, parse_arguments
from hf_decoder.cli.main import main
from hf_decoder.interop.adapters import merge
from hf_decoder.training import callbacks
from hf_decoder.tuning.finetuning import add_dropout
from hf_decoder.tuning.rows import load_task

pytest.importorskip("trl")
QUICK = ["--max_steps", "2", "--per_device_train_batch_size", "4", "--report_to", "none", "--disable_tqdm", "true"]
QUICK += ["--logging_steps", "1", "--bf16", "false"]
PAIRS = [
    {"prompt": f"the {a} sees", "completion": f" the {b}"} for a in ("cat", "dog", "bird") for b in ("cat", "dog")
]
CHATS = [
    {
        "messages": [
            {"role": "system", "content": "be kind"},
            {"role": "user", "content": "the cat" * n},
            {"role": "assistant", "content": "sees the dog"},
            {"role": "user", "content": "the bird"},
            {"role": "assistant", "content": "hears" * n},
        ]
    }
    for n in (1, 2, 3, 4)
]
TEXTS = [{"text": "the cat sees the dog. " * n} for n in (1, 3, 5, 20)]
LABELS = [
    {"text": f"{word} {n}", "label": label} for n in range(6) for word, label in (("good", "pos"), ("bad", "neg"))
]
PREFERENCES = [{"prompt": "the cat", "chosen": " sees the dog", "rejected": " xx"} for _ in range(8)]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def build(folder, tmp_path, rows, *flags, task="sft", max_length=128):
    """The trainer that the command would run."""
    train = write(tmp_path / "train.jsonl", rows)
    argv = ["--task", task, "--model_name_or_path", str(folder), "--train_file", train, *QUICK, *flags]
    argv += ["--validation_split_percentage", "0", "--output_dir", str(tmp_path / "out")]
    types = (finetune.TaskArguments, finetune._trl().ModelConfig, finetune.training_arguments(task))
    task_args, model_args, args = parse_arguments("finetune", types, argv, "")
    args.max_length = max_length
    data = load_task(task, train, None, {})
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return finetune._job_of(task_args, model_args, args, data, tokenizer, config=None).trainer()


def learned(trainer) -> list[list[int]]:
    """The tokens with a label, row by row of the batches."""
    rows = []
    for batch in trainer.get_train_dataloader():
        rows += [row[row != -100].tolist() for row in batch["labels"]]
    return rows


def run_task(folder, tmp_path, rows, *flags, task="sft"):
    out = tmp_path / "out"
    train = write(tmp_path / "train.jsonl", rows)
    assert (
        main(
            ["finetune", str(folder), "--task", task, "--train_file", train, "--output_dir", str(out), *QUICK, *flags]
        )
        == 0
    )
    return out


def test_loss_is_on_the_completion_and_its_end(run, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    trainer = build(run.folder, tmp_path, PAIRS)
    expected = [tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id] for row in PAIRS]
    assert sorted(learned(trainer)) == sorted(expected)


def test_loss_is_on_the_assistant_and_the_end_of_its_turns(run, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    trainer = build(run.folder, tmp_path, CHATS)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    expected = []
    for row in CHATS:
        said = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
        expected.append([i for text in said for i in [*tokenizer(text)["input_ids"], end]])
    assert sorted(learned(trainer)) == sorted(expected)


def test_packed_text_keeps_every_token(run, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    trainer = build(run.folder, tmp_path, TEXTS)
    assert trainer.args.packing
    tokens = sum(len(tokenizer(row["text"])["input_ids"]) + 1 for row in TEXTS)
    assert sum(len(row["input_ids"]) for row in trainer.train_dataset) == tokens


def folder_of(kind: str, run, tmp_path):
    """The trained model of ours, or a small random Llama with its tokenizer."""
    if kind == "ours":
        return run.folder
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.mark.parametrize("kind", ["ours", "llama"])
@pytest.mark.parametrize("flags", [[], ["--packing", "true"]], ids=["padded", "packed"])
def test_the_trainers_loss_is_the_mean_over_completion_tokens(run, tmp_path, kind, flags):
    folder = folder_of(kind, run, tmp_path)
    trainer = build(folder, tmp_path, PAIRS, "--per_device_train_batch_size", "6", *flags)
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    loss = float(trainer.compute_loss(trainer.model, dict(batch)).detach())
    accumulated = float(
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(100)).detach()
    )
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    nats, count = 0.0, 0
    for row in PAIRS:
        prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        ids = prompt + answer + [tokenizer.eos_token_id]
        with torch.no_grad():
            log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        nats -= sum(float(log_probs[i - 1, ids[i]]) for i in range(len(prompt), len(ids)))
        count += len(ids) - len(prompt)
    assert loss == pytest.approx(nats / count, rel=1e-4)
    assert accumulated == pytest.approx(nats / 100, rel=1e-4)
    if kind == "llama":
        assert trainer._metrics["train"]["entropy"] and trainer._metrics["train"]["mean_token_accuracy"]
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset)
    assert trainer._metrics["train"]["num_tokens"] == [2 * tokens]  # the batch twice


@pytest.mark.process
def test_full_fine_tuning_learns_its_rows(run, tmp_path, capsys):
    rows = [*PAIRS, {"prompt": "", "completion": "x"}, {"prompt": "x", "completion": " "}]
    flags = [
        "--validation_file",
        write(tmp_path / "held.jsonl", PAIRS[:2]),
        "--max_steps",
        "150",
        "--learning_rate",
        "1e-2",
    ]
    out = run_task(run.folder, tmp_path, rows, *flags)
    printed = capsys.readouterr().out
    assert "1 of 8 rows skipped: empty prompt, first row 7; 1 of 8 rows skipped: empty completion" in printed
    assert "2 of 2 held-out rows also stand in the training rows" in printed
    results = json.loads((out / "all_results.json").read_text())
    parts = [json.loads((out / f"{name}_results.json").read_text()) for name in ("train", "eval")]
    assert {**parts[0], **parts[1]} == results
    assert {"eval_loss", "perplexity"} <= parts[1].keys() and "train_loss" in parts[0]
    assert results["trainable_share"] == 1
    assert results["skipped_rows"] == results["overlapping_rows"] == 2
    assert results["perplexity"] == pytest.approx(torch.tensor(results["eval_loss"]).exp().item(), rel=1e-5)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = tokenizer("the cat sees", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**ids, max_new_tokens=10, do_sample=False)[0])
    assert answer in ("the cat sees the cat<|endoftext|>", "the cat sees the dog<|endoftext|>")
    card = ModelCard.load(out / "README.md")
    assert {r.metric_type for r in card.data.eval_results} == {"loss", "perplexity"}
    assert "2 skipped" in card.text and "{{" not in card.content
    assert str(tmp_path) not in card.content
    assert (out / "loss_curve.png").stat().st_size > 1000


@pytest.mark.process
@pytest.mark.parametrize("kind", [[], ["--use_dora", "true"]], ids=["lora", "dora"])
def test_merged_is_the_base_with_its_adapter(run, tmp_path, kind):
    flags = ["--use_peft", "true", "--lora_r", "4", "--lora_alpha", "8", "--learning_rate", "1e-2", *kind]
    adapter = run_task(run.folder, tmp_path, PAIRS, *flags)
    assert not (adapter / "model.safetensors").exists()
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4
    merged = tmp_path / "merged"
    assert main(["finetune", str(run.folder), "--train_file", str(tmp_path / "train.jsonl"), "--output_dir", str(merged), *QUICK, *flags, "--merge"]) == 0  # fmt: skip # noqa: E501
    ids = torch.arange(5, 60)[None]
    base = AutoModelForCausalLM.from_pretrained(run.folder).eval()
    with torch.no_grad():
        plain = base(ids).logits
        unmerged = PeftModel.from_pretrained(base, adapter).eval()(ids).logits
        found = AutoModelForCausalLM.from_pretrained(merged).eval()(ids).logits
    torch.testing.assert_close(found, unmerged, rtol=1e-4, atol=1e-4)
    assert (found - plain).abs().max() > 1e-2
    results = json.loads((adapter / "all_results.json").read_text())
    assert 0 < results["trainable_share"] < 0.5
    # AdamW: a gradient and two moments in fp32 for each, and a step count for each tensor
    held = results["optimizer_and_gradient_bytes"]
    assert held == 3 * 4 * results["trainable_parameters"] + 4 * len(load_file(adapter / "adapter_model.safetensors"))


@pytest.mark.process
def test_a_new_model_of_a_preset_learns_its_rows(run, tmp_path):
    flags = ["--preset", "nano", "--tokenizer_name", str(run.folder), "--config_overrides", SHAPE, "--dropout", "0.01"]
    flags += ["--optim", "muon_adamw", "--lr_scheduler_type", "warmup_stable_decay", "--max_steps", "60"]
    train, out = write(tmp_path / "train.jsonl", PAIRS), tmp_path / "out"
    argv = ["finetune", "--train_file", train, "--output_dir", str(out), *QUICK, *flags, "--learning_rate", "1e-2"]
    assert main([*argv, "--warmup_steps", "5"]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) and model.config.hidden_size == 32
    assert model.config.eos_token_id == tokenizer.eos_token_id
    ids = tokenizer("the dog sees", return_tensors="pt")
    answer = tokenizer.decode(model.generate(**ids, max_new_tokens=10, do_sample=False)[0])
    assert answer in ("the dog sees the cat<|endoftext|>", "the dog sees the dog<|endoftext|>")
    assert "a new nano model" in ModelCard.load(out / "README.md").text
    rates = [log["learning_rate"] for log in json.loads((out / "trainer_state.json").read_text())["log_history"][:-1]]
    assert max(rates) == rates[30] == 1e-2 and rates[-1] < 1e-3


@pytest.mark.process
def test_time_limit_ends_the_training_with_the_rate_brought_down(run, tmp_path, capsys):
    out = run_task(run.folder, tmp_path, PAIRS, "--max_steps", "100000", "--time_limit", "8s")
    state = json.loads((out / "trainer_state.json").read_text())
    assert 0 < state["global_step"] < 100_000
    rates = [log["learning_rate"] for log in state["log_history"] if "learning_rate" in log]
    assert rates[-1] < 0.1 * max(rates)
    results = json.loads((out / "all_results.json").read_text())
    assert results["train_steps"] == state["global_step"] and results["planned_steps"] == 100_000
    printed = capsys.readouterr().out
    share = f"{results['train_steps']:,} of 100,000, {results['train_steps'] / 1e5:.1%} of the schedule"
    assert f"the time limit ended the training after step {share}" in printed
    assert "the learning rate falls from step" in printed
    assert f"| optimizer steps | {share} |" in (out / "README.md").read_text()


@pytest.mark.parametrize("family", [HfDecoderForCausalLM, LlamaForCausalLM])
def test_dropout_is_that_of_what_each_part_writes(family):
    config = LlamaConfig if family is LlamaForCausalLM else HfDecoderConfig
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    model = family(config(**shape, num_attention_heads=2, num_key_value_heads=2)).eval()
    written = {}
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj", "embed_tokens")):
            module.register_forward_hook(lambda _, inputs, output, name=name: written.setdefault(name, output))
    ids = torch.arange(32).view(2, 16)
    plain = model(ids).logits
    assert len(written) == 5
    before = dict(written)
    add_dropout(model, 0.25)
    torch.testing.assert_close(model(ids).logits, plain, rtol=0, atol=0)
    for name, module in model.named_modules():
        if name in written:
            module.register_forward_hook(lambda _, inputs, output, name=name: before.__setitem__(name, output))
    model.train()
    assert (model(ids, use_cache=False).logits - plain).abs().max() > 1e-3
    for name, output in before.items():
        share = (output == 0).double().mean()
        assert 0.15 < share < 0.35, name
    embedded = written["model.embed_tokens"]
    kept = before["model.embed_tokens"] != 0
    torch.testing.assert_close(before["model.embed_tokens"][kept], embedded[kept] / 0.75)
    assert "dropout" not in str(model.state_dict().keys())


def test_dropout_of_a_family_with_other_names_is_refused():
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="does not know the layers of GPT2LMHeadModel"):
        add_dropout(model, 0.1)


@pytest.mark.process
def test_resumed_is_uninterrupted(run, tmp_path):
    flags = ["--use_peft", "true", "--max_steps", "4", "--save_steps", "2", "--save_total_limit", "5"]
    whole = run_task(run.folder, tmp_path, PAIRS, *flags)
    resumed = tmp_path / "resumed"
    shutil.copytree(whole / "checkpoint-2", resumed / "checkpoint-2")
    argv = ["finetune", str(run.folder), "--train_file", str(tmp_path / "train.jsonl"), *QUICK, *flags]
    assert main([*argv, "--output_dir", str(resumed), "--resume_from_checkpoint"]) == 0
    one, other = load_file(whole / "adapter_model.safetensors"), load_file(resumed / "adapter_model.safetensors")
    assert all(torch.equal(one[name], other[name]) for name in one)


def copy_of_run(whole, folder, *steps):
    for step in steps:
        shutil.copytree(whole / f"checkpoint-{step}", folder / f"checkpoint-{step}")
    return folder


@pytest.mark.process
def test_only_a_whole_checkpoint_is_resumed(fails, run, tmp_path, capsys):
    """Half of one is passed over for the one before; one without the optimizer's state is no start to go on from."""
    flags = ["--use_peft", "true", "--max_steps", "4", "--save_steps", "2", "--save_total_limit", "5"]
    whole = run_task(run.folder, tmp_path, PAIRS, *flags)
    train = str(tmp_path / "train.jsonl")
    argv = ["finetune", str(run.folder), "--train_file", train, *QUICK, *flags, "--resume_from_checkpoint"]
    damages = {
        "empty": lambda folder: (shutil.rmtree(folder), folder.mkdir()),
        "cut": lambda folder: (folder / "optimizer.pt").write_bytes((folder / "optimizer.pt").read_bytes()[:100]),
        "without": lambda folder: (folder / "optimizer.pt").unlink(),
        "no-schedule": lambda folder: (folder / "scheduler.pt").unlink(),
    }
    expected = load_file(whole / "adapter_model.safetensors")
    for name, damage in damages.items():
        folder = copy_of_run(whole, tmp_path / name, 2, 4)
        damage(folder / "checkpoint-4")
        assert "checkpoint-4" in fails(*argv, str(folder / "checkpoint-4"), "--output_dir", str(folder))
        assert main([*argv, "--output_dir", str(folder)]) == 0
        found = load_file(folder / "adapter_model.safetensors")
        assert all(torch.equal(found[key], expected[key]) for key in expected)
        damage(folder / "checkpoint-4")
        shutil.rmtree(folder / "checkpoint-2")
        assert "checkpoint-4" in fails(*argv, "--output_dir", str(folder))


def test_a_run_is_resumed_with_its_rows_and_its_method(fails, run, tmp_path):
    flags = ["--use_peft", "true", "--lora_r", "4", "--max_steps", "2", "--save_steps", "1", "--save_total_limit", "5"]
    whole = run_task(run.folder, tmp_path, PAIRS, *flags)
    folder, other = copy_of_run(whole, tmp_path / "resumed", 1), write(tmp_path / "other.jsonl", PAIRS[:5])
    argv = ["finetune", str(run.folder), *QUICK, *flags, "--output_dir", str(folder), "--resume_from_checkpoint"]
    assert "the data differs, rows was 6 and is 5 now" in fails(*argv, "--train_file", other)
    line = fails(*argv, "--train_file", str(tmp_path / "train.jsonl"), "--lora_r", "8")
    assert "'LoRA of rank 4, alpha 32' and is 'LoRA of rank 8, alpha 32' now" in line
    # the optimizer's own settings are in its state, and would win
    line = fails(*argv, "--train_file", str(tmp_path / "train.jsonl"), "--weight_decay", "0.3")
    assert "the recipe differs, weight_decay was 0.0 and is 0.3 now" in line


def test_a_checkpoint_of_weights_alone_is_not_resumed(fails, run, tmp_path):
    flags = ["--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1", "--save_only_model", "true"]
    out = run_task(run.folder, tmp_path, PAIRS, *flags)
    argv = ["finetune", str(run.folder), "--train_file", str(tmp_path / "train.jsonl"), *QUICK, *flags]
    line = fails(*argv, "--output_dir", str(out), "--max_steps", "2", "--resume_from_checkpoint")
    assert "checkpoint-1 lacks the state of the optimizer and that of the schedule" in line


@pytest.mark.parametrize("kind", ["ours", "llama"])
@pytest.mark.parametrize("flags", [[], ["--packing", "true"]], ids=["padded", "packed"])
def test_the_measured_loss_is_the_mean_over_tokens_whatever_shares_a_batch(run, tmp_path, kind, flags):
    folder = folder_of(kind, run, tmp_path)
    rows = [{"prompt": "the cat", "completion": " sees the dog" * n} for n in (1, 9, 1, 1, 36)]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    nats, count = 0.0, 0
    for row in rows:
        prompt, answer = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"]
        ids = prompt + answer + [tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with torch.no_grad():
            nats += float(model(torch.tensor([ids]), labels=labels).loss) * (len(ids) - len(prompt))
        count += len(ids) - len(prompt)
    for size in ("1", "2", "5"):
        trainer = build(folder, tmp_path, rows, "--per_device_eval_batch_size", size, *flags)
        trainer.eval_dataset = trainer.train_dataset  # prepared; as an argument it would be prepared again
        assert len(trainer.train_dataset) == (2 if flags else 5)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(nats / count, rel=1e-5)
        assert trainer.state.log_history[-1]["eval_loss"] == pytest.approx(nats / count, rel=1e-5)


@pytest.mark.process
@pytest.mark.parametrize("flags", [[], ["--packing", "true"]], ids=["padded", "packed"])
def test_rows_whose_prompt_fills_the_block_are_counted(fails, run, tmp_path, capsys, flags):
    long = [{"prompt": "the cat sees " * 100, "completion": "the dog"}] * 2
    flags = [*flags, "--validation_file", write(tmp_path / "held.jsonl", [*PAIRS, *long[1:]])]
    out = run_task(run.folder, tmp_path, [*PAIRS, *long], *flags)
    assert "train.jsonl: 2 of 8 rows skipped: the prompt fills the 128 tokens" in capsys.readouterr().out
    results = json.loads((out / "all_results.json").read_text())
    assert (results["train_rows"], results["eval_rows"], results["skipped_rows"]) == (6, 6, 3)
    train = write(tmp_path / "train.jsonl", long)
    argv = ["finetune", str(run.folder), "--train_file", train, "--output_dir", str(tmp_path / "new"), *QUICK, *flags]
    tokens = len(AutoTokenizer.from_pretrained(run.folder)(long[0]["prompt"])["input_ids"])
    line = fails(*argv)
    assert f"train.jsonl has no row with an answer to learn: its shortest prompt has {tokens:,} tokens" in line
    assert "cuts a row off after 128" in line


def test_chats_whose_question_fills_the_block_are_counted(fails, run, tmp_path):
    turns = [{"role": "user", "content": "the cat " * 200}, {"role": "assistant", "content": "the dog"}]
    train = write(tmp_path / "train.jsonl", [{"messages": turns}] * 4)
    argv = ["finetune", str(run.folder), "--train_file", train, "--output_dir", str(tmp_path / "out"), *QUICK]
    assert "has no row with an answer to learn" in fails(*argv, "--validation_split_percentage", "0")


@pytest.mark.process
def test_classification_learns_and_is_measured_by_eval(run, tmp_path, capsys):
    flags = [
        "--max_steps",
        "30",
        "--learning_rate",
        "1e-2",
        "--validation_file",
        write(tmp_path / "held.jsonl", LABELS),
    ]
    out = run_task(run.folder, tmp_path, LABELS, *flags, task="classification")
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_accuracy"] == results["eval_f1"] == 1
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.id2label == {0: "neg", 1: "pos"}
    capsys.readouterr()
    argv = ["eval", str(out), "--metrics", "accuracy", "f1", "--test_file", str(tmp_path / "held.jsonl")]
    assert main([*argv, "--output_dir", str(tmp_path / "eval"), "--batch_size", "5"]) == 0
    assert "accuracy         1.0000" in capsys.readouterr().out


@pytest.mark.process
def test_a_classifier_is_shown_class_by_class_and_held_against_the_most_frequent(run, tmp_path, capsys):
    """What `finetune` and `eval` write of one classifier on the same rows is the same."""
    from sklearn.metrics import classification_report, confusion_matrix

    rows = [{"text": f"the film {n}", "label": ["bad", "fine", "good"][n % 3]} for n in range(30)]
    held = write(tmp_path / "held.jsonl", rows)
    out = run_task(run.folder, tmp_path, rows, "--validation_file", held, task="classification")
    assert "no better than the most frequent class" in capsys.readouterr().out.strip().splitlines()[-1]
    results = json.loads((out / "all_results.json").read_text())
    assert (
        main(["eval", str(out), "--metrics", "accuracy", "--eval_file", held, "--output_dir", str(tmp_path / "e")])
        == 0
    )
    assert "no better than the most frequent class" in capsys.readouterr().out
    measured = json.loads((tmp_path / "e/eval_results.json").read_text())
    predictions = [json.loads(line) for line in (tmp_path / "e/predictions.jsonl").read_text().splitlines()]
    labels, guesses = ([row[key] for row in predictions] for key in ("label", "prediction"))
    expected = classification_report(labels, guesses, output_dict=True, zero_division=0)
    for found in (results, measured):
        assert found["confusion_matrix"] == confusion_matrix(labels, guesses, labels=found["labels"]).tolist()
        assert set(found["classification_report"]) == set(expected)
        for name, measures in expected.items():
            assert found["classification_report"][name] == pytest.approx(measures), name
    assert results["eval_f1"] == pytest.approx(expected["macro avg"]["f1-score"])
    for path in (out / "confusion_matrix.png", tmp_path / "e/confusion_matrix.png"):
        assert path.stat().st_size > 1000


@pytest.mark.process
def test_the_defaults_of_classification_learn_from_a_small_base(run, tmp_path, capsys):
    """No rate, batch size or number of epochs is given."""
    words = {"pos": ["good", "fine", "great"], "neg": ["bad", "poor", "dull"]}
    rows = [
        {"text": f"a {word} film about the {thing} {n}", "label": label}
        for n in range(30)
        for label, options in words.items()
        for word, thing in zip(options, ("cat", "dog", "bird"), strict=True)
    ]
    train, out = write(tmp_path / "train.jsonl", rows), tmp_path / "out"
    argv = ["finetune", str(run.folder), "--task", "classification", "--train_file", train, "--output_dir", str(out)]
    assert main([*argv, "--report_to", "none", "--validation_split_percentage", "20"]) == 0
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_accuracy"] > 0.9
    assert "no better" not in capsys.readouterr().out
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    assert len([entry for entry in log if "loss" in entry]) >= 15


@pytest.mark.process
@pytest.mark.parametrize("kind", ["ours", "llama"])
def test_rows_of_a_classifier_weigh_the_same_however_they_are_batched(run, tmp_path, kind):
    folder, losses, weights = folder_of(kind, run, tmp_path), [], []
    for size, steps in (("8", "1"), ("2", "4")):
        flags = ["--per_device_train_batch_size", size, "--gradient_accumulation_steps", steps, "--max_steps", "1"]
        flags += [
            "--learning_rate",
            "0.1",
            "--optim",
            "sgd",
            "--max_grad_norm",
            "0",
            "--lr_scheduler_type",
            "constant",
        ]
        flags += ["--warmup_steps", "0", "--output_dir", str(tmp_path / size)]
        torch.manual_seed(0)
        trainer = build(folder, tmp_path, LABELS[:8], *flags, task="classification")
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_classification_with_an_adapter(run, tmp_path):
    out = run_task(run.folder, tmp_path, LABELS, "--use_peft", "true", "--merge", task="classification")
    assert AutoModelForSequenceClassification.from_pretrained(out).config.id2label == {0: "neg", 1: "pos"}


@pytest.mark.process
@pytest.mark.parametrize("kind", [[], ["--use_dora", "true"], ["--load_in_4bit", "true"]], ids=["lora", "dora", "qlora"])  # fmt: skip # noqa: E501
def test_an_adapter_of_a_classifier_is_measured_as_one(fails, run, tmp_path, kind):
    """Its labels are beside it, in every checkpoint too; the card's lines give the classes their names."""
    held = write(tmp_path / "held.jsonl", LABELS)
    flags = ["--use_peft", "true", "--learning_rate", "1e-2", "--max_steps", "60", "--validation_file", held, *kind]
    out = run_task(run.folder, tmp_path, LABELS, *flags, task="classification")
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_accuracy"] == 1
    (checkpoint,) = out.glob("checkpoint-*")
    for names in ([str(out)], [str(run.folder), "--adapter_name_or_path", str(checkpoint)]):
        argv = ["eval", *names, "--metrics", "accuracy", "f1", "--test_file", held]
        assert main([*argv, "--output_dir", str(tmp_path / "eval")]) == 0
        assert json.loads((tmp_path / "eval" / "eval_results.json").read_text())["accuracy"] == 1
    assert "is a sequence classifier, which has only accuracy and f1" in fails(
        "eval", str(out), "--validation_file", held
    )
    lines = ModelCard.load(out / "README.md").text.split("```python\n")[1].split("```")[0]
    found = {}
    exec(lines.replace('"out"', repr(str(out))), found)
    assert found["model"].config.id2label == {0: "neg", 1: "pos"}
    assert found["model"].config.label2id == {"neg": 0, "pos": 1}
    ids = found["tokenizer"]([row["text"] for row in LABELS], return_tensors="pt", padding=True)
    with torch.no_grad():
        classes = found["model"].eval()(**ids).logits.argmax(-1).tolist()
    assert [found["model"].config.id2label[index] for index in classes] == [row["label"] for row in LABELS]
    (out / "id2label.json").unlink()
    assert "id2label.json" in fails("eval", str(out), "--metrics", "accuracy", "--test_file", held)


@pytest.mark.process
def test_a_continued_adapter_keeps_its_classes_in_their_order(run, tmp_path):
    flags = ["--use_peft", "true", "--class_names", "pos", "neg"]
    first = run_task(run.folder, tmp_path, LABELS, *flags, task="classification")
    argv = ["finetune", str(run.folder), "--task", "classification", "--adapter_name_or_path", str(first), *QUICK]
    train, more = str(tmp_path / "train.jsonl"), tmp_path / "more"
    assert main([*argv, "--train_file", train, "--output_dir", str(more)]) == 0
    assert json.loads((more / "id2label.json").read_text()) == {"0": "pos", "1": "neg"}


def test_a_classifier_of_a_four_bit_base_is_merged(run, tmp_path):
    flags = ["--use_peft", "true", "--load_in_4bit", "true", "--merge"]
    out = run_task(run.folder, tmp_path, LABELS, *flags, task="classification")
    merged = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert merged.config.id2label == {0: "neg", 1: "pos"} and merged.config.label2id == {"neg": 0, "pos": 1}
    base = AutoModelForSequenceClassification.from_pretrained(run.folder, num_labels=2)
    ids = torch.arange(5, 60)[None]
    with torch.no_grad():
        unmerged = PeftModel.from_pretrained(base, out / "adapter").eval()(ids).logits
        torch.testing.assert_close(merged(ids).logits, unmerged, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["full", "adapter"])
def test_a_classifier_writes_no_text(fails, run, tmp_path, kind):
    flags = ["--use_peft", "true"] if kind == "adapter" else []
    out = run_task(run.folder, tmp_path, LABELS, *flags, task="classification")
    assert "is a sequence classifier, which writes no text" in fails("generate", str(out), "the cat")
    train = write(tmp_path / "pairs.jsonl", PAIRS)
    names = [str(run.folder), "--adapter_name_or_path", str(out)] if kind == "adapter" else [str(out)]
    line = fails("finetune", *names, "--train_file", train, "--output_dir", str(tmp_path / "new"), *QUICK)
    assert "sequence classifier" in line
    assert not (tmp_path / "new").exists()


@pytest.mark.process
@pytest.mark.parametrize("peft", [[], ["--use_peft", "true"]], ids=["full", "lora"])
def test_preferences_move_the_margin(run, tmp_path, peft):
    flags = ["--validation_file", write(tmp_path / "held.jsonl", PREFERENCES[:4]), "--max_steps", "12"]
    out = run_task(run.folder, tmp_path, PREFERENCES, *flags, "--learning_rate", "1e-2", *peft, task="preference")
    results = json.loads((out / "all_results.json").read_text())
    assert results["eval_rewards/margins"] > 0.1
    assert results["eval_rewards/accuracies"] == 1
    # the margin by hand: beta times the change of the log ratio
    model = AutoModelForCausalLM.from_pretrained(out) if not peft else PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.folder), out)  # fmt: skip # noqa: E501
    tokenizer = AutoTokenizer.from_pretrained(run.folder)

    def ratio(model) -> float:
        nats = []
        for answer in (" sees the dog", " xx"):
            prompt = tokenizer("the cat")["input_ids"]
            ids = tokenizer("the cat" + answer)["input_ids"] + [tokenizer.eos_token_id]
            with torch.no_grad():
                log_probs = torch.log_softmax(model.eval()(torch.tensor([ids])).logits[0].double(), -1)
            nats.append(sum(float(log_probs[i - 1, ids[i]]) for i in range(len(prompt), len(ids))))
        return nats[0] - nats[1]

    moved = ratio(model) - ratio(AutoModelForCausalLM.from_pretrained(run.folder))
    assert results["eval_rewards/margins"] == pytest.approx(0.1 * moved, rel=1e-2)


def test_chat_model_stops_at_the_end_of_its_turn(run, tmp_path):
    out = run_task(run.folder, tmp_path, CHATS)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ends = {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")}
    assert set(model.generation_config.eos_token_id) == ends


def chat_with(model, tokenizer, question):
    """The answer, and how likely the end of the turn is behind it; None where the answer runs on."""
    turns = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    if int(tokens[-1]) != end:
        return tokenizer.decode(tokens), None
    with torch.no_grad():
        logits = model(torch.cat([inputs["input_ids"][0], tokens])[None]).logits[0, -2]
    return tokenizer.decode(tokens[:-1]), float(logits.softmax(-1)[end])


@pytest.mark.process
@pytest.mark.parametrize("kind", ["lora", "dora", "untied"])
def test_an_adapter_learns_to_end_its_turns(run, tmp_path, kind):
    """The base saw no chat; the adapter reloads with plain PEFT, merges, and is gone on with."""
    base, model = tmp_path / "base", AutoModelForCausalLM.from_pretrained(run.folder)
    with torch.no_grad():  # as long pretraining leaves them: words stand apart, tokens that it never saw are alike
        model.model.embed_tokens.weight *= 10
        model.model.embed_tokens.weight[2:4] = model.model.embed_tokens.weight[:2].mean(0)
    if kind == "untied":
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach().clone())
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(run.folder).save_pretrained(base)
    rows = [
        {"messages": [{"role": "user", "content": f"the {a}"}, {"role": "assistant", "content": "sees"}]}
        for a in ("cat", "dog", "bird")
    ]
    flags = ["--use_dora", "true"] if kind == "dora" else []
    flags = ["--use_peft", "true", "--max_steps", "100", "--learning_rate", "1e-2", "--lora_dropout", "0", *flags]
    flags += ["--lora_target_modules", "all-linear"]
    out = run_task(base, tmp_path, rows * 4, *flags)
    config = json.loads((out / "adapter_config.json").read_text())
    assert {tuple(ids) for ids in config["trainable_token_indices"].values()} == {(2, 3)}
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoPeftModelForCausalLM.from_pretrained(out).eval()
    answer, ends = chat_with(model, tokenizer, "the dog")
    assert answer == "sees" and ends is not None and ends > 0.8
    ids = tokenizer("the bird<|im_end|>\n<|im_start|>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        adapted = model(ids).logits
        if kind != "dora":  # whose magnitudes transformers' own loader drops, of Llama too
            torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(out).eval()(ids).logits, adapted)
        merged = merge(model).eval()
        torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    assert merged.config.tie_word_embeddings == (kind != "untied")
    argv = ["finetune", str(base), "--adapter_name_or_path", str(out), "--train_file", str(tmp_path / "train.jsonl")]
    assert main([*argv, "--output_dir", str(tmp_path / "more"), *QUICK]) == 0


@pytest.mark.process
def test_adapter_of_another_base_is_refused(fails, run, tmp_path):
    adapter = run_task(run.folder, tmp_path, PAIRS, "--use_peft", "true", "--max_steps", "1")
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    other = tmp_path / "other"
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(other)
    tokenizer.save_pretrained(other)
    argv = [
        "finetune",
        str(other),
        "--train_file",
        str(tmp_path / "train.jsonl"),
        "--output_dir",
        str(tmp_path / "new"),
    ]
    line = fails(*argv, "--adapter_name_or_path", str(adapter))
    assert "another base" in line and "16" in line and "32" in line
    assert str(run.folder) in line


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--preset", "nano"], "needs a tokenizer"),
        (["--preset", "nano", "--tokenizer_name", "TOKENIZER", "--use_peft", "true"], "needs a trained model"),
        (["--preset", "nano", "--tokenizer_name", "TOKENIZER", "--config_overrides", "hidden=3"], "hidden"),
        (["--preset", "nanno", "--tokenizer_name", "TOKENIZER"], "nanno"),
        (["--preset", "nano", "--tokenizer_name", "TOKENIZER", "--config_overrides", "vocab_size=50"], "vocab_size"),
        ([], "name the model"),
    ],
)
def test_what_a_user_can_get_wrong_about_a_new_model(fails, run, tmp_path, flags, reason):
    train, out = write(tmp_path / "train.jsonl", PAIRS), tmp_path / "out"
    flags = [str(run.folder) if flag == "TOKENIZER" else flag for flag in flags]
    assert reason in fails("finetune", "--train_file", train, "--output_dir", str(out), *QUICK, *flags)
    assert not out.exists()


@pytest.mark.parametrize(
    "rows, flags, reason",
    [
        ([{"a": 1}], [], "columns a"),
        ([{"prompt": "", "completion": ""}], [], "no usable row"),
        ([{"messages": [{"role": "user", "content": "x"}]}], [], "no assistant turn"),
        (PAIRS, ["--load_in_4bit", "true"], "--use_peft"),
        (PAIRS, ["--merge"], "--use_peft"),
        (PAIRS, ["--task", "translate"], "translate"),
        (PAIRS, ["--prompt_template", "x"], "--prompt_template"),
        (PAIRS, ["--resume_from_checkpoint"], "no checkpoint"),
        (PAIRS, ["--validation_file", "nowhere"], "nowhere"),
        (LABELS, ["--task", "classification", "--class_names", "pos", "other"], "6 of 12 labels are outside"),
        (LABELS[::2], ["--task", "classification"], "two classes"),
        (PAIRS, ["--completion_column", "answr"], "answr"),
        (PAIRS, ["--preset", "nano"], "leave out"),
        (PAIRS, ["--tokenizer_name", "x"], "--preset"),
        (PAIRS, ["--dropout", "1"], "--dropout 1.0"),
        (PAIRS, ["--max_length", "0"], "--max_length 0 must be at least 1"),
        ([*PAIRS, {"prompt": CHATS[0]["messages"][:2], "completion": CHATS[0]["messages"][2:3]}], [], "mixes text and messages: row 1"),  # noqa: E501
        ([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": 5}]}], [], "train.jsonl has no usable row: 1 of 1 rows skipped: messages has a turn whose content is not text, first row 1"),  # noqa: E501
        (PAIRS, ["--time_limit", "soon"], "soon"),
        (PREFERENCES, ["--task", "preference", "--optim", "muon_adamw"], "muon_adamw"),
    ],
)  # fmt: skip
def test_what_a_user_can_get_wrong(fails, run, tmp_path, rows, flags, reason):
    train = write(tmp_path / "train.jsonl", rows)
    out = tmp_path / "out"
    assert reason in fails(
        "finetune", str(run.folder), "--train_file", train, "--output_dir", str(out), *QUICK, *flags
    )
    assert not out.exists()


def test_text_is_not_measured_on_messages(fails, run, tmp_path):
    train, held = write(tmp_path / "train.jsonl", PAIRS), tmp_path / "held.jsonl"
    turns = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    write(held, [dict(zip(("prompt", "completion"), turns, strict=True))])
    argv = ["finetune", str(run.folder), "--train_file", train, "--validation_file", str(held), *QUICK]
    line = fails(*argv, "--output_dir", str(tmp_path / "out"))
    assert f"of {train} and {held}, one holds text and the other messages" in line


@pytest.mark.process
def test_four_bit_base_trains_and_merges_into_the_full_weights(run, tmp_path):
    flags = ["--use_peft", "true", "--load_in_4bit", "true", "--learning_rate", "1e-2", "--merge"]
    out = run_task(run.folder, tmp_path, PAIRS, *flags)
    ids = torch.arange(5, 60)[None]
    base = AutoModelForCausalLM.from_pretrained(run.folder).eval()
    with torch.no_grad():
        unmerged = PeftModel.from_pretrained(base, out / "adapter").eval()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(out).eval()(ids).logits
    torch.testing.assert_close(merged, unmerged, rtol=1e-4, atol=1e-4)
    assert "4-bit base, merged" in ModelCard.load(out / "README.md").text


@pytest.mark.parametrize("kind", ["ours", "qwen3"])
def test_an_evaluation_leaves_the_gradients_on_a_four_bit_base_as_they_are(run, tmp_path, kind):
    folder = run.folder
    if kind == "qwen3":
        folder = tmp_path / "qwen3"
        assert main(["convert", str(run.folder), str(folder), "--to", "qwen3"]) == 0
    flags = ["--use_peft", "true", "--load_in_4bit", "true"]
    trainer = build(folder, tmp_path, PAIRS, *flags)
    (batch, *_) = trainer.get_train_dataloader()
    trained = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():  # or the gradients of half of them are zero
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)

    def gradients():
        torch.manual_seed(0)
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch).backward()
        found = {name: p.grad.clone() for name, p in trained.items()}
        trainer.model.zero_grad()
        return found

    before = gradients()
    with torch.no_grad():
        trainer.model.eval()(input_ids=batch["input_ids"])
    after = gradients()
    for name, gradient in before.items():
        assert torch.equal(after[name], gradient), name


@pytest.mark.process
def test_memory_is_trimmed_on_the_way(run, tmp_path, monkeypatch):
    """Every step has tensors of other sizes, and without it the process grows."""
    trimmed = []
    monkeypatch.setattr(callbacks.TrimMemory, "on_step_end", lambda *args, **kwargs: trimmed.append(1))
    run_task(run.folder, tmp_path, PAIRS)
    assert trimmed == [1, 1]


CALL = {"id": "1", "type": "function", "function": {"name": "warm", "arguments": '{"in": "Rome"}'}}
TOOLS = [{"type": "function", "function": {"name": "warm"}}]
TOOL_CHAT = [
    {"role": "user", "content": "Rome?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "21"},
    {"role": "assistant", "content": "21 degrees"},
]
# A template that holds neither tools nor their calls.
PLAIN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content or '' }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def without_tools(model_copy):
    """A model whose chat template holds no tools."""
    tokenizer = AutoTokenizer.from_pretrained(model_copy)
    tokenizer.chat_template = PLAIN_TEMPLATE
    tokenizer.save_pretrained(model_copy)
    return model_copy


def said(folder, trainer) -> list[str]:
    """The texts with a loss, row by row."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = trainer.train_dataset
    return [
        tokenizer.decode([i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100])
        for row in rows
    ]


def test_tools_and_their_calls_are_trained(run, tmp_path):
    other = {**CALL, "function": {"name": "clock", "arguments": {"zone": "CET"}}}
    rows = [{"messages": TOOL_CHAT, "tools": TOOLS}] * 2
    rows += [{"messages": [TOOL_CHAT[0], {**TOOL_CHAT[1], "tool_calls": [other]}], "tools": json.dumps(TOOLS)}]
    trainer = build(run.folder, tmp_path, rows, max_length=1024)
    texts = said(run.folder, trainer)
    call = '<tool_call>\n{"name": "warm", "arguments": {"in": "Rome"}}\n</tool_call><|im_end|>'
    assert texts[0] == f"{call}21 degrees<|im_end|>"
    assert texts[2] == '<tool_call>\n{"name": "clock", "arguments": {"zone": "CET"}}\n</tool_call><|im_end|>'
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    for row in trainer.train_dataset:
        assert '"name": "warm"' in tokenizer.decode(row["input_ids"]).partition("<|im_start|>user\nRome?")[0]


def test_tools_that_fill_the_block_count_as_its_prompt(fails, run, tmp_path):
    train = write(tmp_path / "train.jsonl", [{"messages": TOOL_CHAT, "tools": TOOLS * 5}])
    line = fails("finetune", str(run.folder), "--train_file", train, "--output_dir", str(tmp_path / "out"), *QUICK)
    found = re.search(r"shortest prompt has ([\d,]+) tokens, and .* cuts a row off after 128", line)
    assert int(found[1].replace(",", "")) >= 128


@pytest.mark.process
def test_tools_that_the_template_does_not_hold_are_counted(fails, without_tools, tmp_path, capsys):
    plain = [{"messages": [USER_TURN, {"role": "assistant", "content": "the dog", "mood": "mild"}]}] * 6
    rows = [*plain, {"messages": TOOL_CHAT}, {"messages": plain[0]["messages"], "tools": TOOLS}]
    out = run_task(without_tools, tmp_path, rows, "--validation_split_percentage", "0")
    printed = capsys.readouterr().out
    assert "1 of 8 rows skipped: the chat template does not hold tool calls" in printed
    assert "1 of 8 rows skipped: the chat template does not hold tools" in printed
    assert "does not read: mood (6 conversations)" in printed
    results = json.loads((out / "all_results.json").read_text())
    assert (results["train_rows"], results["skipped_rows"]) == (6, 2)
    argv = ["--train_file", write(tmp_path / "tools.jsonl", rows[6:]), "--output_dir", str(tmp_path / "new"), *QUICK]
    assert "tools.jsonl has no usable row: " in fails("finetune", str(without_tools), *argv)
    # a template of a stranger may refuse what it does not know
    tokenizer = AutoTokenizer.from_pretrained(without_tools)
    tokenizer.chat_template = "{{ raise_exception('only two turns') }}"
    tokenizer.save_pretrained(without_tools)
    assert "the chat template cannot be rendered: only two turns" in fails("finetune", str(without_tools), *argv)


USER_TURN = {"role": "user", "content": "the cat"}


@pytest.mark.parametrize("key", ["weight", "train", "loss"])
def test_a_turn_of_weight_zero_has_no_loss(run, tmp_path, key):
    chat = CHATS[1]["messages"]
    rows = [{"messages": [*chat[:2], {**chat[2], key: 0}, *chat[3:]]}, CHATS[1]]
    trainer = build(run.folder, tmp_path, rows)
    assert said(run.folder, trainer) == ["hearshears<|im_end|>", "sees the dog<|im_end|>hearshears<|im_end|>"]
    plain = build(run.folder, tmp_path, CHATS[1:2])
    assert plain.train_dataset[0]["input_ids"] == trainer.train_dataset[0]["input_ids"]
    assert plain.train_dataset[0]["labels"] == trainer.train_dataset[1]["labels"]
    trainer = build(run.folder, tmp_path, rows, "--assistant_only_loss", "false")
    assert "sees the dog" not in said(run.folder, trainer)[0] and "the bird" in said(run.folder, trainer)[0]


def test_system_and_history_beside_an_instruction_are_turns(run, tmp_path):
    row = {"instruction": "the bird", "output": "hears", "system": "be kind", "history": [["the cat", "sees the dog"]]}
    trainer = build(run.folder, tmp_path, [row])
    assert said(run.folder, trainer) == ["sees the dog<|im_end|>hears<|im_end|>"]
    assert trainer.train_dataset[0]["input_ids"] == build(run.folder, tmp_path, [{"messages": CHATS[0]["messages"]}]).train_dataset[0]["input_ids"]  # fmt: skip # noqa: E501


@pytest.mark.process
def test_what_is_trained_on_is_told_apart_and_what_is_not_is_named(run, tmp_path, capsys):
    rows = [{"instruction": "the cat", "input": "", "output": "sees it", "id": n} for n in range(8)]
    trainer = build(run.folder, tmp_path, rows)
    text = AutoTokenizer.from_pretrained(run.folder).decode(trainer.train_dataset[0]["input_ids"])
    assert text == "the cat\n\nsees it<|endoftext|>"
    assert said(run.folder, trainer)[0] == "sees it<|endoftext|>"
    rows += [{"instruction": "the cat", "output": "sees the dog. " * 60}]
    run_task(run.folder, tmp_path, rows, "--validation_split_percentage", "0")
    printed = capsys.readouterr().out
    assert "columns that are not used: id (8 rows)" in printed
    assert "a blank line stands between prompt and answer" in printed
    assert "1 of 9 rows fill the 128 tokens" in printed
    as_they_are = build(run.folder, tmp_path, rows, "--prompt_template", "{prompt}: ")
    text = AutoTokenizer.from_pretrained(run.folder).decode(as_they_are.train_dataset[0]["input_ids"])
    assert text == "the cat: sees it<|endoftext|>"


@pytest.mark.process
def test_preferences_with_whole_chats_are_learned(run, tmp_path, capsys):
    question = "the cat " * 150
    rows = [
        {
            "prompt": prompt,
            **{
                name: [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
                for name, answer in (("chosen", "sees the dog"), ("rejected", "xx"))
            },
        }
        for prompt in (*["the cat"] * 6, question)
    ]
    out = run_task(run.folder, tmp_path, rows, "--validation_split_percentage", "0", task="preference")
    assert "1 of 7 rows skipped: the prompt fills the 128 tokens" in capsys.readouterr().out
    assert json.loads((out / "all_results.json").read_text())["train_rows"] == 6
