"""Each way of training wrong is caught by its row, and only by it."""

import pytest
from patients import TRAINING_ROWS, examine, of, patient

# a gradient that is cut is no slope either
CAUGHT = {
    "unused": ["learns"],
    "detached": ["learns", "gradients"],
    "gradient": ["gradients"],
    "checkpointing": ["checkpointing"],
    "accumulation": ["accumulation"],
    "forgetful": ["resume"],
}


@pytest.mark.process
def test_a_healthy_checkpoint_passes(healthy, capsys):
    rows = examine(healthy["patient"], TRAINING_ROWS)
    assert {row.status for row in rows.values()} == {"pass"}, rows
    assert capsys.readouterr().out == ""


@pytest.mark.process
@pytest.mark.parametrize("defect", CAUGHT)
def test_a_defect_is_caught(defect, tokenizer, tmp_path):
    row = CAUGHT[defect][-1]
    assert examine(patient(tokenizer, tmp_path / "model", defect), (row,))[row].status == "fail"


@pytest.mark.slow
@pytest.mark.parametrize("defect", CAUGHT)
def test_no_other_row_fails(defect, tokenizer, tmp_path):
    rows = examine(patient(tokenizer, tmp_path / "model", defect), TRAINING_ROWS)
    assert set(of("fail", rows)) == set(CAUGHT[defect]), of("fail", rows)
    assert of("skip", rows) == {}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ours", "llama", "qwen3"])
def test_healthy_checkpoints_pass_the_deep_examination(name, healthy):
    from hf_decoder.doctor import run_doctor

    report = run_doctor(healthy[name], level="deep")
    assert report.ok, report.failures
    assert {row.name for row in report.rows} >= {*TRAINING_ROWS, "reload", "padding"}
