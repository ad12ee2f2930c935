"""The checkpoint in other hands: fresh processes, receivers without the package, stock classes, engines."""

import hashlib
import re

import pytest
from huggingface_hub import ModelCard
from patients import ROWS, copy, edit_json, examine, of
from transformers import AutoModelForCausalLM

from hf_decoder.doctor import run_doctor
from hf_decoder.interop.conversion import convert


def fingerprint(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.process
def test_ours_passes_every_row_and_is_left_as_it_was(healthy):
    before = fingerprint(healthy["ours"])
    report = run_doctor(healthy["ours"])
    # without a card's held-out loss there is nothing to hold a text to
    assert [(row.name, row.status) for row in report.rows if row.status != "pass"] == [("likelihood", "skip")]
    assert report.ok and {row.name for row in report.rows} == {
        *ROWS,
        "likelihood",
        "reload",
        "remote_code",
        "save_again",
    }
    assert fingerprint(healthy["ours"]) == before


@pytest.mark.process
def test_without_auto_map_a_receiver_cannot_load_ours(ours):
    edit_json(ours / "config.json", auto_map=...)
    rows = examine(ours, ("code", "load", "remote_code", "tied"))
    assert set(of("fail", rows)) == {"remote_code"}
    assert "without the package" in rows["remote_code"].detail


# A folder with code of its own; `{}` is what its model does at the end of its constructor.
STRANGER = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class StrangerConfig(LlamaConfig):
    model_type = "stranger"
    factor: float = 1.0

class StrangerForCausalLM(LlamaForCausalLM):
    config_class = StrangerConfig

    def __init__(self, config):
        super().__init__(config)
        self.factor = config.factor
        {}

    def forward(self, *args, **kwargs):
        outputs = super().forward(*args, **kwargs)
        outputs.logits = outputs.logits * self.factor
        return outputs
"""
RANDOM = "self.factor = 1.0 + int.from_bytes(__import__('os').urandom(2), 'big') / 65536"
FORGETS = "config.factor = 1.0"


def stranger(folder, line):
    (folder / "modeling_stranger.py").write_text(STRANGER.format(line), encoding="utf-8")
    auto_map = {"AutoConfig": "modeling_stranger.StrangerConfig"}
    auto_map["AutoModelForCausalLM"] = "modeling_stranger.StrangerForCausalLM"
    edit_json(folder / "config.json", model_type="stranger", auto_map=auto_map, factor=3.0)
    return folder


@pytest.mark.process
def test_code_that_computes_something_else(healthy, tmp_path):
    """The installed class wins here; a receiver would get what the folder's code computes."""
    folder = copy(healthy["ours"], tmp_path / "model")
    file = folder / "modeling_hf_decoder.py"
    source = file.read_text(encoding="utf-8")
    changed = source.replace("return self.weight * hidden_states.to(input_dtype)", "return self.weight * 1.5")
    assert changed != source
    file.write_text(changed.replace("self.weight * 1.5", "1.5 * self.weight * hidden_states.to(input_dtype)"))
    report = run_doctor(folder, rows=("remote_code",), trust_remote_code=True)
    failed = {row.name: row.detail for row in report.rows if row.status == "fail"}
    assert failed.keys() == {"remote_code"} and "logits differ" in failed["remote_code"]


@pytest.mark.process
def test_what_is_not_in_the_files_is_lost(llama, tmp_path, run_python):
    """Code that the caller trusts is run: here, and in the fresh processes."""
    for name, line in (("random", RANDOM), ("forgets", FORGETS)):
        stranger(copy(llama, tmp_path / "strangers" / name), line)
    run_python(
        """
        import sys
        from pathlib import Path
        from hf_decoder.doctor import run_doctor

        def failing(name, *rows):
            report = run_doctor(Path(sys.argv[1]) / name, rows=rows, trust_remote_code=True)
            found = {row.name: (row.status, row.detail) for row in report.rows}
            return {name for name, (status, _) in found.items() if status == "fail"}, found

        failed, rows = failing("random", "code", "load", "reload")
        assert failed == {"reload"} and "logits differ by" in rows["reload"][1], rows
        assert rows["code"][0] == "warn" and "modeling_stranger.py" in rows["code"][1], rows
        failed, rows = failing("forgets", "load", "padding", "save_again")
        assert failed == {"save_again"} and "logits differ by" in rows["save_again"][1], rows
        """,
        tmp_path / "strangers",
    )


def test_a_field_that_no_stock_class_has_is_named(ours):
    edit_json(ours / "config.json", final_logit_softcapping=30.0)
    row = examine(ours, ("export",))["export"]
    assert row.status == "warn" and "final_logit_softcapping=30.0" in row.detail
    edit_json(ours / "config.json", final_logit_softcapping=None)
    row = examine(ours, ("export",))["export"]
    assert row.status == "pass" and "qwen3" in row.detail and "not llama: qk_norm=True" in row.detail


CARDS = {
    "in": ("llama", {}, "`LlamaForCausalLM`, converted to `HfDecoderForCausalLM`", "(fp32)"),
    "out": ("ours", {}, "`HfDecoderForCausalLM`, converted to `Qwen3ForCausalLM`", "(fp32)"),
    "unverified": ("ours", {"verify": False}, "converted to `Qwen3ForCausalLM`", "not measured"),
}


@pytest.mark.parametrize("case", CARDS)
def test_a_converted_folder_has_a_card(case, healthy, tmp_path, monkeypatch):
    """Written from what is known, the source's licence included; the difference is what was found, if anything."""
    name, options, words, difference = CARDS[case]
    convert(str(healthy[name]), tmp_path / "converted", **options)
    row = examine(tmp_path / "converted", ("card",))["card"]
    assert row.status == "pass" and "licence apache-2.0" in row.detail, row
    card = ModelCard.load(tmp_path / "converted" / "README.md")
    assert words in card.text and "see the card of the source" in card.text
    (found,) = [line for line in card.text.splitlines() if line.startswith("| largest difference")]
    assert difference in found
    if "fp32" in difference:
        assert 0 <= float(found.split("|")[2].split()[0]) < 1e-4
    assert str(tmp_path) not in card.content and str(healthy[name].parent) not in card.content
    assert ("trust_remote_code=True" in card.text) == ("custom_code" in card.data.tags) == (case == "in")
    monkeypatch.chdir(tmp_path)
    assert class_that_loads(card) == type(AutoModelForCausalLM.from_pretrained(tmp_path / "converted")).__name__


def class_that_loads(card) -> str:
    """The class that the card's lines load, run where the converted folder lies."""
    (lines,) = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    names: dict = {}
    exec(lines.rpartition("print(")[0], names)
    return type(names["generate"].model).__name__


def test_what_a_card_cannot_know_it_calls_unknown(llama, tmp_path):
    (llama / "README.md").write_text("---\nlicense: [\n---\n", encoding="utf-8")  # no card that can be read
    convert(str(llama), tmp_path / "converted")
    row = examine(tmp_path / "converted", ("card",))["card"]
    assert row.status == "warn" and "no licence" in row.detail
    text = (tmp_path / "converted" / "README.md").read_text(encoding="utf-8")
    assert "unknown, the source had no card" in text and "Licence: unknown" in text


def test_an_engine_s_condition_that_fails_is_named(healthy):
    row = examine(healthy["patient"], ("backends",))["backends"]
    assert row.status == "warn" and "auto_map" in row.detail
    assert examine(healthy["ours"], ("backends",))["backends"].status == "pass"


def test_a_hub_name_is_fetched_without_its_pickles(healthy, monkeypatch):
    """What is not downloaded is still named; the file list is that of the Hub."""
    asked = {}

    def snapshot_download(name, revision=None, ignore_patterns=()):
        asked.update(name=name, revision=revision, ignored=ignore_patterns)
        return str(healthy["llama"])

    class HfApi:
        def list_repo_files(self, name, revision=None):
            return [*(path.name for path in healthy["llama"].iterdir()), "pytorch_model.bin"]

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi", HfApi)
    report = run_doctor("somebody/model", rows=("formats", "card"), revision="abc")
    assert [row.name for row in report.failures] == ["formats"] and "pytorch_model.bin" in report.failures[0].detail
    assert (asked["name"], asked["revision"]) == ("somebody/model", "abc") and "*.bin" in asked["ignored"]
