"""Rows from files, columns recognised, unusable rows counted."""

import gzip
import json

import pytest

from hf_decoder.examples import (
    check_alike,
    count_overlap,
    drop_unusable,
    first_answer,
    pair_lines,
    read_prompts,
    read_rows,
    select_columns,
)

ROWS = [{"prompt": "one, two\nthree", "n": "1"}, {"prompt": "größe", "n": "2"}]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    elif suffix.startswith(".json"):
        text = json.dumps(ROWS) if suffix == ".json" else "\n".join(map(json.dumps, ROWS)) + "\n\n"
        path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    else:
        mark = "\t" if suffix == ".tsv" else ","
        path.write_text(f'prompt{mark}n\n"one, two\nthree"{mark}1\ngröße{mark}2\n', encoding="utf-8")
    assert read_rows(path) == ROWS


def test_lines_are_rows_and_stay_parallel(tmp_path):
    # U+2028 ends a line for str.splitlines, not in a file of lines
    one, two = tmp_path / "a.fr", tmp_path / "a.en"
    one.write_text("un\u2028deux\r\n\ntrois\n", encoding="utf-8", newline="")
    two.write_text("one\n\nthree", encoding="utf-8")
    assert [row["text"] for row in read_rows(one)] == ["un\u2028deux", "", "trois"]
    assert pair_lines(one, two)[2] == {"prompt": "trois", "reference": "three"}
    two.write_text("one\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"3 prompts but .*a\.en has 1 lines"):
        pair_lines(one, two)


@pytest.mark.parametrize(
    "name, text, reason",
    [
        ("a.jsonl", '{"a": 1}\n{"a"', "line 2 is not JSON"),
        ("a.jsonl", "[1, 2]\n", "line 1 must be an object"),
        ("a.json", '{"a": 1}', "rows with named columns"),
        ("a.jsonl", "\n", "is empty"),
        ("a.parquet", "no", "not a parquet file"),
    ],
)
def test_malformed_files(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        read_rows(tmp_path / name)


def test_columns_are_recognised_or_named():
    rows = [{"instruction": "a", "response": "b", "id": 3}]
    assert select_columns(rows, "sft", {}, "x") == [{"prompt": "a", "completion": "b"}]
    assert select_columns([{"text": "a"}], "sft", {}, "x") == [{"text": "a"}]
    named = {"prompt": "id", "completion": "instruction"}
    assert select_columns(rows, "sft", named, "x") == [{"prompt": 3, "completion": "a"}]
    # both kinds are there: the named role decides
    both = [{"messages": [], "prompt": "p", "completion": "c"}]
    assert list(select_columns(both, "sft", {}, "x")[0]) == ["messages"]
    assert list(select_columns(both, "sft", {"prompt": "prompt"}, "x")[0]) == ["prompt", "completion"]
    with pytest.raises(
        ValueError, match=r"x has the columns instruction, response, id.*--text_column.*--label_column"
    ):
        select_columns(rows, "classification", {}, "x")
    with pytest.raises(ValueError, match=r"no column 'nope' for --prompt_column; it has: instruction, response, id"):
        select_columns(rows, "sft", {"prompt": "nope"}, "x")


def test_unusable_rows_are_counted_by_reason():
    turn = {"role": "user", "content": "hi"}
    answer = {"role": "assistant", "content": "ho"}
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": " \n", "completion": "b"}]
    rows += [{"prompt": "a", "completion": ""}, {"prompt": "a", "completion": None}]
    kept, skipped = drop_unusable(rows)
    assert kept == rows[:1]
    assert str(skipped) == (
        "1 of 4 rows skipped: empty prompt, first row 2; 2 of 4 rows skipped: empty completion, first row 3"
    )
    chats = [[turn, answer], [turn], [], [{"role": "user"}], [turn, {**answer, "content": ""}]]
    kept, skipped = drop_unusable([{"messages": chat} for chat in chats])
    assert kept == [{"messages": [turn, answer]}]
    assert skipped.reasons["no assistant turn"] == 2
    kept, skipped = drop_unusable([{"text": "a", "label": 0}, {"text": "b", "label": None}])
    assert kept == [{"text": "a", "label": 0}]


def test_overlap_counts_rows_of_the_held_out_part():
    train = [{"text": "a ", "label": 0}, {"text": "b", "label": 1}]
    assert count_overlap(train, [{"text": "a", "label": 0}, {"text": "b", "label": 0}, {"text": "a", "label": 0}]) == 2


def test_the_input_of_an_instruction_follows_it(tmp_path):
    """As Alpaca means it: the input is what the instruction is about; many rows have none."""
    rows = [{"instruction": "Add.", "input": "1 and 2", "output": "3"}, {"instruction": "Sing.", "input": "", "output": "la"}]  # fmt: skip # noqa: E501
    expected = [{"prompt": "Add.\n\n1 and 2", "completion": "3"}, {"prompt": "Sing.", "completion": "la"}]
    assert select_columns(rows, "sft", {}, "x") == expected
    assert [row["prompt"] for row in select_columns(rows, "reference", {}, "x")] == ["Add.\n\n1 and 2", "Sing."]
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert [row["prompt"] for row in read_prompts(path)] == ["Add.\n\n1 and 2", "Sing."]
    # whoever names a column has that column
    assert select_columns(rows, "sft", {"prompt": "instruction"}, "x")[0]["prompt"] == "Add."
    assert select_columns(rows, "sft", {"completion": "input"}, "x")[0] == {"prompt": "Add.", "completion": "1 and 2"}


def test_a_turn_that_is_no_text_is_skipped_and_its_row_named():
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [{"messages": turns}, {"messages": [turns[0], {"role": "assistant", "content": 5}]}]
    kept, skipped = drop_unusable(rows)
    assert kept == rows[:1]
    assert str(skipped) == "1 of 2 rows skipped: messages has a turn whose content is not text, first row 2"


def test_references_are_a_text_several_or_messages():
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    rows = [{"prompt": "a", "reference": value} for value in ("x", ["x", "y"], turns, turns[:1], [])]
    kept, skipped = drop_unusable(rows)
    assert kept == rows[:3]
    assert set(skipped.reasons) == {"no assistant turn", "empty reference"}
    assert first_answer([*turns, {"role": "assistant", "content": "hey"}]) == "ho" and first_answer(turns[:1]) is None


def test_text_and_messages_in_one_file_are_told_apart():
    turns = [{"role": "user", "content": "hi"}]
    text, chat = {"prompt": "a", "completion": "b"}, {"prompt": turns, "completion": turns}
    check_alike([text, text], "x")
    check_alike([chat, chat], "x", across_roles=True)
    with pytest.raises(ValueError, match="x mixes text and messages as its prompt: row 2 holds text and row 1 holds"):
        check_alike([chat, text], "x")
    mixed = [text, {"prompt": "a", "completion": turns}]
    with pytest.raises(ValueError, match="x mixes text and messages as its completion: row 1 holds text and row 2"):
        check_alike(mixed, "x")
    check_alike(mixed[1:], "x")
    with pytest.raises(ValueError, match="x mixes text and messages: row 1 holds text and row 1 holds messages"):
        check_alike(mixed[1:], "x", across_roles=True)
