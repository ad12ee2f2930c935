"""The card holds what was measured, says what was not, and is one that huggingface_hub reads."""

import ast
import json
import re
from pathlib import Path

import jinja2
import jinja2.meta
import markdown_it
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index

from hf_decoder.reporting.loading_lines import adapter_load_lines, load_lines
from hf_decoder.reporting.model_card import (
    NOT_MEASURED,
    code,
    pin_load_lines,
    pinned_revision,
    plain,
    update_model_index,
    write_conversion_card,
    write_finetuning_card,
    write_model_card,
)

RESULTS = {
    "eval_loss": 2.5,
    "perplexity": 12.182,
    "eval_bits_per_byte": 1.25,
    "xz_bits_per_byte": 1.75,
    "parameters": 1234567,
    "train_bytes": 7654321,
    "train_runtime": 61.2,
    "device": "A CPU, 2 cores",
    "python": "3.11",
    "torch": "2.13",
    "peak_memory_bytes": 2**31,
}
WORDS = {"dataset": "made-up text", "procedure": "It was trained."}


def test_card_is_read_back_with_its_metadata_and_results(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    write_model_card(folder, RESULTS, {**WORDS, "license": "apache-2.0"})
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert "hf_decoder" in card.data.tags
    assert card.data.model_name == "small"
    found = {(r.metric_type, r.metric_value, r.task_type, r.dataset_split) for r in card.data.eval_results}
    task = ("text-generation", "validation")
    assert found == {("loss", 2.5, *task), ("perplexity", 12.182, *task), ("bits_per_byte", 1.25, *task)}
    # the same metadata again from what was read: nothing is lost on the way
    assert eval_results_to_model_index("small", card.data.eval_results) == card.data.to_dict()["model-index"]


def test_card_says_every_number_and_every_word(tmp_path):
    text = write_model_card(tmp_path, RESULTS, WORDS).text
    for said in (
        "1,234,567",
        "7,654,321",
        "12.18",
        "1.75",
        "61 s",
        "P x 61 s / 3,600,000 kWh",
        "2.00 GiB",
        "A CPU, 2 cores",
        "python 3.11, torch 2.13",
    ):
        assert said in text
    assert "made-up text" in text and "It was trained." in text


def test_what_is_missing_is_said_to_be(tmp_path):
    full, empty = write_model_card(tmp_path, RESULTS, WORDS), write_model_card(tmp_path, {}, {})
    assert empty.data.eval_results is None
    assert empty.text.count(NOT_MEASURED) > full.text.count(NOT_MEASURED)
    assert "not stated" in empty.text
    tables = [line for line in empty.text.splitlines() if line.startswith("|")]
    assert not any(
        character.isdigit() for line in tables for character in line.removeprefix("| bits per byte of `xz -9e`")
    )
    assert "{{" not in empty.content


@pytest.mark.parametrize("folder", ["runs/quickstart", 'with "quotes"', "back\\slash"])
def test_the_lines_that_load_are_python_and_name_the_folder(folder):
    lines = load_lines(folder)
    assert len(lines.splitlines()) == 3
    constants = [node.value for node in ast.walk(ast.parse(lines)) if isinstance(node, ast.Constant)]
    assert folder in constants


def test_an_absolute_path_stays_at_home(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    card = write_model_card(folder, RESULTS, WORDS)
    assert str(tmp_path) not in card.content
    assert 'model="model"' in card.text


def test_each_template_and_what_fills_it_name_the_same_things(tmp_path, monkeypatch):
    filled: dict = {}
    build = ModelCard.from_template

    def keep(card_data, template_path, **fields):
        filled[template_path] = {"card_data", *fields}
        return build(card_data, template_path=template_path, **fields)

    monkeypatch.setattr(ModelCard, "from_template", keep)
    write_model_card(tmp_path, RESULTS, WORDS)
    words = {"task": "sft", "base": "a", "dataset": "b", "method": "LoRA"}
    write_finetuning_card(tmp_path, {"eval_loss": 1.0}, words, is_adapter=False)
    words = {"title": "a", "kind": "LlamaForCausalLM", "source_kind": "`X`", "source": "b"}
    write_conversion_card(tmp_path, words, parameters=1, context_length=1, measured={}, source_card=None)
    assert len(filled) == 3
    for path, names in filled.items():
        template = jinja2.Environment().parse(Path(path).read_text(encoding="utf-8"))
        assert names == jinja2.meta.find_undeclared_variables(template)


@pytest.mark.parametrize(
    "lines",
    [
        load_lines('runs/"x"'),
        adapter_load_lines("runs/x", "sft"),
        adapter_load_lines("runs/x", "classification", {0: 'a "quote"', 1: "größer"}),
    ],
)
def test_a_pinned_card_loads_one_commit_of_one_repo(lines):
    """Python whose every name is the repo, each time with the commit; and pinning twice keeps the last."""
    card = f'# model="runs/x"\n\n## How to load it\n\n```python\n{lines}\n```\n\n```python\nmodel="runs/x"\n```\n'
    assert pinned_revision(card, "user/name") is None
    pinned = pin_load_lines(pin_load_lines(card, "a/b", "0" * 40), "user/name", "a" * 40)
    assert pinned_revision(pinned, "user/name") == "a" * 40 and pinned_revision(pinned, "a/b") is None
    code = ast.parse(pinned.split("```python\n")[1].split("```")[0])
    calls = [node for node in ast.walk(code) if isinstance(node, ast.Call)]
    loading = [call for call in calls if "user/name" in ast.unparse(call) and "revision" in ast.unparse(call)]
    assert len(loading) == lines.count("runs/") and '"runs/x"\n```\n' in pinned  # nothing outside is touched
    assert pin_load_lines("# no lines", "user/name", "a" * 40) == "# no lines"


def test_a_conversion_card_of_a_hub_name(tmp_path):
    """Base model and commit are in the metadata and the text, the licence is the source's, whatever its name."""
    source = tmp_path / "source.md"
    source.write_text("---\nlicense: other\nlicense_name: gemma\nlanguage: [en, fr]\n---\n# A\n", encoding="utf-8")
    words = {"title": "small", "kind": "onnx", "source_kind": "`HfDecoderForCausalLM`", "source": "some/model"}
    words |= {"base_model": "some/model", "revision": "0" * 40}
    measured = {"gap": "2.5e-06 (fp32)", "second": "4"}
    write_conversion_card(tmp_path, words, parameters=1234, context_length=64, measured=measured, source_card=source)
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert (data["base_model"], data["license"], data["license_name"]) == ("some/model", "other", "gemma")
    assert (data["library_name"], data["pipeline_tag"], data["language"]) == ("onnx", "text-generation", ["en", "fr"])
    for said in (
        "some/model at " + "0" * 40,
        "| 1,234 |",
        "| 64 tokens |",
        "| gap | 2.5e-06 (fp32) |\n| second | 4 |\n| soft",
        "Licence: gemma",
    ):
        assert said in card.text
    assert "{{" not in card.content and "small/model.onnx" in card.text
    again = ModelCard(card.content)
    assert again.data.to_dict() == data


NASTY = "<img src=x onerror=alert(1)> [a](http://b.c) `d` | *e*\n---\nlicense: mit\n# f ![g](h) www.i.com $j$"


def rendered(text: str) -> str:
    """The HTML that a Markdown reader makes of a card's text."""
    return markdown_it.MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


def assert_harmless(folder):
    """Nothing of a strange name is markup, and the metadata holds what it would hold of a plain one."""
    content = (folder / "README.md").read_text(encoding="utf-8")
    card = ModelCard(content)
    assert card.data.to_dict().get("license") != "mit"
    html = re.sub(r"<pre>.*?</pre>", "", rendered(card.text), flags=re.DOTALL)
    assert not re.search(r'<img(?! src="loss_curve.png")|href="(?!samples)|<em>e|<code>d|<h1>f', html)
    assert "<img src=x" not in content
    assert "onerror=alert(1)" in html  # said as text


def test_names_of_strangers_are_text_in_every_card(tmp_path):
    folder = tmp_path / NASTY.replace("/", ":").replace("\n", " ")
    folder.mkdir()
    words = dict.fromkeys(("dataset", "held_out", "tokenizer", "start"), NASTY)
    write_model_card(folder, {**RESULTS, "device": NASTY}, words)
    assert_harmless(folder)
    words = {"task": "sft", "base": NASTY, "dataset": NASTY, "method": "LoRA"}
    write_finetuning_card(folder, {"eval_loss": 1.0}, words, is_adapter=False)
    assert_harmless(folder)
    source = tmp_path / "source.md"
    source.write_text(f"---\nlicense: other\nlicense_name: {json.dumps(NASTY)}\n---\n", encoding="utf-8")
    words = {"title": NASTY, "kind": "LlamaForCausalLM", "source_kind": "`X`", "source": NASTY, "revision": NASTY}
    measured = {NASTY: NASTY}
    write_conversion_card(folder, words, parameters=1, context_length=1, measured=measured, source_card=source)
    assert_harmless(folder)
    (folder / "README.md").unlink()
    update_model_index(folder, {"accuracy": 1.0}, dataset=NASTY)
    assert_harmless(folder)
    card = update_model_index(folder, {"accuracy": 0.5}, dataset=NASTY)
    assert [result.metric_value for result in card.data.eval_results] == [0.5]


def test_plain_names_stay_as_they_are():
    for name in ("my_data-2.jsonl", "a/b", "größe (1).csv", "Qwen3-0.6B, 4:2"):
        assert plain(name) == name and code(name) == (f"`{name}`" if "(" not in name else name)
