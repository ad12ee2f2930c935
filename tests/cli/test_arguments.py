"""Flags, config files, and the list of verbs."""

import importlib
import importlib.util

import pytest

from hf_decoder.cli import parse_arguments, parse_overrides, pretrain
from hf_decoder.cli.flags.pretrain import QUICKSTART_TIME_LIMIT
from hf_decoder.cli.main import VERBS, main
from hf_decoder.cli.pretrain import DataArguments, ModelArguments, PretrainingArguments

CONFIG = """
preset: tiny
train_file: some.txt
learning_rate: 1e-3
bf16: false
max_steps: 7
lr_scheduler_kwargs: {num_decay_steps: 3}
"""


def parse(*argv: str):
    return parse_arguments("pretrain", (ModelArguments, DataArguments, PretrainingArguments), argv, "")


@pytest.mark.parametrize("form", ["--config {}", "--config={}", "{}"])
@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_config_file_is_read_and_flags_override_it(tmp_path, form, suffix):
    path = tmp_path / f"run{suffix}"
    text = CONFIG if suffix == ".yaml" else '{"preset": "tiny", "learning_rate": 0.001, "max_steps": 7, "bf16": false}'
    path.write_text(text, encoding="utf-8")
    model_args, data_args, args = parse(*form.format(path).split(), "--max_steps", "9")
    assert model_args.preset == "tiny"
    assert args.learning_rate == 1e-3
    assert args.bf16 is False
    assert args.max_steps == 9
    if suffix == ".yaml":
        assert data_args.train_file in ("some.txt", ["some.txt"])
        assert args.lr_scheduler_kwargs == {"num_decay_steps": 3}


def test_config_file_with_an_unknown_key_says_which(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lerning_rate: 1", encoding="utf-8")
    with pytest.raises(ValueError, match=r"'lerning_rate'.*'learning_rate'"):
        parse(str(path))


@pytest.mark.parametrize("text", ["- a list", "a: [unclosed", "just words"])
def test_config_file_that_is_none(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"run\.yaml"):
        parse(str(path))


@pytest.mark.parametrize("suffix", [".yaml", ".json"])
def test_a_bare_no_in_a_config_file_is_a_strategy(tmp_path, suffix):
    path = tmp_path / f"run{suffix}"
    text = '{"eval_strategy": "no", "save_strategy": "no", "bf16": false}'
    path.write_text(
        "eval_strategy: no\nsave_strategy: no\nbf16: no\n" if suffix == ".yaml" else text, encoding="utf-8"
    )
    _, _, args = parse(str(path))
    assert args.eval_strategy == "no" and args.save_strategy == "no" and args.bf16 is False


def test_a_value_that_is_no_json_is_named_with_its_flag(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("lr_scheduler_kwargs: '{bad'", encoding="utf-8")
    for argv in ([str(path)], ["--lr_scheduler_kwargs", "{bad"]):
        with pytest.raises(ValueError, match=r"--lr_scheduler_kwargs \{bad is not valid JSON"):
            parse(*argv)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_deepspeed_that_is_not_installed_is_asked_for(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("deepspeed: zero3.json", encoding="utf-8")
    for argv in ([str(path)], ["--deepspeed", "zero3.json"]):
        with pytest.raises(ValueError, match=r"--deepspeed needs .* pip install deepspeed"):
            parse(*argv)
    path.write_text("deepspeed: no", encoding="utf-8")
    assert not parse(str(path))[2].deepspeed


def test_overrides_are_json_or_words():
    text = "hidden_size=64,rms_norm_eps=1e-5,qk_norm=True,hidden_act=gelu,attention_bias=qkv,sliding_window=null"
    assert parse_overrides(text) == {
        "hidden_size": 64,
        "rms_norm_eps": 1e-5,
        "qk_norm": True,
        "hidden_act": "gelu",
        "attention_bias": "qkv",
        "sliding_window": None,
    }
    nested = (
        'rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, layer_types=["full_attention"]'
    )
    assert parse_overrides(nested) == {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        "layer_types": ["full_attention"],
    }
    assert parse_overrides(None) == {}


def test_every_verb_is_there_and_has_help(capsys):
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for verb in VERBS:
        assert f"  {verb} " in listed
        with pytest.raises(SystemExit) as end:
            main([verb, "--help"])
        assert end.value.code == 0
        assert f"hf-decoder {verb}" in capsys.readouterr().out
        assert importlib.import_module(f"hf_decoder.cli.{verb}").main


def test_no_verb_and_unknown_verb_list_the_verbs(capsys):
    assert main([]) == 2
    assert main(["pretrian"]) == 2
    error = capsys.readouterr().err
    assert "'pretrian'" in error and "pretrain" in error


def test_interrupt_is_130_and_a_bug_is_not_hidden(monkeypatch, capsys):
    module = importlib.import_module("hf_decoder.cli.presets")

    def interrupted(args):
        raise KeyboardInterrupt

    def broken(args):
        raise KeyError("a bug of ours")

    monkeypatch.setattr(module, "main", interrupted)
    assert main(["presets"]) == 130
    monkeypatch.setattr(module, "main", broken)
    with pytest.raises(KeyError):
        main(["presets"])


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("HF_DECODER_TRACEBACK", "1")
    with pytest.raises(ValueError, match="must be positive"):
        main(["presets", "--block_size", "0"])


def test_presets_prints_a_row_each(capsys):
    from hf_decoder.presets import PRESETS

    assert main(["presets", "--vocab_size", "4096"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows[1 : 1 + len(PRESETS)]] == list(PRESETS)


def test_only_the_run_without_arguments_has_a_time_limit(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(pretrain, "pretrain", lambda model_args, data_args, args: seen.append(args.time_limit) or 0)
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain"]) == 0
    assert main(["pretrain", "--output_dir", str(tmp_path / "other")]) == 0
    assert seen == [QUICKSTART_TIME_LIMIT, None]
