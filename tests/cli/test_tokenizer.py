"""The tokenizer command: what it saves and what it says, counted again by hand."""

import json

import pytest
from made_up import made_text
from tokenizers import ByteLevelBPETokenizer, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_decoder.cli.main import main
from hf_decoder.data import tokenizer_report


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    base = tmp_path_factory.mktemp("tokenizer")
    train, held_out = base / "train.txt", base / "held_out.txt"
    train.write_text(made_text(1, 800) + "12345 don't\n" * 20, encoding="utf-8")
    held_out.write_text(made_text(2, 50) + "a ÿ 99\n", encoding="utf-8")
    return base, train, held_out


def trained(files, kind: str, capsys, *more: str):
    base, train, held_out = files
    folder = base / kind
    flags = ["--train_file", str(train), "--validation_file", str(held_out), "--tokenizer_type", kind, *more]
    assert main(["tokenizer", *flags, "--output_dir", str(folder)]) == 0
    report = json.loads((folder / "tokenizer_report.json").read_text(encoding="utf-8"))
    return AutoTokenizer.from_pretrained(folder), report, capsys.readouterr().out, held_out.read_bytes().decode()


def test_bpe(files, capsys):
    tokenizer, report, said, text = trained(files, "bpe", capsys, "--vocab_size", "285")
    assert len(tokenizer) == report["tokens"] == 285
    ids = tokenizer(text)["input_ids"]
    assert report["bytes_per_token"] == pytest.approx(len(text.encode()) / len(ids))
    assert report["vocabulary_used"] == pytest.approx(len(set(ids)) / 281)
    assert report["coverage"] == 1.0 and report["exact"]
    assert f"{report['bytes_per_token']:.3f}" in said
    # GPT-2's own recipe, as the library's class has it
    theirs = ByteLevelBPETokenizer()
    specials = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    theirs.train_from_iterator([files[1].read_text("utf-8")], 285, special_tokens=specials, show_progress=False)
    expected = len(text.encode()) / len(theirs.encode(text).ids)
    assert report["gpt2_bytes_per_token"] == pytest.approx(expected, rel=0.02)  # ties between pairs may differ
    lengths = [len(token) for token in report["longest"]]
    assert lengths == sorted(lengths, reverse=True)
    assert max(len(tokenizer.decode([i])) for i in range(4, 285)) == lengths[0]


def test_char(files, capsys):
    tokenizer, report, _, text = trained(files, "char", capsys)
    known = set(files[1].read_text("utf-8"))
    assert len(tokenizer) == len(known) + 5
    assert report["coverage"] == pytest.approx(sum(c in known for c in text) / len(text)) and report["coverage"] < 1
    assert report["bytes_per_token"] == pytest.approx(len(text.encode()) / len(text))
    assert not report["exact"]


def test_a_report_counted_by_hand():
    words = ["<unk>", "<eos>", "aaaa", "abab", "baba", "abcdef", "cc"]
    model = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", eos_token="<eos>")
    # 5 tokens, 20 bytes, 19 characters
    found = tokenizer_report.report(tokenizer, ["some text"], ["abab zü aaaa", "abab cc"], longest=2)
    assert found == tokenizer_report.TokenizerReport(
        tokens=7,
        bytes_per_token=20 / 5,
        gpt2_bytes_per_token=1.0,  # a vocabulary of 7 has no room for more than single bytes
        coverage=1 - 1 / 19,
        vocabulary_used=3 / 5,
        exact=False,
        longest=["abcdef", "abab"],
    )
    # without "aaaa" and "cc", which are runs of one character
    assert tokenizer_report.longest_tokens(tokenizer, 9) == ["abcdef", "abab", "baba"]
    assert tokenizer_report.report(tokenizer, [], ["abab cc"]).exact
    with pytest.raises(ValueError, match="no held-out text"):
        tokenizer_report.report(tokenizer, [], [""])


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_streamed_text_gives_the_same_tokenizer_and_report(files, capsys, tmp_path, kind):
    folders = [tmp_path / "whole", tmp_path / "streamed"]
    for folder, more in zip(folders, ([], ["--streaming"]), strict=True):
        flags = ["--train_file", str(files[1]), "--vocab_size", "285", "--tokenizer_type", kind]
        assert main(["tokenizer", *flags, "--output_dir", str(folder), *more]) == 0
    assert (folders[0] / "tokenizer.json").read_bytes() == (folders[1] / "tokenizer.json").read_bytes()
    one, other = (json.loads((folder / "tokenizer_report.json").read_text("utf-8")) for folder in folders)
    assert {key: value for key, value in one.items() if "runtime" not in key}.items() <= other.items()


@pytest.mark.process
def test_the_tokenizer_trains_a_model(files, capsys, run, tmp_path):
    trained(files, "bpe", capsys, "--vocab_size", "290", "--overwrite_output_dir", "true")
    flags = [*run.flags, "--tokenizer_name", str(files[0] / "bpe"), "--max_steps", "1"]
    assert main(["pretrain", *flags, "--output_dir", str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (files[0] / "bpe" / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--tokenizer_type", "words"], "'words'"),
        (["--vocab_size", "10"], "vocab_size 10"),
        (["--train_file", "nowhere.txt"], "nowhere.txt"),
        (["--train_file", "a.txt:0.5", "b.txt"], "b.txt has no weight"),
    ],
)
def test_bad_flags(fails, files, tmp_path, flags, reason):
    line = fails("tokenizer", "--train_file", str(files[1]), "--output_dir", str(tmp_path / "out"), *flags)
    assert reason in line
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(fails, files, tmp_path):
    (tmp_path / "mine.txt").touch()
    line = fails("tokenizer", "--train_file", str(files[1]), "--output_dir", str(tmp_path))
    assert "--overwrite_output_dir" in line and "--resume" not in line
