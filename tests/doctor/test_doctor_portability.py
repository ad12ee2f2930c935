"""The checkpoint in other hands: fresh processes, receivers without the package, stock classes, engines."""

import hashlib

from patients import ROWS, copy, edit_json, examine, of, patient

from hf_decoder.doctor import run_doctor


def fingerprint(folder):
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_ours_passes_every_row_and_is_left_as_it_was(healthy):
    before = fingerprint(healthy["ours"])
    report = run_doctor(healthy["ours"])
    assert [(row.name, row.detail) for row in report.rows if row.status != "pass"] == []
    assert report.ok and {row.name for row in report.rows} == {*ROWS, "reload", "remote_code", "save_again"}
    assert fingerprint(healthy["ours"]) == before


def test_without_auto_map_a_receiver_cannot_load_ours(ours):
    edit_json(ours / "config.json", auto_map=...)
    rows = examine(ours, ("code", "load", "remote_code", "tied"))
    assert set(of("fail", rows)) == {"remote_code"}
    assert "without the package" in rows["remote_code"].detail


def test_a_model_that_draws_its_noise_anew(tokenizer, tmp_path):
    row = examine(patient(tokenizer, tmp_path / "model", "dropout"), ("reload",))["reload"]
    assert row.status == "fail" and "the second time" in row.detail


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
