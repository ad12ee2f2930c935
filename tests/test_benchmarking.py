"""The benchmark compares before it times, counts what it says, and writes what it measured."""

import json

import pytest
import torch

from hf_decoder import benchmarking
from hf_decoder.benchmarking import Disagreement, Row, Setting
from hf_decoder.cli.main import main

SHAPE = {
    "vocab_size": 64,
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


def test_what_disagrees_is_not_timed(monkeypatch):
    real = benchmarking.twins

    def spoilt(setting, dtype):
        ours, stock = real(setting, dtype)
        with torch.no_grad():
            stock.model.norm.weight.mul_(2)
        return ours, stock

    monkeypatch.setattr(benchmarking, "twins", spoilt)
    monkeypatch.setattr(benchmarking, "alternate", lambda *args: pytest.fail("timed in spite of different results"))
    for suite in (
        benchmarking.measure_train(SETTING, batch_size=2, length=64),
        benchmarking.measure_packed(SETTING, documents=2, length=128),
        benchmarking.measure_prefill(SETTING),
        benchmarking.measure_load(SETTING),
    ):
        with pytest.raises(Disagreement):
            next(suite)


def test_calls_alternate_after_one_warm_up_each_and_the_median_counts(monkeypatch):
    calls, clock = [], iter([0.0, 5.0, 0.0, 1.0, 0.0, 3.0, 0.0, 1.0, 0.0, 4.0, 0.0, 1.0])
    monkeypatch.setattr(benchmarking.time, "perf_counter", lambda: next(clock))
    setting = Setting(SHAPE, repeats=3)
    found = benchmarking.alternate(lambda: calls.append("a"), lambda: calls.append("b"), setting)
    assert "".join(calls) == "ab" + "ab" * 3
    assert found == (4.0, 1.0)
    assert Row("suite", "case", *found).ratio == 0.25


@pytest.mark.parametrize(
    "suite", [benchmarking.measure_train, benchmarking.measure_packed, benchmarking.measure_generate]
)
def test_suites_run(suite):
    sizes = {"measure_train": {"batch_size": 2, "length": 64}, "measure_packed": {"documents": 2, "length": 128}}
    rows = list(suite(SETTING, **sizes.get(suite.__name__, {"prompt": 20, "new_tokens": 2})))
    assert rows and all(row.ours > 0 and row.stock > 0 for row in rows)


def test_command_writes_json_and_chart(tmp_path, capsys):
    flags = ["--preset", "nano", "--vocab_size", "300", "--repeats", "1", "--suites", "load"]
    files = ["--json", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "rows.png")]
    assert main(["benchmark", *flags, *files]) == 0
    assert "from_pretrained" in capsys.readouterr().out
    content = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [row["suite"] for row in content["rows"]] == ["load"] and content["facts"]["torch"] == torch.__version__
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "flags, reason",
    [
        (["--suites", "speed"], "suite 'speed' is unknown"),
        (["--dtype", "int8"], "--dtype int8"),
        (["--repeats", "0"], "--repeats 0"),
        (["--preset", "huge"], "preset 'huge' is unknown"),
    ],
)
def test_bad_flags_are_one_line(flags, reason, capsys):
    assert main(["benchmark", *flags]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert reason in line
