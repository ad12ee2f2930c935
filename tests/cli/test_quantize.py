"""`hf-decoder quantize`, as a person types it."""

import functools
import importlib.util

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_decoder.cli.main import main
from hf_decoder.data.documents import load_text
from hf_decoder.doctor import run_doctor
from hf_decoder.evaluation import metrics
from hf_decoder.interop import quantization

TEXT = "the cat sees the dog\n"


@pytest.fixture(autouse=True)
def short_generation(monkeypatch):
    speed = functools.partial(quantization.decoding_speed, new_tokens=3, repeats=1)
    monkeypatch.setattr(quantization, "decoding_speed", speed)


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT * 9)
    return str(tmp_path / "text.txt")


def rows(output: str) -> dict[str, list[str]]:
    """The table: method -> its cells."""
    return {line.split()[0]: line.split()[1:] for line in output.splitlines() if "MB" in line}


@pytest.mark.process
@torch.no_grad()
@pytest.mark.parametrize("method", ["torchao_int8", "bitsandbytes_int8", "bitsandbytes_nf4"])
def test_one_method_is_measured_and_saved(method, run, tmp_path, text_file, capsys):
    out = tmp_path / "saved"
    flags = ["--methods", method, "--output_dir", str(out)]
    assert main(["quantize", str(run.folder), "--validation_file", text_file, *flags]) == 0
    table = rows(capsys.readouterr().out)
    assert list(table) == ["none", method]
    sizes = [[float(cells[0]), float(cells[2])] for cells in table.values()]
    assert sizes[1][0] < sizes[0][0] and sizes[1][1] < sizes[0][1]
    plain = sum(p.nbytes for p in AutoModelForCausalLM.from_pretrained(run.folder, dtype=torch.bfloat16).parameters())
    assert sizes[0][1] == pytest.approx(plain / 1e6, abs=0.02)

    ids = AutoTokenizer.from_pretrained(out)(TEXT, return_tensors="pt")["input_ids"]
    saved = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    config = quantization.quantization_config(method)
    on_load = AutoModelForCausalLM.from_pretrained(run.folder, dtype=torch.bfloat16, quantization_config=config)
    assert torch.equal(saved(ids).logits, on_load(ids).logits)
    card = (out / "README.md").read_text(encoding="utf-8")
    assert f"quantized by `{method}`" in card and f"{table['none'][4]}, {table[method][4]}" in card
    report = run_doctor(out, level="quick")
    assert report.ok, report.failures
    documents = load_text(text_file, validation_fraction=0)["train"]
    score, _ = metrics.score_text(saved, AutoTokenizer.from_pretrained(out), documents, block_size=64)
    assert float(table[method][4]) == pytest.approx(metrics.perplexity(score.loss), rel=0.02)


def test_what_cannot_be_saved_is_shown_so(run, text_file, capsys):
    methods = ["--methods", "torchao_int8", "torchao_int4", "quanto_int8"]
    assert main(["quantize", str(run.folder), "--validation_file", text_file, *methods]) == 0
    table = rows(capsys.readouterr().out)
    assert table["torchao_int8"][0] != "-"
    assert [table[name][0] for name in ("torchao_int4", "quanto_int8")] == ["-", "-"]


def test_bad_input_is_one_line(run, tmp_path, text_file, fails, monkeypatch):
    folder, text = str(run.folder), ["--validation_file", text_file]
    out = str(tmp_path / "saved")
    assert "'int3' is unknown" in fails("quantize", folder, *text, "--methods", "int3")
    assert "--output_dir saves one model" in fails("quantize", folder, *text, "--output_dir", out)
    assert "cannot be saved" in fails("quantize", folder, *text, "--methods", "torchao_int4", "--output_dir", out)
    assert "exists; delete it" in fails(
        "quantize", folder, *text, "--methods", "torchao_int8", "--output_dir", str(tmp_path)
    )
    assert "required" in fails("quantize", folder)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find_spec(name))
    assert "pip install torchao" in fails("quantize", folder, *text, "--methods", "torchao_int8")
    assert not (tmp_path / "saved").exists()
