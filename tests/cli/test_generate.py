"""Completions and chats on the command line against `generate` called by hand."""

import io

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_decoder.cli.main import main
from hf_decoder.tokenization import train_tokenizer

PROMPT = "the cat sees"


def by_hand(folder, prompt: str, **settings) -> str:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt")
    return tokenizer.decode(model.generate(**ids, **settings)[0], skip_special_tokens=True)


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_completion_is_that_of_generate(run, capsys, settings):
    flags = [f"--{name}={value}" for name, value in settings.items()]
    assert main(["generate", str(run.folder), PROMPT, "--max_new_tokens", "12", *flags]) == 0
    assert capsys.readouterr().out == by_hand(run.folder, PROMPT, max_new_tokens=12, **settings) + "\n"


def test_seed_repeats_a_draw(run, capsys):
    def draw(seed: str) -> str:
        assert main(["generate", str(run.folder), PROMPT, "--max_new_tokens", "30", "--seed", seed]) == 0
        return capsys.readouterr().out

    assert draw("1") == draw("1") != draw("2")


def test_completion_stops_at_the_longest_the_model_reads(run, capsys):
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    assert main(["generate", str(run.folder), PROMPT, "--max_new_tokens", "1000", "--do_sample", "false"]) == 0
    assert len(tokenizer(capsys.readouterr().out)["input_ids"]) <= 130


def test_any_causal_model_will_do(run, tmp_path, capsys):
    tokenizer = train_tokenizer([run.train_file.read_text(encoding="utf-8")], vocab_size=280)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), PROMPT, "--max_new_tokens", "5", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.startswith(PROMPT)


def test_ids_outside_the_vocabulary(fails, model_copy):
    tokenizer = AutoTokenizer.from_pretrained(model_copy)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(model_copy)
    assert "vocabulary" in fails("generate", str(model_copy), "the <new>")


def test_chat_sends_the_whole_conversation(run, capsys, monkeypatch):
    seen: list[str] = []
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    original = torch.nn.Module.__call__
    monkeypatch.setattr("sys.stdin", io.StringIO("first\nsecond\n"))

    def spy(self, *args, **kwargs):
        ids = kwargs.get("input_ids")
        if type(self).__name__ == "HfDecoderForCausalLM" and ids is not None and ids.shape[1] > 1:
            seen.append(tokenizer.decode(ids[0]))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.nn.Module, "__call__", spy)
    flags = ["--chat", "--system", "Be kind.", "--max_new_tokens", "3", "--do_sample", "false"]
    assert main(["generate", str(run.folder), *flags]) == 0
    first, second = seen
    assert "system\nBe kind.<|im_end|>" in first and "user\nfirst<|im_end|>" in first
    assert first.endswith("<|im_start|>assistant\n")
    assert second.startswith(first)
    assert second.endswith("<|im_end|>\n<|im_start|>user\nsecond<|im_end|>\n<|im_start|>assistant\n")
    answer = second.removeprefix(first).split("<|im_end|>")[0]
    assert answer in capsys.readouterr().out


def test_chat_forgets_its_oldest_turns_when_the_context_is_full(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat sees the dog\n" * 12))
    assert main(["generate", str(run.folder), "--chat", "--max_new_tokens", "10"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 12


def test_chat_with_a_turn_that_is_too_long(fails, run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat sees the dog " * 100))
    assert "max_position_embeddings" in fails("generate", str(run.folder), "--chat")
