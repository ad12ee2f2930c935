"""`hf-decoder convert`, as a person types it."""

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_decoder.cli.main import main
from hf_decoder.interop import verification

TEXT = "the cat sees the dog\n"


@torch.no_grad()
def test_out_and_in_again(run, tmp_path, capsys):
    assert main(["convert", str(run.folder), str(tmp_path / "stock")]) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path / 'stock'}: Qwen3ForCausalLM"
    assert main(["convert", "--source", str(tmp_path / "stock"), "--dest", str(tmp_path / "ours")]) == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path / 'ours'}: HfDecoderForCausalLM"
    ids = AutoTokenizer.from_pretrained(run.folder)(TEXT, return_tensors="pt")["input_ids"]
    logits = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
        for path in (run.folder, tmp_path / "stock", tmp_path / "ours")
    ]
    torch.testing.assert_close(logits[1], logits[0], rtol=0.0, atol=1e-5)
    torch.testing.assert_close(logits[2], logits[0], rtol=0.0, atol=1e-5)
    assert main(["generate", str(tmp_path / "ours"), "the cat", "--max_new_tokens", "3"]) == 0


def test_gguf(run, tmp_path, capsys):
    pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'hf-decoder[gguf]'")
    file = tmp_path / "model.gguf"
    assert main(["convert", str(run.folder), str(file), "--to", "gguf", "--outtype", "q8_0"]) == 0
    recipe = tmp_path / "Modelfile"
    told = f"{file}: qwen3 in GGUF, q8_0; `ollama create NAME -f {recipe}` makes it a model of Ollama"
    assert capsys.readouterr().out.strip() == told and "FROM ./model.gguf\n" in recipe.read_text("utf-8")
    assert main(["convert", str(file), str(tmp_path / "back")]) == 0
    ids = [AutoTokenizer.from_pretrained(path)(TEXT)["input_ids"] for path in (run.folder, tmp_path / "back")]
    assert ids[0] == ids[1]


def test_bad_input_is_one_line(run, tmp_path, fails, monkeypatch):
    result = str(tmp_path / "result")
    folder = str(run.folder)
    assert "qk_norm=True" in fails("convert", folder, result, "--to", "llama")
    assert "does not exist" in fails("convert", str(tmp_path / "absent"), result)
    assert "exists; delete it" in fails("convert", folder, str(tmp_path))
    assert "--outtype 'q3' is unknown" in fails("convert", folder, result, "--outtype", "q3")
    assert "required" in fails("convert", folder)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "pip install 'hf-decoder[gguf]'" in fails("convert", folder, f"{result}.gguf", "--to", "gguf")
    assert not any(tmp_path.iterdir())


def test_a_result_that_differs_ends_with_exit_code_1(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verification, "TOLERANCE", -1.0)
    assert main(["convert", str(run.folder), str(tmp_path / "stock")]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "failed" in line]
    assert line.startswith("hf-decoder convert: failed: logits of the result differ")
    assert not any(tmp_path.iterdir())
    assert main(["convert", str(run.folder), str(tmp_path / "stock"), "--verify", "false"]) == 0
