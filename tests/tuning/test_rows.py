"""Rows of a task: which columns are its prompts, what is named of the others, and what is held out."""

import json

import pytest

from hf_decoder.data.records import COLUMNS
from hf_decoder.tuning.rows import count_overlap, load_task

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}


def load(tmp_path, task, row, **options):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return load_task(task, str(path), None, {}, **options)


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_a_chat_is_sampled_from_and_not_the_name_of_its_source(tmp_path, column):
    data = load(tmp_path, "grpo", {column: [USER, ANSWER], "source": "flan"})
    (row,) = data.train
    assert row["prompt"] == [USER] and row[COLUMNS]["reference"] == "ho"
    assert data.warnings() == [f"{tmp_path / 'rows.jsonl'}: columns that only a reward can read: source (1 rows)"]


def test_a_column_that_a_reward_needs_is_no_surprise(tmp_path):
    row = {"prompt": "hi", "letter": "e", "completion": "ho", "note": ""}
    data = load(tmp_path, "grpo", row, needed=["letter"])
    assert data.train[0][COLUMNS]["letter"] == "e" and data.warnings() == []


def test_the_blank_line_before_an_answer_is_told_where_nothing_replaces_it(tmp_path):
    data = load(tmp_path, "sft", {"instruction": "hi", "output": "ho"})
    (line,) = data.warnings()
    assert line.startswith("a blank line stands between prompt and answer")
    assert "generate continues has to end with it" in line
    assert data.warnings("{prompt}: ") == []


def test_overlap_counts_rows_of_the_held_out_part():
    train = [{"text": "a ", "label": 0}, {"text": "b", "label": 1}]
    assert count_overlap(train, [{"text": "a", "label": 0}, {"text": "b", "label": 0}, {"text": "a", "label": 0}]) == 2
