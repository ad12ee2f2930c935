"""`hf-decoder compare`: two models answer, a person judges on standard input, nothing is lost."""

import io
import json

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from hf_decoder.cli.compare import side_by_side
from hf_decoder.cli.main import main
from hf_decoder.evaluation.blind_comparison import Pair

PROMPTS = ["the cat", "the dog sees", "the bird"]


@pytest.fixture
def rival(run, tmp_path):
    folder = tmp_path / "rival"
    tokenizer = AutoTokenizer.from_pretrained(run.folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def argv(run, rival, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    flags = ["--output_dir", str(tmp_path / "out"), "--max_new_tokens", "8", "--do_sample", "false"]
    return ["compare", str(run.folder), str(rival), "--input_file", str(path), *flags]


def say(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))


def judgments(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "out" / "judgments.jsonl").read_text("utf-8").splitlines()]


@pytest.mark.process
def test_judging_stops_and_goes_on(argv, run, tmp_path, monkeypatch, capsys):
    say(monkeypatch, "1", "what", "q")
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "'what' is none of" in printed
    assert "model 1, rival 0" in printed or "model 0, rival 1" in printed
    pairs = printed.split("better   2")[1].split("decided")[0]
    assert len(judgments(tmp_path)) == 1
    # nothing between the first and the last question names a model
    assert "rival" not in pairs.split("what")[0]

    answers = (tmp_path / "out" / "answers_a.jsonl").read_bytes()
    say(monkeypatch, "2", "t")
    assert main(argv) == 0
    assert "1 of 3 pairs are judged already" in capsys.readouterr().out
    rows = judgments(tmp_path)
    assert [row["choice"] for row in rows] == ["left", "right", "tie"]
    assert {row["prompt"] for row in rows} == set(PROMPTS)
    assert (tmp_path / "out" / "answers_a.jsonl").read_bytes() == answers
    results = json.loads((tmp_path / "out" / "compare_results.json").read_text())
    assert results["wins_a"] == sum(row["winner"] == "A" for row in rows)
    assert results["wins_b"] == sum(row["winner"] == "B" for row in rows)
    assert results["ties"] == 1
    for row in rows:
        first = json.loads(answers.splitlines()[PROMPTS.index(row["prompt"])])
        assert row["answer_a"] == first["completion"]


def test_undo_and_both_bad(argv, tmp_path, monkeypatch, capsys):
    say(monkeypatch, "u", "1", "u", "b", "t")
    assert main(argv) == 0
    assert "nothing was judged since the start" in capsys.readouterr().out
    first, second = judgments(tmp_path)
    assert (first["choice"], second["choice"]) == ("both_bad", "tie")


def test_the_page_needs_gradio(argv, monkeypatch, fails):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for command in (["compare", *argv[1:], "--web"], ["demo", argv[1]]):
        assert "this needs gradio: pip install 'hf-decoder[demo]'" in fails(*command)


def test_a_model_that_was_trained_anew_is_asked_again(argv, rival, tmp_path, monkeypatch, capsys):
    say(monkeypatch, "1", "t")
    assert main(argv) == 0
    assert "answers of" in capsys.readouterr().err
    answers = [(tmp_path / "out" / f"answers_{side}.jsonl").read_bytes() for side in "ab"]
    say(monkeypatch, "q")
    assert main(argv) == 0
    assert "answers of" not in (again := capsys.readouterr()).err and "do not count" not in again.out
    model = LlamaForCausalLM.from_pretrained(rival)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(rival)
    say(monkeypatch, "q")
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert f"{rival} is asked again" in printed and "2 judgments in" in printed and "do not count" in printed
    now = [(tmp_path / "out" / f"answers_{side}.jsonl").read_bytes() for side in "ab"]
    assert now[0] == answers[0] and now[1] != answers[1]
    assert json.loads((tmp_path / "out" / "compare_results.json").read_text())["judgments"] == 0
    (tmp_path / "out" / "answers_b.jsonl").write_text('{"mine": 1}\n', encoding="utf-8")
    say(monkeypatch, "q")
    assert main(argv) == 2
    assert "is no file of this command" in capsys.readouterr().err


@pytest.mark.process
def test_interrupt_keeps_what_is_judged(argv, tmp_path, monkeypatch, capsys):
    said = iter(["1"])

    def ask(prompt=""):
        for line in said:
            return line
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", ask)
    assert main(argv) == 130
    assert len(judgments(tmp_path)) == 1
    printed = capsys.readouterr()
    assert "left answer was chosen in 100%" in printed.out
    assert printed.err.splitlines()[-1].startswith("hf-decoder compare: stopped by SIGINT")
    kept = "keeps answers_a.jsonl, answers_b.jsonl, judgments.jsonl, and the same command goes on"
    assert printed.err.strip().endswith(kept)


def test_answers_of_elsewhere(argv, tmp_path, monkeypatch, fails):
    for name, words in (("one", "abc"), ("two", "abd")):
        rows = [{"prompt": p, "completion": w} for p, w in zip(PROMPTS, words, strict=True)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    one, two = str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")
    say(monkeypatch, "t")
    assert main(["compare", one, two, *argv[3:]]) == 0
    assert [row["answer_a"] + row["answer_b"] for row in judgments(tmp_path)] == ["cd"]
    assert "not of" in fails("compare", two, one, *argv[3:])
    assert "the same" in fails("compare", one, one, *argv[3:])
    (tmp_path / "short.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    other = ["--input_file", argv[4], "--output_dir", str(tmp_path / "new")]
    assert "1 answers for 3 prompts" in fails("compare", one, str(tmp_path / "short.jsonl"), *other)
    assert "nowhere.txt" in fails("compare", one, two, "--input_file", "nowhere.txt")


@pytest.mark.parametrize("width", [40, 80])
def test_side_by_side_fits_and_loses_no_word(width):
    left, right = "word " * 30 + "\x1b[31mred", "other\nlines\tand words " * 5
    lines = side_by_side(Pair("ask " * 30, left, right, True), width)
    assert all(len(line) <= width for line in lines)
    text = " ".join(lines)
    assert text.count("word ") >= 30 - 1 and text.count("other") == 5 and text.count("ask") == 30
    assert "\x1b" not in text
