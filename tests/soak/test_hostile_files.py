"""Files of a stranger by the thousand: each is read, or refused in one line, in little time and memory."""

import contextlib
import gc
import json
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.cli import load_model, load_tokenizer
from hf_decoder.cli.main import main
from hf_decoder.evaluation.batch_generation import encode_prompt
from hf_decoder.interop.conversion import open_source
from hf_decoder.safety import limits

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
MOST_SECONDS, MOST_BYTES = 5.0, 256 << 20
NUMBERS = [0, 1, -1, -5, 255, 2**16, 2**31 - 1, 2**31, 2**32, 2**40, 2**63 - 1, 2**63, 2**64 - 1, 10**30]


class Tally:
    """Counts the outcomes for files of one kind."""

    def __init__(self) -> None:
        self.read = self.refused = 0
        self.slowest = 0.0

    @contextlib.contextmanager
    def one(self) -> Iterator[None]:
        """Runs one case: a file may be read or refused; anything else fails the test."""
        start = time.process_time()
        try:
            yield
        except ValueError as error:
            assert str(error) and "\n" not in str(error), repr(str(error))
            self.refused += 1
        else:
            self.read += 1
        self.slowest = max(self.slowest, time.process_time() - start)
        assert self.slowest < MOST_SECONDS

    def line(self, kind: str, memory: int) -> str:
        return (
            f"hostile {kind}: {self.read + self.refused:,} tried; {self.refused:,} refused in one line, {self.read:,} "
            f"read; 0 tracebacks, 0 hangs, slowest {self.slowest:.2f} s, peak memory +{memory / 1e6:,.0f} MB"
        )


def peak_bytes(*, forget: bool = False) -> int:
    """The peak memory of this process; `forget` resets it."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) << 10


@pytest.fixture
def memory():
    """Measures the peak memory that the test adds; beyond `MOST_BYTES` a MemoryError ends it."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    before = peak_bytes(forget=True)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MOST_BYTES, limits[1]))
    yield lambda: peak_bytes() - before
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "model"
    torch.manual_seed(0)
    HfDecoderForCausalLM(HfDecoderConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def mutated(choose: random.Random, whole: bytes, counts: Callable[[int], bytes]) -> bytes:
    """`whole` with some bytes changed, removed, repeated, or replaced by an extreme number."""
    data = bytearray(whole)
    for _ in range(choose.choice((1, 1, 1, 2, 5))):
        place = choose.randrange(len(data))
        kind = choose.randrange(5)
        if kind == 0:
            data[place] = choose.randrange(256)
        elif kind == 1:
            del data[place : place + choose.choice((1, 4, 8, len(data)))]
        elif kind == 2:
            data[place:place] = data[place : place + choose.randrange(1, 64)]
        else:
            number = counts(choose.choice(NUMBERS))
            data[place : place + len(number)] = number
        data = data or bytearray(b"\0")
    return bytes(data)


# ------------------------------------------------------------------------------------------------------- GGUF


def try_gguf(folder: Path, whole: bytes, cases: int, seed: int) -> Tally:
    choose, tally, path = random.Random(seed), Tally(), folder / "hostile.gguf"
    head = whole[: len(whole) - len(whole) // 2]

    def packed(number: int) -> bytes:
        return struct.pack("<Q", number % 2**64)[: choose.choice((4, 8))]

    for _ in range(cases):
        # what counts is at the beginning: mutate the head, leave the bytes of the tensors
        place = choose.randrange(1, len(head))
        start = choose.choice((0, place))
        changed = mutated(choose, whole[start : start + 4096], packed)
        path.write_bytes(whole[:start] + changed + whole[start + 4096 :])
        with tally.one():
            source = open_source(str(path))
            for tensor in source.tensors.values():
                tensor.load()
            source.write_tokenizer(folder / "tokenizer")
    return tally


@pytest.fixture(scope="module")
def gguf_file(saved, tmp_path_factory) -> bytes:
    pytest.importorskip("gguf")
    from hf_decoder.interop.conversion import convert

    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    convert(str(saved), path, to="gguf", outtype="q8_0")
    return path.read_bytes()


@pytest.mark.parametrize("cases", [60, pytest.param(2500, marks=pytest.mark.soak)])
def test_gguf(cases, tmp_path, gguf_file, memory, figures):
    tally = try_gguf(tmp_path, gguf_file, cases, seed=cases)
    assert tally.refused > cases // 10
    if cases > 1000:
        figures(tally.line("GGUF", memory()))


# ------------------------------------------------------------------------------------------- JSON and templates

JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
VALUES: list[Callable[[random.Random], object]] = [
    lambda choose: choose.choice(NUMBERS),
    lambda choose: choose.choice([float("nan"), float("inf"), -1e308, 1e-320, 0.0]),
    lambda choose: choose.choice(
        ["", "a" * 10_000, "../../etc/passwd", "\x1b]0;x\x07", "\u202e", "(a+)+$", "__class__"]
    ),
    lambda choose: [choose.choice(NUMBERS)] * choose.choice((0, 1, 1000)),
    lambda choose: {choose.choice(["a", "quant_method", "type", "0"]): choose.choice([None, "x", 10**9])},
    lambda choose: choose.choice([None, True, False, [], {}]),
]
NEW_KEYS = [
    *[
        "num_beams",
        "num_return_sequences",
        "quantization_config",
        "max_length",
        "cache_implementation",
        "stop_strings",
    ],
    *["auto_map", "chat_template", "normalizer", "pre_tokenizer", "added_tokens", "rope_parameters", "layer_types"],
    *["sliding_window", "tokenizer_class", "model_max_length", "id2label", "architectures", "dtype", "_name_or_path"],
]


def changed_json(choose: random.Random, values: object) -> str:
    """The JSON of `values` with one to three values, at any depth, replaced."""
    values = json.loads(json.dumps(values))
    for _ in range(choose.choice((1, 1, 2, 3))):
        place: Any = values
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = choose.choice(keys) if keys and choose.random() < 0.8 else choose.choice(NEW_KEYS)
            inner = place[key] if key in keys else None
            if not isinstance(inner, dict | list) or not inner or choose.random() < 0.4:
                break
            place = inner
        if isinstance(place, dict) or key in keys:
            place[key] = choose.choice(VALUES)(choose)
    return json.dumps(values)


def digits(number: int) -> bytes:
    return str(number).encode()


def run_command(tally: Tally, capsys: pytest.CaptureFixture[str], *argv: object) -> None:
    """Runs a command that must work, or end with one line and exit code 2."""
    with tally.one():
        code = main([str(word) for word in argv])
        said = capsys.readouterr().err
        assert code in (0, 2) and "Traceback" not in said
        if code:
            (line,) = [line for line in said.splitlines() if "error: " in line]
            raise ValueError(line)


@pytest.mark.parametrize("cases", [40, pytest.param(700, marks=pytest.mark.soak)])
def test_json(cases, tmp_path, saved, memory, figures, capsys):
    choose, tally = random.Random(cases), Tally()
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    whole = {name: (folder / name).read_bytes() for name in JSON_FILES}
    for number in range(cases):
        name = JSON_FILES[number % len(JSON_FILES)]
        if choose.random() < 0.3:
            data = mutated(choose, whole[name], digits)
        else:
            data = changed_json(choose, json.loads(whole[name])).encode()
        (folder / name).write_bytes(data)
        run_command(tally, capsys, "generate", folder, "the end", "--max_new_tokens", "2")
        (folder / name).write_bytes(whole[name])
    assert tally.refused > cases // 10
    if cases > 100:
        figures(tally.line("JSON", memory()))


@pytest.mark.parametrize("cases", [20, pytest.param(300, marks=pytest.mark.soak)])
def test_adapters(cases, tmp_path, saved, memory, figures, capsys, monkeypatch):
    from peft import LoraConfig, get_peft_model

    monkeypatch.setattr(limits, "SECONDS", 0.5)
    choose, tally, folder = random.Random(cases), Tally(), tmp_path / "adapter"
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"])
    get_peft_model(load_model(str(saved)), config).save_pretrained(folder)
    files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    whole = [path.read_bytes() for path in files]
    for number in range(cases):
        path, before = files[number % 4 == 3], whole[number % 4 == 3]
        if path.suffix == ".json":
            path.write_text(changed_json(choose, json.loads(before)))
        else:
            path.write_bytes(mutated(choose, before[:2000], digits) + before[2000:])
        run_command(tally, capsys, "generate", folder, "the end", "--max_new_tokens", "2")
        path.write_bytes(before)
    assert tally.refused > cases // 10
    if cases > 100:
        figures(tally.line("adapters", memory()))


PIECES = [
    "{% for i in range(99999) %}BODY{% endfor %}",
    "{% for m in messages %}BODY{{ m.content }}{% endfor %}",
    "{% set x = 'a' * N %}BODY",
    "{{ ('a' * N) | replace('a', 'aaaa') | upper }}BODY",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(N) }}BODY",
    "{{ N ** N }}BODY",
    "{{ (range(N) | list) * N }}BODY",
    "{{ '%Nd' % 1 }}BODY",
    "{{ 'a' | center(N) | length }}BODY",
    "{{ [N] * N | sum }}BODY",
    "{{ messages.__class__ }}BODY",
    "{{ cycler.__init__.__globals__ }}BODY",
    "{{ raise_exception('no\\nway') }}BODY",
    "{{ messages | tojson(indent=N) }}BODY",
    "{{ strftime_now('%Y' * N) }}BODY",
    "{% if N > 5 %}BODY{% endif %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(N) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}BODY",
    "{% include 'x' %}BODY",
    "{% generation %}BODY{% endgeneration %}",
    "text \x1b[2J\u202e BODY",
]


@pytest.mark.parametrize("cases", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_templates(cases, saved, memory, figures, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.3)
    monkeypatch.setattr(limits, "MEMORY_BYTES", 64 << 20)
    choose, tally, tokenizer = random.Random(cases), Tally(), load_tokenizer(str(saved))
    for _ in range(cases):
        template = "BODY"
        for _ in range(choose.randrange(1, 6)):
            piece = choose.choice(PIECES).replace("N", str(choose.choice([0, 1, 7, 60, 10**4, 10**9, 10**12])))
            template = template.replace("BODY", piece)
        if choose.random() < 0.2:
            template = mutated(choose, template.encode(), digits).decode("utf-8", "replace")
        tokenizer.chat_template = template
        with tally.one():
            encode_prompt(tokenizer, [{"role": "user", "content": "the end"}])
    assert tally.refused > cases // 10
    if cases > 100:
        figures(tally.line("templates", memory()))
