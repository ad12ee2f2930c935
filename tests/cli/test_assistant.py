"""`hf-decoder assistant` and `report`: stages run once, go on after a kill, refuse what changed."""

import html.parser
import inspect
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
import yaml
from made_up import SHAPE, made_text
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_decoder.assistant.stages import describe, lay_out
from hf_decoder.assistant.standard_library import make_rows
from hf_decoder.cli.arguments import check_verb, parse_verb
from hf_decoder.cli.assistant import read_recipe
from hf_decoder.cli.flags.assistant import RECIPES
from hf_decoder.cli.main import main

pytestmark = pytest.mark.process

pytest.importorskip("trl")
QUICK = {"report_to": "none", "bf16": False, "logging_steps": 1}
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"the {a}"}],
        "completion": [{"role": "assistant", "content": f"sees {a}"}],
    }
    for a in ("cat", "dog", "bird", "fish")
] * 4
PAIRS = [{"prompt": "the cat", "chosen": " sees", "rejected": " xx"}] * 8


class InProcess:
    """A `subprocess.Popen` that runs `python -m hf_decoder.cli.main VERB ...` here, which is faster."""

    stages: list[list[str]] = []

    def __init__(self, command, **options):
        assert command[:3] == [sys.executable, "-m", "hf_decoder.cli.main"]
        self.stages.append(command[3:])
        self.code = main(command[3:])

    def wait(self):
        return self.code

    poll = wait


@pytest.fixture
def started(monkeypatch):
    """The command lines of the stages that were run, in this process."""
    InProcess.stages = []
    monkeypatch.setattr("hf_decoder.assistant.stages.subprocess.Popen", InProcess)
    return InProcess.stages


@pytest.fixture
def recipe(tmp_path):
    """A small recipe of every kind of stage; `write` saves it with changes and returns the arguments."""
    for name, rows in (("chats", ROWS), ("pairs", PAIRS)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "text.txt").write_text(made_text(1, 400), encoding="utf-8")
    steps = {"max_steps": 2, "per_device_train_batch_size": 4, **QUICK}
    stages = {
        "tokenizer": {"train_file": str(tmp_path / "text.txt"), "vocab_size": 300},
        "pretrain": {"train_file": str(tmp_path / "text.txt"), "config_overrides": SHAPE, "block_size": 64, **steps},
        "sft": {"train_file": str(tmp_path / "chats.jsonl"), **steps},
        "preference": {"train_file": str(tmp_path / "pairs.jsonl"), **steps},
        "eval": {
            "answers": {
                "test_file": str(tmp_path / "chats.jsonl"),
                "metrics": ["exact_match", "stop_rate", "python_parses"],
                "max_eval_samples": 3,
                "max_new_tokens": 4,
            }
        },
    }

    def write(**changes):
        path = tmp_path / "recipe.yaml"
        values = {**stages, **changes, "output_dir": str(tmp_path / "out")}
        path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value}), encoding="utf-8")
        return ["assistant", "--config", str(path)]

    write.stages, write.folder = stages, tmp_path / "out"
    return write


def names(started):
    return [words[0] if words[0] != "finetune" else words[2] for words in started]


def test_every_stage_runs_once_and_what_changed_only_when_asked(recipe, started, fails, capsys):
    assert main(recipe()) == 0
    assert names(started) == ["tokenizer", "pretrain", "eval", "sft", "eval", "preference", "eval"]
    for stage in ("pretrain", "sft", "preference"):
        AutoModelForCausalLM.from_pretrained(recipe.folder / stage)
        assert AutoTokenizer.from_pretrained(recipe.folder / stage).get_vocab()
    before = load_file(recipe.folder / "pretrain/model.safetensors")
    assert all("answers: stops by itself" in (recipe.folder / f"report.{kind}").read_text() for kind in ("md", "html"))

    started.clear()
    assert main(recipe()) == 0 and not started and "done before" in capsys.readouterr().out

    changed = recipe(sft={**recipe.stages["sft"], "learning_rate": 1e-3})
    line = fails(*changed)
    assert "sft in" in line and "learning_rate unset -> 0.001" in line and "--overwrite_output_dir" in line
    assert not started and main([*changed, "--overwrite_output_dir"]) == 0
    assert names(started) == ["sft", "eval", "preference", "eval"]
    after = load_file(recipe.folder / "pretrain/model.safetensors")
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_stage_whose_rows_changed_or_whose_folder_is_gone(recipe, started, fails, tmp_path):
    argv = recipe(preference=None, eval=None)
    assert main(argv) == 0
    started.clear()
    shutil.rmtree(recipe.folder / "sft")
    assert main(argv) == 0 and names(started) == ["sft"]
    with (tmp_path / "chats.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(ROWS[0]) + "\n")
    assert "the content of train_file" in fails(*argv)
    (recipe.folder / "assistant.json").write_text("{")
    assert "is damaged" in fails(*argv)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"sftt": {"max_steps": 1}}, "'sftt'"),
        ({"sft": {"train_file": "chats.jsonl", "learning_rat": 1}}, "sft: unknown argument '--learning_rat"),
        ({"sft": {"train_file": "nowhere.jsonl"}}, "sft: --train_file nowhere.jsonl does not exist"),
        ({"sft": {"train_file": "chats.jsonl", "output_dir": "x"}}, "sft: output_dir is not for a recipe"),
        ({"pretrain": None}, "sft: nothing is trained before it"),
        ({"sft": {"train_file": "chats.jsonl", "use_peft": True}}, "sft: use_peft without merge"),
        ({"eval": {"metrics": ["chrf"]}}, "eval holds tests by name"),
        ({"eval": {"answers": {"metric": ["chrf"]}}}, "did you mean '--metrics'"),
        ({"eval": {"answers": {"tasks": ["blimpp"]}}}, "did you mean 'blimp'"),
        (
            {"grpo": {"train_file": "chats.jsonl", "reward_funcs": ["python_parse"]}},
            "reward 'python_parse' is unknown",
        ),
        ({"data": {"chats": {"dataset": "x"}}}, "data, chats: a dataset_name"),
        ({"sft": [1]}, "sft"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(recipe, started, fails, monkeypatch, tmp_path, change, said):
    monkeypatch.chdir(tmp_path)
    assert said in fails(*recipe(**change))
    assert not started and not recipe.folder.exists()


def test_a_package_that_only_a_test_needs_is_asked_for_before_anything_runs(recipe, started, fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    line = fails(*recipe(eval={"answers": {**recipe.stages["eval"]["answers"], "metrics": ["chrf"]}}))
    assert "answers of pretrain: this needs sacrebleu" in line and "hf-decoder[eval]" in line and not started


def test_the_key_of_a_stage_covers_every_flag_and_not_where_the_output_lies(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    own = tmp_path / "data" / "rows.jsonl"
    own.write_text("{}\n")

    def key(folder, data=None, **flags):
        flags = {"model_name_or_path": "m", "train_file": "data/rows.jsonl", **flags}
        stages = lay_out({"sft": flags}, Path(folder))
        describe(stages, Path(folder), data)
        return stages[0].key

    assert key(".", learning_rate=0.1) != key(".", learning_rate=0.001)
    assert key("a", dtype="bfloat16") != key("a", dtype="float32")
    made = {"train_file": "{data}/chats.jsonl"}
    assert key("a", {}, **made) == key(".", {}, **made) != key("a", {"x": 1}, **made)
    assert key("a", {}, **made) != key("a", {}, train_file="{data}/pairs.jsonl")
    before = key(".")
    own.write_text("{ }\n")
    assert key(".") != before


def test_a_stage_that_fails_ends_the_run_and_is_gone_on_with(recipe, started, fails, tmp_path):
    argv = recipe(preference=None, eval=None, sft={**recipe.stages["sft"], "messages_column": "nothing"})
    assert "sft ended with exit code 2" in fails(*argv)
    started.clear()
    assert main(recipe(preference=None, eval=None)) == 0
    assert names(started) == ["sft"]  # nothing of it would be lost, so nobody needs to be asked


@pytest.mark.timeout(1200)
def test_a_run_that_is_ended_or_killed_goes_on_and_no_second_one_beside_it(recipe, fails, tmp_path):
    """Weights are those of a run that nothing ended. Real processes: one dies with its last breath unsaid."""
    steps = {**recipe.stages["pretrain"], "max_steps": 150, "save_steps": 3}
    argv = recipe(sft=None, preference=None, eval=None, pretrain=steps)
    command = [sys.executable, "-m", "hf_decoder.cli.main", *argv]
    options = {"env": {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, "stdout": subprocess.DEVNULL}

    def saved() -> int:
        marks = recipe.folder.glob("pretrain/checkpoint-*/complete.json")
        return max((int(mark.parent.name.rpartition("-")[2]) for mark in marks), default=0)

    def start() -> subprocess.Popen:
        before, process = saved(), subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)
        deadline = time.monotonic() + 250
        while saved() == before:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        return process

    with start() as process:
        process.terminate()
        assert "the same command goes on from there" in process.communicate()[1] and process.returncode == 143
    with start() as process:
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGSTOP)
        process.kill()
        process.wait()
        try:
            assert "another run is at work" in fails(*argv)
        finally:
            os.kill(int(child), signal.SIGKILL)
    stat = Path(f"/proc/{child}/stat")
    while stat.exists() and stat.read_text().split()[2] != "Z":
        time.sleep(0.02)
    assert 0 < saved() < 150
    subprocess.run(command, check=True, **options)
    record = json.loads((recipe.folder / "assistant.json").read_text())["stages"]["pretrain"]
    assert record["done"]
    whole = tmp_path / "whole"
    assert main([*record["command"].split()[1:], f"--output_dir={whole}"]) == 0
    ours, expected = (load_file(folder / "model.safetensors") for folder in (recipe.folder / "pretrain", whole))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_rows_of_a_data_set_become_a_file_that_stages_read(recipe, started, tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    shutil.copy(tmp_path / "chats.jsonl", folder / "train.jsonl")
    sft = {**recipe.stages["sft"], "train_file": "{data}/chats.parquet"}
    data = {"chats": {"dataset_name": str(folder), "max_rows": 10}}
    assert main(recipe(preference=None, eval=None, data=data, sft=sft)) == 0
    results = json.loads((recipe.folder / "sft/all_results.json").read_text())
    assert results["train_rows"] + results["eval_rows"] == 10


def test_answers_about_a_function_are_what_python_says_of_it():
    rows = make_rows([inspect.getsource(textwrap), inspect.getsource(shutil), inspect.getsource(json)])
    functions = {name: one for module in (textwrap, shutil, json) for name, one in vars(module).items()}
    checked = 0
    for row in rows["questions"]:
        asked, answer = row["prompt"][0]["content"], row["completion"][0]["content"]
        name = asked.rpartition("def ")[2].partition("(")[0]
        if not inspect.isfunction(functions.get(name)):
            continue
        if inspect.getsource(functions[name]).splitlines()[0] not in asked.splitlines():  # a method of that name
            continue
        parameters = inspect.signature(functions[name]).parameters
        if asked.startswith("Which arguments"):
            kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
            assert answer == (", ".join(n for n, p in parameters.items() if p.kind not in kinds) or "none")
        else:
            assert answer == name or answer in " ".join(functions[name].__doc__.split())
        checked += 1
    assert checked > 10 and rows["calls"]
    for row in rows["calls"]:
        (tool,), (call,) = row["tools"], row["completion"][0]["tool_calls"]
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        assert tool["function"]["name"] == name and row["prompt"][0]["content"].startswith(f"Call {name} with ")
        assert set(tool["function"]["parameters"]["properties"]) == set(arguments)
        if inspect.isfunction(functions.get(name)) and "self" not in inspect.signature(functions[name]).parameters:
            assert set(arguments) <= set(inspect.signature(functions[name]).parameters)
    for row in rows["functions"]:
        compile(row["completion"][0]["content"], "written", "exec")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_of_the_package_has_flags_that_there_are(name, tmp_path):
    (arguments,) = parse_verb("assistant", ["--recipe", name])
    for stage in lay_out(read_recipe(arguments), tmp_path):
        check_verb(stage.verb[0], stage.argv()[1:])


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.found, self.sources = set(), []

    def handle_starttag(self, tag, attrs):
        self.found.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "style", "onerror")]


def made_run(folder, loss, text="an answer"):
    """A folder as `assistant` leaves it, with two stages and a test."""
    stages = {}
    for number, name in enumerate(("pretrain", "grpo")):
        (folder / name).mkdir(parents=True)
        curve = [{"step": step, "loss": loss / step, "reward": step / 10} for step in (1, 2, 3)]
        if name == "pretrain":
            curve = [{key: value for key, value in entry.items() if key != "reward"} for entry in curve]
        (folder / name / "trainer_state.json").write_text(json.dumps({"log_history": curve}))
        results = {"train_steps": 3, "num_input_tokens_seen": 1000, "train_runtime": 61.2, "eval_loss": loss}
        (folder / name / "all_results.json").write_text(json.dumps(results))
        shape = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
        shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
        (folder / name / "config.json").write_text(json.dumps({**shape, "tie_word_embeddings": True}))
        test = folder / "eval" / "code" / name
        test.mkdir(parents=True)
        tasks = {"piqa": {"acc": 0.6, "counts": "acc", "asked_for": True, "chance": 0.5, "random_weights": 0.49}}
        measured = {"python_parses": 0.25 + number / 2, "tasks": tasks}
        (test / "eval_results.json").write_text(json.dumps(measured))
        row = {"prompt": text, "prediction": text, "references": [text]}
        (test / "predictions.jsonl").write_text(json.dumps(row) + "\n")
        stages[name] = {"seconds": 70, "command": f"hf-decoder {name} {text}"}
    (folder / "assistant.json").write_text(json.dumps({"stages": stages}))
    return folder


def test_a_report_shows_the_figures_of_two_runs_side_by_side(tmp_path, capsys):
    folders = [str(made_run(tmp_path / name, loss)) for name, loss in (("first", 4.0), ("second", 3.0))]
    assert main(["report", *folders, "--output_dir", str(tmp_path / "both")]) == 0
    text = (tmp_path / "both/report.md").read_text(encoding="utf-8")
    assert "| grpo, first | 75.0% (+50.0) |" in text and "| pretrain, second | 25.0% |" in text
    assert "| piqa, acc | 0.5 | 0.49 | 0.6 | 0.6 | 0.6 | 0.6 |" in text
    # 6 N + 12 L H Q T for each of 1,000 tokens, with the head among the N
    layer = 32 * (2 * 2 * 16 + 2 * 1 * 16) + 3 * 32 * 64
    flops = 1000 * (6 * (2 * layer + 300 * 32) + 12 * 2 * 32 * 64)
    assert f"| {flops / 1e6:.3g} M |" in text
    assert (tmp_path / "both/report_curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_report_shows_what_strangers_wrote_as_text(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=y> | `a` \x1b[31m \u202e ![x](http://evil)\n# no heading"
    folder = made_run(tmp_path / "run <b>$x$ |", 4.0, evil)
    assert main(["report", str(folder), "--output_dir", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(page)
    assert tags.found.isdisjoint({"script", "b", "link", "iframe"}) and page.count("<img") == 1
    assert all(source.startswith("data:image/png;base64,") for source in tags.sources)
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    assert not {"\x1b", "\u202e"} & {*page, *text}
    title = text.splitlines()[0]
    assert "<b>" not in title and title.startswith("# Run run &#60;b&#62;")


@pytest.mark.parametrize(("content", "said"), [(None, "holds no finished training"), ("{", "is damaged")])
def test_a_folder_that_is_no_run_is_one_line(tmp_path, fails, content, said):
    if content:
        (tmp_path / "trainer_state.json").write_text(content)
    assert said in fails("report", str(tmp_path))
