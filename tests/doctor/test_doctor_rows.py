"""No row of the doctor is without a broken checkpoint that it catches: the tables of the other files, and the rest."""

import inspect

import pytest
import test_doctor_files
import test_doctor_numerics
import test_doctor_portability
import test_doctor_quality
import test_doctor_tokenizer
import test_doctor_training
from patients import copy, edit_json, edit_weights, examine, patient

from hf_decoder.doctor import CHECKS, FAIL, WARN

IN_TABLES = {
    *(row for _, rows, _ in (*test_doctor_files.DAMAGES, *test_doctor_tokenizer.DAMAGES) for row in rows),
    *(row for rows in test_doctor_numerics.CAUGHT.values() for row in rows),
    *(row for _, row, _ in test_doctor_quality.DAMAGES),
    *(row for rows in test_doctor_training.CAUGHT.values() for row in rows),
}


def save_the_tied_head(folder):
    edit_weights(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * 2}))


def cap_the_logits(folder):
    edit_json(folder / "config.json", final_logit_softcapping=30.0)


# row -> which checkpoint, what is done to it, what the row says of it
OTHERS = {
    "rope_cast": ("llama", None, WARN),
    "tied": ("ours", save_the_tied_head, FAIL),
    "reload": ("dropout", None, FAIL),
    "export": ("ours", cap_the_logits, WARN),
    "backends": ("none", None, WARN),
}
# needs a process of its own, for code that the caller trusts
BY_ITSELF = {
    "remote_code": test_doctor_portability.test_code_that_computes_something_else,
    "save_again": test_doctor_portability.test_what_is_not_in_the_files_is_lost,
    "likelihood": test_doctor_quality.test_weights_in_the_wrong_place_are_worse_than_chance,
}


def test_every_row_has_a_broken_checkpoint():
    rows = {check.name for check in CHECKS}
    assert len(CHECKS) == len(rows)
    assert rows == IN_TABLES | set(OTHERS) | set(BY_ITSELF)
    assert not IN_TABLES & (set(OTHERS) | set(BY_ITSELF))
    for row, test in BY_ITSELF.items():
        assert f'{{"{row}"}}' in inspect.getsource(test)  # the rows that fail there, and no other


@pytest.mark.parametrize("row", OTHERS)
def test_a_row_catches_what_is_in_no_table(row, healthy, tokenizer, tmp_path):
    name, damage, status = OTHERS[row]
    if name in healthy:
        folder = copy(healthy[name], tmp_path / "model")
    else:
        folder = patient(tokenizer, tmp_path / "model", name)
    if damage is not None:
        before = examine(folder, (row,))[row]
        assert before.status not in (FAIL, WARN), before
        damage(folder)
    found = examine(folder, (row,))[row]
    assert found.status == status and found.detail and found.remedy
