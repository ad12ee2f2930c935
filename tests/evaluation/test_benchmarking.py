"""The benchmark compares before it times, counts correctly, and writes what it measured."""

import functools
import importlib.util
import json
import types
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_decoder.cli.main import main
from hf_decoder.engine.decoding.cpp_step import CppStep
from hf_decoder.evaluation import benchmarking
from hf_decoder.evaluation.benchmarking import Disagreement, Row, Setting

SHAPE = {
    "vocab_size": 320,  # llama.cpp, where it is installed, takes no tokenizer that is smaller
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}
SETTING = Setting(SHAPE, dtype=torch.float32, repeats=1)


def test_twins_have_the_same_weights_and_logits():
    ours, stock = benchmarking.twins(SETTING, torch.float32)
    ids = torch.randint(64, (2, 9))
    torch.testing.assert_close(ours(ids).logits, stock(ids).logits, atol=1e-5, rtol=0)


def test_flops_are_those_of_the_products_that_need_be_formed():
    """Torch's counter is the oracle; it sees documents of 32 tokens as rows."""
    ids = torch.randint(64, (2, 128))
    masked = ids.clone()
    masked[:, 1:100] = -100
    counted, told = [], []
    for labels in (ids, masked):
        model, inputs = benchmarking.twins(SETTING, torch.float32)[0], {"input_ids": ids, "labels": labels}
        model.set_attn_implementation("eager")  # torch counts nothing of its kernel on a CPU
        with FlopCounterMode(display=False) as counter:
            model(**inputs, use_cache=False).loss.backward()
        counted.append(counter.get_total_flops())
        told.append(benchmarking.training_flops(SETTING, inputs))
    assert told[0] - told[1] == counted[0] - counted[1]
    assert told[0] == pytest.approx(counted[0], rel=0.1)
    positions = (torch.arange(128) % 32).expand(2, -1)
    packed = {"input_ids": ids, "labels": ids, "position_ids": positions}
    rows = {"input_ids": ids.view(8, 32), "labels": ids.view(8, 32)}
    assert benchmarking.training_flops(SETTING, packed) == benchmarking.training_flops(SETTING, rows) < told[0]


@pytest.mark.peers
def test_what_disagrees_is_not_timed(monkeypatch):
    real = benchmarking.twins

    def spoilt(setting, dtype):
        ours, stock = real(setting, dtype)
        with torch.no_grad():
            stock.model.norm.weight.neg_()
        return ours, stock

    monkeypatch.setattr(benchmarking, "twins", spoilt)
    monkeypatch.setattr(benchmarking, "alternate", lambda *args: pytest.fail("timed in spite of different results"))
    for suite in (
        benchmarking.measure_train(SETTING, batch_size=4, length=64),
        benchmarking.measure_packed(SETTING, documents=2, length=128),
        benchmarking.measure_prefill(SETTING),
        benchmarking.measure_load(SETTING),
        benchmarking.measure_generate(SETTING, prompt=20, lengths=(4,)),
        benchmarking.measure_batch(SETTING, prompt=20, new_tokens=4),
    ):
        with pytest.raises(Disagreement):
            next(suite)


@pytest.mark.peers
@torch.no_grad()
def test_a_first_token_that_disagrees_is_not_timed(monkeypatch):
    real = benchmarking.twins
    monkeypatch.setattr(benchmarking, "alternate", lambda setting, *calls: (1.0,) * len(calls))
    rows = list(benchmarking.measure_prefill(SETTING))
    assert [row.case.partition(",")[0] for row in rows[3:]] == ["first token of generate"] * 3

    def spoilt(setting, dtype):
        ours, stock = real(setting, dtype)
        ours.generate = lambda ids, **settings: torch.cat((ids, stock(ids).logits[:, -1:].argmin(-1)), 1)
        return ours, stock

    monkeypatch.setattr(benchmarking, "twins", spoilt)
    suite = benchmarking.measure_prefill(SETTING)
    assert [next(suite).case for _ in range(3)] == [row.case for row in rows[:3]]
    with pytest.raises(Disagreement, match="first token of generate, 8"):
        next(suite)


@torch.no_grad()
def test_greedy_text_may_break_ties_within_the_rounding_of_the_stock_model():
    _, stock = benchmarking.twins(SETTING, torch.bfloat16)
    ids = torch.randint(1, 320, (1, 9))
    mask = torch.ones_like(ids)
    top = stock(ids).logits[0, -1].topk(320)
    for place in (0, 1, 100):
        text = torch.cat((ids, top.indices[None, place : place + 1]), 1)
        below = (top.values[0] - top.values[place]).item()
        for noise in (0.0, 0.6 * below):  # twice that is enough
            exact = functools.partial(_off_by, noise, stock)
            is_tie = below <= max(2 * noise, 0.1 * top.values.float().std().item())
            if is_tie:
                benchmarking.check_greedy(stock, text, mask, "text", exact)
            else:
                with pytest.raises(Disagreement):
                    benchmarking.check_greedy(stock, text, mask, "text", exact)


def _off_by(noise, stock, **inputs):
    """A model that differs from the stock one by so much."""
    logits = stock(**inputs).logits.float()
    logits[..., 0] += noise
    return types.SimpleNamespace(logits=logits)


def test_calls_alternate_after_one_warm_up_each_and_the_median_counts(monkeypatch):
    calls, clock = [], iter([0.0, 5.0, 0.0, 1.0, 0.0, 1.0, 0.0, 3.0, 0.0, 4.0, 0.0, 1.0])
    monkeypatch.setattr(benchmarking.time, "perf_counter", lambda: next(clock))
    setting = Setting(SHAPE, repeats=3)
    found = benchmarking.alternate(setting, lambda: calls.append("a"), lambda: calls.append("b"))
    assert "".join(calls) == "ab" + "ab" + "ba" + "ab"  # neither always follows the same one
    assert found == (4.0, 1.0)
    assert Row("suite", "case", *found).ratio == 0.25


@pytest.mark.peers
@pytest.mark.parametrize(
    "suite, sizes, cases",
    [
        (benchmarking.measure_train, {"batch_size": 4, "length": 64}, 5),
        (benchmarking.measure_packed, {"documents": 2, "length": 128}, 1),
        (benchmarking.measure_generate, {"prompt": 20, "lengths": (2, 3)}, 6),
        (benchmarking.measure_batch, {"prompt": 20, "new_tokens": 3}, 2),
    ],
)
def test_suites_run(suite, sizes, cases, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    steps = []
    greedy = CppStep.greedy
    monkeypatch.setattr(CppStep, "greedy", lambda self, *inputs: steps.append(1) or greedy(self, *inputs))
    rows = list(suite(SETTING, **sizes))
    assert len({row.case for row in rows}) == cases and all(row.ours > 0 and row.stock > 0 for row in rows)
    if "new_tokens" in sizes or "lengths" in sizes:
        assert steps and all(row.limit == "read" for row in rows)


def test_peak_memory_is_that_of_the_call():
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("only Linux tells the peak of a process anew")
    size = 200 * 2**20
    taken = benchmarking.peak_bytes(lambda: torch.ones(size, dtype=torch.uint8), "cpu")
    assert 0.95 * size < taken < 1.1 * size
    assert benchmarking.peak_bytes(lambda: None, "cpu") < 0.1 * size  # an earlier peak does not count


# A stand-in with the calls of llama-cpp-python, which is built from source and not installed here.
LLAMA_CPP = """
import os, signal, sys, time
from pathlib import Path

class Llama:
    def __init__(self, path, n_ctx, n_threads, n_threads_batch, verbose):
        assert Path(path).read_bytes()[:4] == b"GGUF"
        self.fail("load")
        self.calls = []

    def fail(self, where):
        print("llama.cpp says", where, flush=True)
        if where == {where!r}:
            {what}

    def reset(self):
        self.calls = []

    def eval(self, tokens):
        self.calls.append(len(tokens))
        time.sleep(0.01)

    def sample(self, temp, top_k):
        if len(self.calls) == 3:
            self.fail("decode")
            assert self.calls == [20, 1, 1]
        return 5
"""
FAULTS = {
    "segfault": ("os.kill(os.getpid(), signal.SIGSEGV)", "ended the process: SIGSEGV (llama.cpp says {where})"),
    "exit": ("os._exit(3)", "ended the process: exit code 3 (llama.cpp says {where})"),
    "error": ("raise RuntimeError('no such\\nkernel')", "RuntimeError: no such kernel"),
    "hang": ("time.sleep(1000)", "took more than 8 s"),
}
PEER_SETTING = Setting({**SHAPE, "vocab_size": 400, "hidden_size": 64}, dtype=torch.float32, repeats=1, peer_timeout=8)


@pytest.fixture
def llama_cpp(tmp_path, monkeypatch):
    """Makes a llama_cpp that can be imported, and that does `what` when it loads or decodes."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torchao" else find(name))

    def write(where="", what="pass"):
        (tmp_path / "llama_cpp.py").write_text(LLAMA_CPP.format(where=where, what=what))

    return write


def test_llama_cpp_decodes_the_same_weights_and_measures_itself(llama_cpp, capfd):
    llama_cpp()
    rows = list(benchmarking.measure_generate(PEER_SETTING, prompt=20, lengths=(3,)))
    assert len(rows) == 2 and all(0.03 <= row.llama_cpp < 2 and not row.text for row in rows)
    assert "llama.cpp says" not in "".join(capfd.readouterr())


@pytest.mark.peers
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("where", ["load", "decode"])
def test_a_peer_that_fails_is_a_row_that_says_so(fault, where, llama_cpp):
    what, said = FAULTS[fault]
    llama_cpp(where, what)
    rows = list(benchmarking.measure_generate(PEER_SETTING, prompt=20, lengths=(3,)))
    assert len(rows) == 2 and all(row.llama_cpp is None and row.ours > 0 and row.stock > 0 for row in rows)
    assert all(row.text.startswith("llama.cpp: ") and said.format(where=where) in row.text for row in rows)


def test_a_shape_that_the_peer_cannot_have_is_a_row_that_says_so(llama_cpp):
    llama_cpp()
    setting = Setting({**PEER_SETTING.shape, "vocab_size": 200}, dtype=torch.float32, repeats=1)
    rows = list(benchmarking.measure_generate(setting, prompt=20, lengths=(3,)))
    assert len(rows) == 2 and all("llama.cpp: the tokenizer has ids up to" in row.text for row in rows)


def test_command_writes_json_and_chart(tmp_path, capsys):
    flags = ["--preset", "nano", "--vocab_size", "300", "--repeats", "1", "--suites", "load"]
    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "rows.png")]
    assert main(["benchmark", *flags, *files]) == 0
    assert "from_pretrained" in capsys.readouterr().out
    content = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert content["rows"][0]["text"] == ""
    assert [row["suite"] for row in content["rows"]] == ["load"] and content["facts"]["torch"] == torch.__version__
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_what_happened_to_the_peer_stands_in_the_table(monkeypatch, capsys):
    row = Row("generate", "1 x 64 tokens", 1.0, 2.0, text="llama.cpp: decoding ended the process: SIGSEGV")
    monkeypatch.setattr("hf_decoder.cli.benchmark.SUITES", {"generate": lambda setting: [row]})
    assert main(["benchmark", "--suites", "generate", "--preset", "nano"]) == 0
    assert row.text in capsys.readouterr().out


@pytest.mark.parametrize("supported, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_half_precision_is_measured_where_the_hardware_multiplies_it(supported, dtype, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr("hf_decoder.cli.benchmark.bf16_supported", lambda: supported)
    monkeypatch.setattr("hf_decoder.cli.benchmark.SUITES", {"load": lambda setting: seen.append(setting.dtype) or ()})
    assert main(["benchmark", "--suites", "load", "--preset", "nano"]) == 0
    assert seen == [dtype] and str(dtype).removeprefix("torch.") in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--suites", "speed"], "suite 'speed' is unknown"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--repeats", "0"], "--repeats 0"),
        (["--preset", "huge"], "preset 'huge' is unknown"),
        (["--config_overrides", "z_loss_coef=1"], "'z_loss_coef', which the stock class"),
    ],
)
def test_bad_flags_are_one_line(flags, reason, capsys):
    assert main(["benchmark", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert reason in line
