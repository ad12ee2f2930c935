"""The Modelfile beside a GGUF file, read by a parser of its own: the same prompts, stops and draws as here."""

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GenerationConfig

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.cli.main import main

pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'hf-decoder[gguf]'")

CHATS = [
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi {{ .Role }}"}],
    [{"role": role, "content": f"{role}\nsays"} for role in ("user", "assistant", "user")],
]


def parse(text: str) -> dict[str, list[str]]:
    """Instructions by name, by Ollama's published grammar: a value ends with its line, or with its three quotes."""
    found: dict[str, list[str]] = {}
    pattern = r'^(?:#.*|(FROM|TEMPLATE|PARAMETER \w+) (?:"""((?:.|\n)*?)"""|"(.*)"|(.*)))$'
    end = 0
    for match in re.finditer(pattern, text, flags=re.MULTILINE):
        assert text[end : match.start()].strip() == ""
        end = match.end()
        if match[1]:
            found.setdefault(match[1], []).append(next(value for value in match.groups()[1:] if value is not None))
    assert text[end:].strip() == ""
    return found


def render(template: str, messages: list[dict[str, str]]) -> str:
    """What Go's text/template makes of one loop over messages: `{{-` takes the blanks before it away."""
    before, body, after = re.fullmatch(
        r"((?:.|\n)*?)\s*\{\{- range \.Messages \}\}((?:.|\n)*?)\{\{ end \}\}((?:.|\n)*)", template
    ).groups()
    fields = {".Role": "role", ".Content": "content"}
    turns = [re.sub(r"\{\{ (\.\w+) \}\}", lambda at: turn[fields[at[1]]], body) for turn in messages]  # noqa: B023
    return before + "".join(turns) + after


@pytest.fixture
def folder(tmp_path, tokenizer) -> Path:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = HfDecoderConfig(
        vocab_size=len(tokenizer), max_position_embeddings=96, eos_token_id=tokenizer.eos_token_id, **shape
    )
    HfDecoderForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def convert(folder: Path, name: str = "mine.gguf") -> dict[str, list[str]]:
    there = set(folder.parent.iterdir())
    assert main(["convert", str(folder), str(folder.parent / name), "--to", "gguf"]) == 0
    (recipe,) = [path for path in set(folder.parent.iterdir()) - there if path.suffix != ".gguf"]
    return parse(recipe.read_text("utf-8"))


def test_a_chat_model_that_draws(folder, capsys):
    settings = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "eos_token_id": [0, 3]}
    GenerationConfig(**settings).save_pretrained(folder)
    found = convert(folder)
    assert f"-f {folder.parent / 'Modelfile'}" in capsys.readouterr().out
    assert found["FROM"] == ["./mine.gguf"]
    assert found["PARAMETER stop"] == ["<|endoftext|>", "<|im_end|>"]
    given = {"temperature": 0.7, "top_p": 0.9, "num_ctx": 96}
    # what is not given is what generate() takes, not what Ollama would
    given |= {"top_k": GenerationConfig._get_default_generation_params()["top_k"], "min_p": 0, "repeat_penalty": 1}
    given |= {"repeat_last_n": -1}
    assert {key.split()[1]: float(*found[key]) for key in found if key[-4:] != "stop" and " " in key} == given
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for chat in CHATS:
        expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        assert render(found["TEMPLATE"][0], chat) == expected


def test_a_model_without_chats_that_takes_the_likeliest(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = None
    for path in folder.glob("chat_template*"):
        path.unlink()
    tokenizer.save_pretrained(folder)
    found = convert(folder)
    assert "TEMPLATE" not in found and found["PARAMETER temperature"] == ["0.0"]
    assert found["PARAMETER stop"] == ["<|endoftext|>"]


def test_a_template_that_is_not_chatml_is_left_to_ollama_and_an_older_modelfile_stays(folder):
    first = convert(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    second = convert(folder, "other.gguf")
    assert "TEMPLATE" in first and "TEMPLATE" not in second
    assert second["FROM"] == ["./other.gguf"]
    assert "is not ChatML" in (folder.parent / "other.Modelfile").read_text("utf-8")
    assert parse((folder.parent / "Modelfile").read_text("utf-8")) == first


def test_settings_of_a_stranger_are_numbers(folder, capsys):
    (folder / "generation_config.json").write_text('{"do_sample": true, "top_p": "0.9\\nADAPTER /etc/passwd"}')
    before = set(folder.parent.iterdir())
    assert main(["convert", str(folder), str(folder.parent / "mine.gguf"), "--to", "gguf"]) == 2
    assert "not a number" in capsys.readouterr().err and set(folder.parent.iterdir()) == before
