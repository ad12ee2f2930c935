"""Flags, config files, and the list of verbs."""

import importlib
import importlib.util
import os
import platform
import re
import subprocess
import sys
from dataclasses import MISSING, fields

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments

from hf_decoder import HfDecoderConfig
from hf_decoder.cli import parse_arguments, parse_overrides, pretrain
from hf_decoder.cli.arguments import RENAMED, Parser
from hf_decoder.cli.flags.pretrain import QUICKSTART_TIME_LIMIT
from hf_decoder.cli.main import VERBS, main
from hf_decoder.cli.pretrain import DataArguments, ModelArguments, PretrainingArguments
from hf_decoder.costs import accounting
from hf_decoder.costs.devices import cpu_features
from hf_decoder.costs.presets import PRESETS, Shape

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
    capsys.readouterr()
    assert main(["presets"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "KeyError" in line and "a bug of ours" in line and "HF_DECODER_TRACEBACK=1" in line
    monkeypatch.setenv("HF_DECODER_TRACEBACK", "1")
    with pytest.raises(KeyError):
        main(["presets"])


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("HF_DECODER_TRACEBACK", "1")
    with pytest.raises(ValueError, match="must be at least 1"):
        main(["presets", "--block_size", "0"])


def test_presets_prints_a_row_each(capsys):
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


LIGHT = sorted(set(VERBS) - {"serve", "pretrain", "finetune"})


def test_simple_answers_do_not_wait_for_torch(run_python):
    """Help of every verb, a missing argument, an unknown flag or verb, the version, the presets."""
    asked = [["--help"], ["--version"], ["pretrian"], ["presets"], ["eval"], ["compare", "a"], ["finetune"]]
    asked += [[verb, "--help"] for verb in VERBS if verb != "serve"]
    asked += [[verb, "--help-all"] for verb in LIGHT] + [[verb, "--no_such_flag"] for verb in LIGHT]
    asked += [["pretrain", "--max_steps", "many"], ["finetune", "--task", "nothing", "--train_file", "x"]]
    code = """
    import sys
    from hf_decoder.cli.main import main
    for argv in ASKED:
        try:
            main(argv)
        except SystemExit as end:
            assert end.code == 0
        heavy = {"torch", "transformers", "numpy", "datasets"} & set(sys.modules)
        assert not heavy, (argv, heavy)
    """
    run_python(code.replace("ASKED", repr(asked)))


def help_of(capsys, *argv: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(list(argv))
    assert end.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "serve"])
def test_help_names_each_flag_once_under_headings(verb, capsys):
    text = help_of(capsys, verb, "--help")
    flags = re.findall(r"^  (--[\w-]+)", text, flags=re.MULTILINE)
    assert len(flags) == len(set(flags)) <= 30 and not any("-" in flag[2:] for flag in flags)
    assert "(default: None)" not in text and "options:" not in text
    assert text.startswith(f"usage: hf-decoder {verb} ")
    assert max(map(len, text.splitlines())) <= 110 or "{" in text


def test_usage_is_as_one_types_it(capsys):
    first = {verb: help_of(capsys, verb, "--help").splitlines()[0] for verb in LIGHT}
    assert first["generate"] == "usage: hf-decoder generate MODEL [PROMPT] [options]"
    assert first["quantize"] == "usage: hf-decoder quantize MODEL --validation_file FILE [options]"
    assert first["compare"] == "usage: hf-decoder compare MODEL_A MODEL_B --input_file FILE [options]"
    assert first["doctor"] == "usage: hf-decoder doctor CHECKPOINT [options]"
    assert first["plan"] == "usage: hf-decoder plan [PRESET] [options]"


@pytest.mark.parametrize("verb", ["pretrain", "finetune"])
def test_the_help_before_the_imports_names_flags_that_there_are(verb, capsys):
    known = set(re.findall(r"^  (--\w+)", help_of(capsys, verb, "--help"), flags=re.MULTILINE))
    everything = re.findall(r"^  (--\w+)", help_of(capsys, verb, "--help-all"), flags=re.MULTILINE)
    assert len(everything) == len(set(everything)) > 100
    assert known <= set(everything) and 15 <= len(known) <= 30


@pytest.mark.parametrize("flag", ["--max_eval_samples", "--max-eval-samples"])
def test_both_spellings_of_a_flag_are_read(flag):
    assert parse(flag, "3")[1].max_eval_samples == parse(f"{flag}=3")[1].max_eval_samples == 3


@pytest.mark.process
@pytest.mark.parametrize("name", ["SFTConfig", "DPOConfig", "ModelConfig", "TrainingArguments"])
def test_flags_of_transformers_dataclasses_are_read_as_transformers_reads_them(name):
    """Its own HfArgumentParser on the same class is the oracle, field by field."""
    kind = TrainingArguments if name == "TrainingArguments" else getattr(pytest.importorskip("trl"), name)
    theirs, ours, compared = HfArgumentParser(kind), Parser("finetune", (kind,), ""), 0
    for action in theirs._actions:
        if action.nargs == 0:  # help, and the `--no_` of a boolean
            continue
        for word in ("1", "0.25", "true", "no", "some", '{"a": 1}', *map(str, action.choices or [])):
            argv = [f"--{action.dest}", word]
            try:
                expected = vars(theirs.parse_known_args(argv)[0])[action.dest]
            except SystemExit:
                continue
            assert ours.values(argv)[action.dest] == expected, argv
            compared += 1
    assert compared > 2 * len(fields(kind))


def test_booleans_with_and_without_a_value_and_turned_off():
    from hf_decoder.cli.flags.convert import ConvertArguments
    from hf_decoder.cli.flags.generate import GenerateArguments

    for words, expected in ((["--chat"], True), (["--chat", "false"], False), (["--no-chat"], False), ([], False)):
        (args,) = parse_arguments("generate", (GenerateArguments,), [*words, "model"])
        assert (args.chat, args.model_name_or_path) == (expected, "model")
    assert parse_arguments("convert", (ConvertArguments,), ["a", "b", "--no_verify"])[0].verify is False
    assert parse_arguments("generate", (GenerateArguments,), ["m", "--do_sample"])[0].do_sample is True


def test_positionals_stand_anywhere_and_a_prompt_may_begin_with_a_dash():
    from hf_decoder.cli.flags.doctor import DoctorArguments
    from hf_decoder.cli.flags.generate import GenerateArguments

    for words in (["m", "p", "--seed", "1"], ["--seed", "1", "m", "p"], ["m", "--seed", "1", "p"]):
        (args,) = parse_arguments("generate", (GenerateArguments,), words)
        assert (args.model_name_or_path, args.prompt, args.seed) == ("m", "p", 1)
    assert parse_arguments("generate", (GenerateArguments,), ["m", "- an item"])[0].prompt == "- an item"
    assert parse_arguments("generate", (GenerateArguments,), ["m", "--", "--dry"])[0].prompt == "--dry"
    assert parse_arguments("doctor", (DoctorArguments,), ["a", "b", "--quick"])[0].checkpoints == ["a", "b"]
    with pytest.raises(ValueError, match="unknown argument 'q'; usage: hf-decoder generate"):
        parse_arguments("generate", (GenerateArguments,), ["m", "p", "q"])


@pytest.mark.parametrize("verb, old", list(RENAMED))
def test_a_former_spelling_goes_on_with_a_line_that_says_so(verb, old, tmp_path, capsys):
    """As a flag, in either spelling, and as a key of a config file."""
    kinds = importlib.import_module(f"hf_decoder.cli.flags.{verb}").ARGUMENTS
    new = RENAMED[verb, old]
    value = "bpe" if new == "tokenizer_type" else "4"
    needed = [
        field.name for kind in kinds for field in fields(kind) if field.default is field.default_factory is MISSING
    ]
    others = [word for name in needed if name != new for word in (f"--{name}", "x")]
    assert old not in capsys.readouterr().out
    path = tmp_path / "run.yaml"
    path.write_text(f"{old}: {value}", encoding="utf-8")
    for argv in ([f"--{old}", value], [f"--{old.replace('_', '-')}={value}"], ["--config", str(path)]):
        parsed = parse_arguments(verb, kinds, [*argv, *others])
        (found,) = [getattr(args, new) for args in parsed if hasattr(args, new)]
        assert str(found) == value
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"hf-decoder {verb}: warning: --{old} is now --{new}")
    assert f"--{old} " not in help_of(capsys, verb, "--help-all")


@pytest.mark.parametrize(
    "typed, meant",
    [("--lr", "--learning_rate"), ("--epochs", "--num_train_epochs"), ("--max-step", "--max_steps"),
     ("--batch_size", "--per_device_train_batch_size"), ("--grad_clip", "--max_grad_norm"),
     ("--learning_rat", "--learning_rate")],
)  # fmt: skip
def test_an_unknown_flag_names_the_nearest(typed, meant):
    with pytest.raises(ValueError, match=rf"unknown argument '{typed}'.*'{meant}'"):
        parse(typed, "1")


@pytest.mark.parametrize(
    "line, reason",
    [
        ("max_steps: 3.5", "--max_steps: invalid int value: '3.5'"),
        ("preset: {hidden_size: 32}", "--preset does not take a mapping"),
        ("bf16: perhaps", "'perhaps' must be true or false"),
        ("tokenizer_type: words", "--tokenizer_type 'words' is unknown; choose one of: bpe, char"),
        ("max_steps: [1, 2]", "--max_steps does not take a list"),
    ],
)
def test_a_value_of_a_config_file_is_checked_as_that_of_a_flag(tmp_path, line, reason):
    path = tmp_path / "run.yaml"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"run\.yaml: {reason}|run\.yaml: .*{reason}"):
        parse(str(path))


@pytest.mark.parametrize(
    "line",
    [
        "max_steps: 3.5",
        "max_steps: true",
        "max_steps:",
        "max_steps: no",
        "max_steps: [3]",
        "max_steps: {a: 3}",
        "learning_rate: fast",
        "learning_rate: [0.1, 0.2]",
        "config_overrides: {hidden_size: 32}",
        "preset: true",
        "tokenizer_name: [a, b]",
        "bf16: perhaps",
        "bf16: {}",
        "bf16: 7",
        "logging_nan_inf_filter: cosin",
        "train_file: [a.txt, [b.txt]]",
        "train_file: []",
        "7: 3",
        "output_dir:",
    ],
)
def test_a_value_of_another_kind_is_refused_in_a_line(tmp_path, line):
    path = tmp_path / "run.yaml"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=r"run\.yaml|unknown"):
        parse(str(path))


def test_values_of_a_config_file_become_what_their_flags_give(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "max_steps: '7'\nlearning_rate: 1\nweight_decay: 1e-1\nbf16: 'no'\noutput_dir: 2024\n"
        "train_file: [1.txt, b.txt]\nresume_from_checkpoint: yes\nlr_scheduler_kwargs: '{\"num_decay_steps\": 1}'\n"
        "report_to: [none]\nconfig_overrides: no\n",
        encoding="utf-8",
    )
    model_args, data_args, args = parse(str(path))
    assert (args.max_steps, args.learning_rate, args.weight_decay) == (7, 1.0, 0.1)
    assert args.bf16 is False and args.output_dir == "2024" and args.resume_from_checkpoint
    assert data_args.train_file == ["1.txt", "b.txt"] and args.lr_scheduler_kwargs == {"num_decay_steps": 1}
    assert model_args.config_overrides is None and args.report_to == []


def command(*argv: str, **more) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen([sys.executable, "-m", "hf_decoder.cli.main", *argv], env=env, text=True, **more)


@pytest.mark.parametrize("argv", [["presets"], ["--help"], ["pretrain", "--help"]])
def test_nobody_who_reads_is_no_error(argv):
    """As of `hf-decoder presets | head -0`: no word, and the exit code of a Unix tool."""
    reader, writer = os.pipe()
    os.close(reader)
    process = command(*argv, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 141


def test_env_tells_what_a_bug_report_needs(capsys):
    assert main(["env"]) == 0
    facts = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert facts["torch"] == torch.__version__ and facts["python"].startswith(platform.python_version())
    assert {"processor", "memory", "threads", "device", "compiler", "transformers", "peft"} <= set(facts)
    assert set(cpu_features()) <= set(facts["processor"].split())


@pytest.mark.parametrize("name", list(PRESETS))
def test_what_presets_count_without_torch_is_what_the_model_has(name):
    config = HfDecoderConfig(vocab_size=1000, **PRESETS[name])
    shape = Shape.of(name, 1000)
    assert shape.num_parameters == accounting.num_parameters(config)
    for function, *more in ((accounting.flops_per_token, 512), (accounting.kv_bytes_per_token,),
                            (accounting.training_bytes, 2, 512), (accounting.serving_bytes, 512)):  # fmt: skip
        assert function(shape, *more) == function(config, *more)


def test_choices_of_flags_are_those_of_the_library():
    """They are written twice, because the library imports torch."""
    from hf_decoder.cli.flags import benchmark, convert, plan, tokenizer
    from hf_decoder.data import tokenization
    from hf_decoder.evaluation import benchmarking
    from hf_decoder.interop import gguf_write
    from hf_decoder.training import planning

    assert tokenizer.TOKENIZER_TYPES == tokenization.TOKENIZER_TYPES
    assert convert.OUTTYPES == gguf_write.OUTTYPES
    assert tuple(benchmarking.SUITES) == benchmark.SUITES
    assert ("auto", *planning.STRATEGIES) == plan.STRATEGIES
