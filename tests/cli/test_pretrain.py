"""The whole job on a tiny text: what it writes, that it loads elsewhere, and that it can be stopped and resumed."""

import json
import lzma
import math
import shutil
import textwrap
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_decoder.cli.main import main
from hf_decoder.training import callbacks

FILES = [
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "configuration_hf_decoder.py",
    "modeling_hf_decoder.py",
    "README.md",
    "loss_curve.png",
    "samples.md",
    "all_results.json",
    "train_results.json",
    "eval_results.json",
    "trainer_state.json",
]


def results(folder: Path) -> dict:
    return json.loads((folder / "all_results.json").read_text(encoding="utf-8"))


def test_every_file_is_there(run):
    assert [name for name in FILES if not (run.folder / name).stat().st_size] == []
    assert sorted(path.name for path in run.folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    auto_map = json.loads((run.folder / "config.json").read_text(encoding="utf-8"))["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForCausalLM"} <= set(auto_map)


def test_metrics_hang_together(run):
    metrics = results(run.folder)
    text = run.validation_file.read_bytes()
    assert metrics["eval_bytes"] == len(text)
    assert metrics["train_bytes"] == run.train_file.stat().st_size
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    # every token of the text and its end
    assert metrics["eval_tokens"] == len(tokenizer(text.decode())["input_ids"]) + 1
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    nats = metrics["eval_loss"] * metrics["eval_tokens"]
    assert metrics["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text))
    compressed = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
    assert metrics["xz_bits_per_byte"] == pytest.approx(8 * len(compressed) / len(text))
    assert metrics["num_input_tokens_seen"] == run.steps * 4 * 64
    assert metrics["train_tokens_per_second"] == pytest.approx(run.steps * 4 * 64 / metrics["train_runtime"], rel=1e-2)
    model = AutoModelForCausalLM.from_pretrained(run.folder)
    assert metrics["parameters"] == model.num_parameters()
    assert {**json.loads((run.folder / "train_results.json").read_text()), **json.loads((run.folder / "eval_results.json").read_text())} == metrics  # fmt: skip # noqa: E501


def test_the_loss_is_that_of_the_model_on_the_text(run):
    # The held-out text as one document: end of text, tokens, end of text, read 64 at a time, each block beginning
    # with the last token of the one before.
    model = AutoModelForCausalLM.from_pretrained(run.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    end = [tokenizer.eos_token_id]
    ids = end + tokenizer(run.validation_file.read_text(encoding="utf-8"))["input_ids"] + end
    nats = 0.0
    for start in range(0, len(ids) - 1, 63):
        block = torch.tensor(ids[start : start + 64])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=block[None]).logits[0].float()
        nats += float(torch.nn.functional.cross_entropy(logits[:-1], block[1:], reduction="sum"))
    assert results(run.folder)["eval_loss"] == pytest.approx(nats / (len(ids) - 1), rel=2e-2)


def test_model_card_carries_the_results(run):
    card = ModelCard.load(run.folder / "README.md")
    metrics = results(run.folder)
    assert card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0"
    measured = {result.metric_type: result.metric_value for result in card.data.eval_results}
    expected = {"loss": "eval_loss", "perplexity": "perplexity", "bits_per_byte": "eval_bits_per_byte"}
    assert measured == pytest.approx({metric: metrics[key] for metric, key in expected.items()})
    assert f"{metrics['train_tokens']:,}" in card.text
    assert "{{" not in card.content
    assert str(run.folder.parent) not in card.content


def test_loss_curve_is_a_picture(run):
    with Image.open(run.folder / "loss_curve.png") as picture:
        picture.load()
        assert picture.format == "PNG"
        assert len(picture.convert("RGB").getcolors(maxcolors=2**24)) > 10


def test_samples_continue_held_out_text(run):
    samples = (run.folder / "samples.md").read_text(encoding="utf-8")
    prompt = samples.split("```text\n")[1].split("\n```")[0]
    assert prompt in run.validation_file.read_text(encoding="utf-8")


@pytest.mark.process
def test_printed_lines_and_a_checkpoint_work_in_a_fresh_process_without_the_package(run, run_python):
    lines = [line for line in run.printed.splitlines() if line][-3:]
    assert lines[0] == "from transformers import pipeline"
    more = """
        from transformers import AutoModelForCausalLM, AutoTokenizer
        checkpoint = sys.argv[1]
        AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True)
        print("loaded from", type(model).__module__.split(".")[0])
    """
    code = "\n".join([*lines, textwrap.dedent(more)])
    said = run_python(code, run.folder / f"checkpoint-{run.steps}", hide=("hf_decoder",))
    assert said.startswith("the cat")
    assert "loaded from transformers_modules" in said


@pytest.mark.process
def test_resumed_is_uninterrupted_bit_for_bit(run, tmp_path):
    folder = tmp_path / "resumed"
    shutil.copytree(run.folder / "checkpoint-3", folder / "checkpoint-3")
    assert main(["pretrain", *run.flags, "--output_dir", str(folder), "--resume_from_checkpoint"]) == 0
    resumed, whole = load_file(folder / "model.safetensors"), load_file(run.folder / "model.safetensors")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert results(folder)["num_input_tokens_seen"] == results(run.folder)["num_input_tokens_seen"]


@pytest.mark.process
def test_a_finished_run_goes_on_for_more_steps(run, tmp_path):
    folder = tmp_path / "longer"
    shutil.copytree(run.folder / "checkpoint-6", folder / "checkpoint-6")
    flags = [*run.flags, "--output_dir", str(folder), "--max_steps", "9", "--time_limit", "1h"]
    assert main(["pretrain", *flags, "--resume_from_checkpoint"]) == 0
    assert results(folder)["num_input_tokens_seen"] == 9 * 4 * 64


@pytest.mark.process
def test_watching_a_run_changes_nothing_of_it(run, tmp_path):
    folder = tmp_path / "watched"
    flags = [*run.flags, "--output_dir", str(folder), "--sample_steps", "2", "--time_limit", "1h"]
    assert main(["pretrain", *flags]) == 0
    watched, whole = load_file(folder / "model.safetensors"), load_file(run.folder / "model.safetensors")
    assert all(torch.equal(watched[name], whole[name]) for name in whole)
    samples = (folder / "samples_in_training.md").read_text(encoding="utf-8")
    assert [line for line in samples.splitlines() if line.startswith("# ")] == ["# Step 2", "# Step 4", "# Step 6"]
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    logged = [entry for entry in state["log_history"] if "loss" in entry]
    assert all(
        0 <= entry["data_wait"] <= 1 and entry["mfu"] > 0 and entry["tokens_per_second"] > 0 for entry in logged
    )


@pytest.mark.process
def test_overwriting_leaves_nothing_of_the_old_run_and_goes_on_from_a_model(run, model_copy, tmp_path):
    shutil.copytree(run.folder / "checkpoint-6", model_copy / "checkpoint-6")
    (model_copy / "all_results.json").write_text('{"bleu": 1.0}', encoding="utf-8")
    flags = ["--train_file", str(run.train_file), "--block_size", "64", "--max_steps", "1"]
    flags += ["--model_name_or_path", str(run.folder), "--learning_rate", "0"]
    assert main(["pretrain", *flags, "--output_dir", str(model_copy), "--overwrite_output_dir"]) == 0
    assert [path.name for path in model_copy.glob("checkpoint-*")] == ["checkpoint-1"]
    assert "bleu" not in results(model_copy)
    # a learning rate of zero: the weights that it went on from
    before, after = load_file(run.folder / "model.safetensors"), load_file(model_copy / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (model_copy / "tokenizer.json").read_bytes() == (run.folder / "tokenizer.json").read_bytes()


@pytest.mark.process
def test_tensorboard_gets_what_the_log_has(run, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    folder = tmp_path / "model"
    assert main(["pretrain", *run.flags, "--output_dir", str(folder), "--report_to", "tensorboard"]) == 0
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    for tag, key in (("train/loss", "loss"), ("eval/loss", "eval_loss"), ("train/tokens_per_second", "tokens_per_second"), ("train/mfu", "mfu"), ("train/grad_norm", "grad_norm")):  # fmt: skip # noqa: E501
        logged = {entry["step"]: entry[key] for entry in history if key in entry}
        assert logged and {event.step: event.value for event in events.Scalars(tag)} == pytest.approx(logged)


@pytest.mark.process
def test_the_loss_curve_holds_both_losses_at_every_save(run, tmp_path, monkeypatch):
    curves = []

    def look(log, path, **drawing):
        curves.append(({entry["step"] for entry in log if "loss" in entry}, {entry["step"] for entry in log if "eval_loss" in entry}))  # fmt: skip # noqa: E501

    monkeypatch.setattr(callbacks, "plot_loss_curve", look)
    flags = [*run.flags, "--logging_steps", "1", "--eval_steps", "2", "--save_steps", "2"]
    assert main(["pretrain", *flags, "--output_dir", str(tmp_path / "model")]) == 0
    assert curves[:3] == [({1, 2}, {2}), ({1, 2, 3, 4}, {2, 4}), ({1, 2, 3, 4, 5, 6}, {2, 4, 6})]


@pytest.mark.process
def test_a_run_that_its_time_limit_cuts_says_how_far_it_came(run, tmp_path, capsys):
    folder = tmp_path / "cut"
    argv = ["pretrain", *run.flags, "--max_steps", "100000", "--time_limit", "1s", "--output_dir", str(folder)]
    assert main(argv) == 0
    results = json.loads((folder / "all_results.json").read_text())
    taken = results["train_steps"]
    assert 0 < taken < 100_000 and results["planned_steps"] == 100_000
    share = f"{taken:,} of 100,000, {taken / 1e5:.1%} of the schedule"
    printed = capsys.readouterr().out
    assert "time limit: the learning rate falls from step" in printed
    assert f"the time limit ended the training after step {share}" in printed
    assert f"| optimizer steps | {share} |" in (folder / "README.md").read_text()
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert max(entry["step"] for entry in log if "loss" in entry) == taken


@pytest.mark.process
def test_a_log_has_a_line_at_every_logging_step_and_no_bar(run, tmp_path, capfd):
    argv = ["pretrain", *run.flags, "--max_steps", "4", "--logging_steps", "2", "--output_dir", str(tmp_path / "out")]
    assert main(argv) == 0
    said = "".join(capfd.readouterr())
    assert not {"\r", "\x1b", "\b"} & set(said)
    assert len([line for line in said.splitlines() if "'loss'" in line]) == 3  # of steps 1, 2 and 4


@pytest.mark.process
def test_pretraining_and_fine_tuning_end_alike(run, tmp_path, capsys):
    """The same files, names of metrics and last lines, which prompt with the user's own text."""
    pytest.importorskip("trl")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "the dog", "completion": " sees the cat"}\n' * 8, encoding="utf-8")
    out = tmp_path / "out"
    argv = ["finetune", str(run.folder), "--train_file", str(rows), "--output_dir", str(out), "--max_steps", "2"]
    assert main([*argv, "--validation_file", str(rows), "--report_to", "none"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    before = run.printed.strip().splitlines()
    for said in (lines, before):
        measures, _, where, _, *code = said[-7:]
        assert measures.startswith("held out: loss ") and where.endswith(
            " holds the model. These lines load and use it:"
        )
        assert code[0] == "from transformers import pipeline"
    assert 'generate("the dog", ' in lines[-1] and 'generate("the' in before[-1]
    names = ("all_results", "train_results", "eval_results", "trainer_state")
    for name in [*(f"{name}.json" for name in names), "loss_curve.png", "README.md", "model.safetensors"]:
        assert (out / name).is_file() and (run.folder / name).is_file()
    one, other = (json.loads((folder / "all_results.json").read_text()) for folder in (out, run.folder))
    shared = {"train_loss", "train_runtime", "train_steps", "planned_steps", "train_tokens_per_second", "eval_loss"}
    shared |= {"num_input_tokens_seen", "perplexity", "parameters", "peak_memory_bytes", "device", "epoch"}
    assert shared <= one.keys() and shared <= other.keys()
