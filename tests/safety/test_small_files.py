"""Small files that ask for much: sizes, templates, adapters, lying headers, bombs. Each is refused in one line."""

import gzip
import json
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from json_files import change
from transformers import (
    AutoModelForCausalLM,
)

from hf_decoder.cli.main import main
from hf_decoder.publishing.files import files_to_push
from hf_decoder.safety import limits


@pytest.fixture
def little_memory():
    """Limits the test to 512 MiB more than the process holds; beyond it, a MemoryError ends the test."""
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + (512 << 20), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def refused(capsys, *argv: object) -> str:
    """Runs a command that must fail with exit code 2; returns its one line."""
    assert main([str(word) for word in argv]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    (line,) = [line for line in said.splitlines() if "error: " in line]  # beside progress bars
    return line


TEXTS = {
    "deep": ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    "deep objects": ('{"a":' * 500 + "1" + "}" * 500, "nested too deeply"),
    "list": ("[]", "a list, not an object"),
    "number": ("5", "a int, not an object"),
    "no number": ('{"model_type": "llama", "rms_norm_eps": NaN}', "rms_norm_eps=nan is not a finite"),
    "infinite": ('{"model_type": "llama", "a": [{"b": -Infinity}]}', "b=-inf is not a finite"),
    "overflowing": ('{"model_type": "llama", "rms_norm_eps": 1e999}', "rms_norm_eps=inf is not a finite"),
    "twice": ('{"model_type": "llama", "model_type": "gpt2"}', "the key 'model_type' occurs twice"),
    "not UTF-8": (b'{"model_type": "\xff\xfe"}', "is damaged"),
    "digits": ('{"model_type": "llama", "hidden_size": 1' + "0" * 5000 + "}", "is damaged"),
    "large": ('{"model_type": "llama", "hidden_size": 1' + "0" * 30 + "}", "hidden_size=1e+30"),
}


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json"])
@pytest.mark.parametrize(("text", "why"), TEXTS.values(), ids=TEXTS)
def test_json_that_no_model_has_is_one_line(copy, capsys, file, text, why):
    if why.startswith("hidden_size") and "tokenizer" in file:
        pytest.skip("model_max_length of a tokenizer is as large where there is no limit")
    (copy / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused(capsys, "generate", copy, "the end")
    assert why in line and file in line


ASKED = {
    "beams": ("generation_config.json", {"num_beams": 10**6}),
    "returned": ("generation_config.json", {"num_return_sequences": 10**6}),
    "beams of the config": ("config.json", {"num_beams": 10**6}),
    "lookup": ("generation_config.json", {"prompt_lookup_num_tokens": 10**9}),
    "lengths": ("generation_config.json", {"max_new_tokens": 10**15}),
    "a word": ("generation_config.json", {"num_beams": "many"}),
    "another word": ("generation_config.json", {"do_sample": True, "temperature": "hot"}),
    "no id": ("generation_config.json", {"eos_token_id": [0, "end"]}),
    "quantization list": ("config.json", {"quantization_config": ["gptq"]}),
    "quantization text": ("config.json", {"quantization_config": "bitsandbytes"}),
    "quantization bits": ("config.json", {"quantization_config": {"quant_method": "gptq", "bits": 10**12}}),
    "quantization nothing": ("config.json", {"quantization_config": {"load_in_4bit": "perhaps"}}),
    "template": ("tokenizer_config.json", {"chat_template": 5}),
    "templates": ("tokenizer_config.json", {"chat_template": [{"name": "default"}]}),
    "decoder": ("tokenizer_config.json", {"added_tokens_decoder": {str(i): {} for i in range(300_000)}}),
    "added": ("tokenizer.json", {"added_tokens": [{}] * 300_000}),
    "growing": (
        "tokenizer.json",
        {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}] * 10,
            }
        },
    ),
    "labels": ("config.json", {"id2label": 5}),
    "types": ("config.json", {"architectures": 7}),
    "kind": ("config.json", {"model_type": ["llama"]}),
}


@pytest.mark.process
@pytest.mark.parametrize(("file", "values"), ASKED.values(), ids=ASKED)
def test_what_small_files_ask_for_is_refused_before_it_is_made(copy, capsys, little_memory, alone, file, values):
    change(copy / file, **values)
    (copy / "text.txt").write_text("the end of the text\n" * 50, encoding="utf-8")
    refused(capsys, "generate", copy, "the end")
    refused(capsys, "eval", copy, "--text_file", copy / "text.txt", "--output_dir", copy.parent / "eval")
    assert main(["doctor", str(copy), "--quick"]) in (1, 2)
    shown = capsys.readouterr()
    assert "Traceback" not in shown.out + shown.err
    if file == "generation_config.json":
        refused(capsys, "convert", copy, copy.parent / "result", "--to", "llama")


@pytest.fixture
def from_the_hub(tmp_path, monkeypatch):
    """Puts a folder into the cache of the Hub's client; returns its name there."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    def put(folder: Path) -> str:
        cache = tmp_path / "cache" / f"models--somebody--{folder.name}"
        (cache / "refs").mkdir(parents=True)
        (cache / "refs" / "main").write_text("0" * 40)
        shutil.copytree(folder, cache / "snapshots" / ("0" * 40))
        return f"somebody/{folder.name}"

    return put


def test_a_name_of_the_hub_is_looked_into_as_a_folder_is(copy, capsys, from_the_hub):
    change(copy / "generation_config.json", num_beams=10**6)
    assert from_the_hub(copy) == "somebody/model"
    assert "num_beams=1000000" in refused(capsys, "generate", "somebody/model", "the end")


TEMPLATES = {
    "endless": ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "seconds"),
    "macros": (
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "seconds",
    ),
    "swallowed": ("{% include 'x' %}{{ 1000000000000 ** 1000000000000 }}", "was stopped"),
    "huge": ("{{ 'a' * 10 ** 11 }}", "memory"),
    "format": ("{{ '%99999999999d' % 1 }}", "memory"),
    "doubled": (
        "{% set n = namespace(x='12345678') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        "was stopped",
    ),
    "joined": ("{{ (['a' * 99999] * 99999) | join }}", "was stopped"),
    "long": ("{{ 'a' * 3999999 }}", "characters"),
    "recursive": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "nested": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion"),
    "syntax": ("{% for %}", "Expected an expression"),
    "undefined": ("{{ nothing.at.all }}", "undefined"),
    "division": ("{{ 1 / 0 }}", "division"),
    "escape": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
}


@pytest.mark.process
@pytest.mark.parametrize(("template", "why"), TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_has_its_limits(copy, capsys, little_memory, monkeypatch, template, why):
    monkeypatch.setattr(limits, "SECONDS", 2.0)
    monkeypatch.setattr(limits, "MEMORY_BYTES", 128 << 20)
    (copy / "chat_template.jinja").write_text(template, encoding="utf-8")
    start = time.monotonic()
    (copy.parent / "prompts.txt").write_text("hello\n", encoding="utf-8")
    flags = ("--chat", "--input_file", copy.parent / "prompts.txt", "--output_file", copy.parent / "answers.jsonl")
    line = refused(capsys, "generate", copy, *flags)
    assert "chat template" in line and why in line and time.monotonic() - start < 60
    assert main(["doctor", str(copy), "--rows", "chat_template"]) == 1


def test_the_limits_leave_others_their_own(monkeypatch):
    """An earlier timer and memory limit are restored."""
    handler, memory = signal.getsignal(signal.SIGALRM), resource.getrlimit(resource.RLIMIT_AS)
    before = signal.getitimer(signal.ITIMER_REAL)
    monkeypatch.setattr(limits, "SECONDS", 0.1)
    with pytest.raises(ValueError, match="it takes more than"), limits.bounded("it"):
        while True:
            pass
    assert signal.getsignal(signal.SIGALRM) is handler and resource.getrlimit(resource.RLIMIT_AS) == memory
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (before[0] > 0)


def test_an_expression_of_the_config_has_its_limit(copy, capsys, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    change(copy / "config.json", base_model_tp_plan={r"([\w.]|[\w.]|[\w.])*-.x": "colwise"})
    assert main(["doctor", str(copy), "--rows", "backends"]) in (1, 2)
    assert "takes more than" in capsys.readouterr().out


def test_a_card_is_read_once(copy):
    head = "---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\npipeline(\n"
    (copy / "README.md").write_text(head + "](" * 100_000 + "<img " * 100_000, encoding="utf-8")
    start = time.monotonic()
    main(["doctor", str(copy), "--rows", "card"])
    files_to_push(copy)
    assert time.monotonic() - start < 10


# ---------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def adapter(saved, tmp_path) -> Path:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(saved), config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


ADAPTERS = {
    "rank": ({"r": 200_000}, "r=200,000"),
    "rank of a module": ({"rank_pattern": {"q_proj": 10**6}}, "q_proj"),
    "virtual tokens": ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 10**9}, "num_virtual_tokens"),
    "more than there is": ({"r": 10**30}, "r=1e+30"),
    "replicated": ({"layer_replication": [[0, 10**9]]}, "layer_replication"),
    "replicated often": ({"layer_replication": [[0, 1]] * 10**5}, "layer_replication"),
    "replicated nonsense": ({"layer_replication": [5]}, "layer_replication"),
    "imported": ({"megatron_config": {"a": 1}, "megatron_core": "evil"}, "megatron_config"),
    "expression": ({"target_modules": r"(.|.|.)*(.|.|.)*(.|.|.)*x"}, "takes more than"),
    "no expression": ({"target_modules": "("}, "invalid expression"),
    "pattern": ({"alpha_pattern": {r"(.|.|.)*(.|.|.)*x": 1}}, "takes more than"),
    "kind": ({"peft_type": "EVIL"}, "EVIL"),
    "kinds": ({"peft_type": ["LORA"]}, "adapter"),
    "target": ({"target_modules": 5}, "adapter"),
    "loftq": ({"loftq_config": 5, "init_lora_weights": "loftq"}, "adapter"),
}


@pytest.mark.parametrize(("values", "why"), ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_takes_no_more_than_its_weights(saved, adapter, capsys, monkeypatch, little_memory, values, why):
    monkeypatch.setattr(limits, "SECONDS", 0.5)
    (adapter.parent / "evil.py").write_text("raise SystemExit('was run')", encoding="utf-8")
    monkeypatch.syspath_prepend(adapter.parent)
    change(adapter / "adapter_config.json", **values)
    assert why in refused(capsys, "generate", saved, "the end", "--adapter_name_or_path", adapter)
    assert why in refused(capsys, "generate", adapter, "the end")
    assert "evil" not in sys.modules


def test_an_adapter_of_the_hub_is_looked_into_as_a_folder_is(saved, adapter, capsys, little_memory, from_the_hub):
    argv = ["generate", saved, "the end", "--max_new_tokens", "2", "--adapter_name_or_path", from_the_hub(adapter)]
    assert main([str(word) for word in argv]) == 0
    change(adapter / "adapter_config.json", r=200_000)
    argv[-1] = from_the_hub(adapter.rename(adapter.with_name("other")))
    assert "r=200,000" in refused(capsys, *argv)


@pytest.mark.parametrize("damage", ["offsets", "shape", "negative", "length", "type", "overlap", "dimensions"])
def test_headers_that_lie_are_one_line(saved, copy, adapter, capsys, little_memory, damage):
    for path, argv in (
        (copy / "model.safetensors", ["generate", copy, "the end"]),
        (adapter / "adapter_model.safetensors", ["generate", adapter, "the end"]),
    ):
        whole = path.read_bytes()
        length = int.from_bytes(whole[:8], "little")
        header = json.loads(whole[8 : 8 + length])
        entry = header[next(name for name in header if name != "__metadata__")]
        start, end = entry["data_offsets"]
        entry.update(
            {
                "offsets": {"data_offsets": [start, 2**62]},
                "shape": {"shape": [2**40, 2**30]},
                "negative": {"shape": [-1, 5]},
                "length": {},
                "type": {"dtype": "OBJECT"},
                "overlap": {"data_offsets": [start + 4, end + 4]},
                "dimensions": {"shape": [1] * 10_000},
            }[damage]
        )
        text = json.dumps(header).encode()
        size = 2**63 if damage == "length" else len(text)
        path.write_bytes(size.to_bytes(8, "little") + text + whole[8 + length :])
        refused(capsys, *argv)


# --------------------------------------------------------------------------------------------- data files


@pytest.mark.parametrize("name", ["bomb.txt.gz", "bomb.jsonl.gz", "bomb.csv.gz"])
def test_a_gzip_bomb_is_not_unpacked(copy, capsys, little_memory, tmp_path, monkeypatch, name):
    line = b'{"text": "aaaaaaaa"}\n' if "json" in name else b"text\n" * 20
    with gzip.open(tmp_path / name, "wb") as file:
        for _ in range(64):
            file.write(line * ((1 << 20) // len(line)))
    said = refused(
        capsys,
        "eval",
        copy,
        "--text_file",
        tmp_path / name,
        "--output_dir",
        tmp_path / "eval",
        "--metrics",
        "perplexity",
    )
    assert "unpacks to more than" in said and name in said


@pytest.mark.parametrize("kind", ["rows", "items"])
def test_a_parquet_file_of_one_row_a_billion_times_is_not_read(copy, capsys, little_memory, tmp_path, kind):
    import pyarrow
    import pyarrow.parquet

    words = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 10**6, pyarrow.int32()), ["the end"])
    if kind == "items":  # of a list, in one row
        words = pyarrow.ListArray.from_arrays(pyarrow.array([0, len(words)], pyarrow.int32()), words.cast("string"))
    table = pyarrow.table({"text": words, "prompt": words})
    with pyarrow.parquet.ParquetWriter(tmp_path / "bomb.parquet", table.schema, compression="zstd") as writer:
        for _ in range(20):
            writer.write_table(table)
    bomb, out = tmp_path / "bomb.parquet", ("--output_dir", tmp_path / "out")
    for argv in (
        ("eval", copy, "--text_file", bomb, *out),
        ("eval", copy, "--test_file", bomb, "--metrics", "exact_match", *out),
        ("generate", copy, "--input_file", bomb, "--output_file", tmp_path / "answers.jsonl"),
        ("finetune", copy, "--train_file", bomb, *out),
    ):
        assert "20,000,000 rows" in refused(capsys, *argv)
