"""Rows from files, columns recognised, unusable rows counted."""

import bz2
import gzip
import json
import lzma

import pytest

from hf_decoder.data.conversations import first_answer
from hf_decoder.data.records import (
    check_alike,
    drop_unusable,
    pair_lines,
    read_prompts,
    read_rows,
    select_columns,
    separate,
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


def test_prompts_beside_a_file_of_references_may_be_chats(tmp_path):
    prompts, references = tmp_path / "a.jsonl", tmp_path / "a.en"
    prompts.write_text(json.dumps({"asked": [USER], "prompt": "another"}) + "\n", encoding="utf-8")
    references.write_text("one\n", encoding="utf-8")
    assert pair_lines(prompts, references, "asked") == [{"prompt": [USER], "reference": "one"}]


@pytest.mark.parametrize("row", [{"text": "a", "label": "\ud83d"}, {"prompt": "a", "reference": ["b", "\ud83d"]}])
def test_half_a_character_is_no_label_and_no_reference(row):
    """No file can hold it, so that the results of hours could not be written."""
    kept, skipped = drop_unusable([row])
    assert not kept and "holds half a character" in str(skipped)


@pytest.mark.parametrize(
    "name, text, reason",
    [
        ("a.jsonl", '{"a": 1}\n{"a"', "line 2 is not JSON"),
        ("a.jsonl", "[1, 2]\n", "line 1 must be an object"),
        ("a.json", '{"a": 1}', "rows with named columns"),
        ("a.jsonl", "\n", "is empty"),
        ("a.parquet", "no", "not a parquet file"),
        ("a.jsonl", "[" * 100_000, r"a\.jsonl, line 1 is not JSON"),
        ("a.json", "[" * 100_000, r"a\.json is not JSON"),
        ("a.jsonl", '{"a": 1' + "0" * 5000 + "}", r"a\.jsonl, line 1 is not JSON"),
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


def test_the_input_of_an_instruction_follows_it(tmp_path):
    """As in Alpaca: the input belongs to the instruction, and many rows have none."""
    rows = [{"instruction": "Add.", "input": "1 and 2", "output": "3"}, {"instruction": "Sing.", "input": "", "output": "la"}]  # fmt: skip # noqa: E501
    expected = [{"prompt": "Add.\n\n1 and 2", "completion": "3"}, {"prompt": "Sing.", "completion": "la"}]
    assert select_columns(rows, "sft", {}, "x") == expected
    assert [row["prompt"] for row in select_columns(rows, "reference", {}, "x")] == ["Add.\n\n1 and 2", "Sing."]
    path = tmp_path / "alpaca.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    assert [row["prompt"] for row in read_prompts(path)[0]] == ["Add.\n\n1 and 2", "Sing."]
    # a column that is named is taken
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
    assert first_answer([*turns, {"role": "assistant", "content": "hey"}]) == turns[1]
    assert first_answer(turns[:1]) is None


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


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}


def messages(value, **more):
    """Reads a row with `value` as its messages."""
    return select_columns([{"messages": value, **more}], "sft", {}, "x")[0]["messages"]


@pytest.mark.parametrize(
    "value",
    [
        [USER, ANSWER],
        [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}],
        json.dumps([USER, ANSWER]),
        str([USER, ANSWER]),
        json.dumps([{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]),
        [{**USER, "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}, ANSWER],
        [{**USER, "tool_calls": None, "weight": None}, {**ANSWER, "tool_calls": []}],
    ],
)
def test_conversations_of_every_form_are_messages(value):
    assert messages(value) == [USER, ANSWER]


def test_tool_calls_of_every_form_are_those_that_templates_take():
    said = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    text = json.dumps({"name": "weather", "arguments": {"city": "Rome"}})
    result = {"role": "tool", "content": "21"}
    flat = {"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    assert messages([USER, {"role": "assistant", "tool_calls": [flat]}, result]) == [USER, said, result]
    named = {**CALL, "id": "7", "index": None}  # what a call is called stays, and what nobody filled in goes
    assert messages([USER, {"role": "assistant", "tool_calls": [named]}])[-1]["tool_calls"] == [{**CALL, "id": "7"}]
    assert messages([USER, {"role": "assistant", "function_call": flat["function"]}])[1] == said
    shared = [{"from": "human", "value": "hi"}, {"from": "function_call", "value": text}]
    assert messages([*shared, {"from": "observation", "value": "21"}]) == [USER, said, result]
    rows = [{"messages": [USER, said], "tools": value} for value in (json.dumps([{"name": "f"}]), [{"name": "f"}])]
    wrapped = [{"type": "function", "function": {"name": "f"}}]
    assert [row["tools"] for row in select_columns(rows, "sft", {}, "x")] == [wrapped, wrapped]


def reasons(rows, kind="sft"):
    return set(drop_unusable(select_columns(rows, kind, {}, "x"))[1].reasons)


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"messages": [{**USER, "content": [{"type": "text", "text": "a"}, {"type": "image"}]}, ANSWER]}, "(image)"),
        ({"messages": [{**USER, "content": [{"type": "image_url"}]}, ANSWER]}, "(image_url)"),
        ({"messages": [USER, ANSWER], "images": ["a.png"]}, "its images cannot be read"),
        ({"prompt": "a", "completion": "b", "audio": {"path": "a.wav"}}, "its audio cannot be read"),
        ({"messages": [USER, {"role": "assistant", "content": None}, USER, ANSWER]}, "turn that says nothing"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "weight is neither 0 nor 1"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "no assistant turn"),
        ({"messages": "just words"}, "messages is text"),
        ({"messages": "[{'role': 'user'"}, "messages is text"),
        ({"messages": [USER, {"from": "function_call", "value": "no json"}]}, "tool call without name"),
        ({"messages": [USER, ANSWER], "tools": "no json"}, "tools are no JSON"),
        ({"prompt": "a", "completion": "b", "history": "no json"}, "history is no list"),
        ({"prompt": "a", "completion": "b", "system": 5}, "system is not text"),
        ({"prompt": "", "completion": "b", "system": "kind"}, "empty prompt"),
        ({"prompt": "a", "completion": "", "system": "kind"}, "empty completion"),
        ({"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"}, "system column is not"),
        ({"instruction": "a", "input": 5, "output": "b"}, "its input is not text"),
        ({"question": "a", "context": ["x", "y"], "answer": "b"}, "its context is not text"),
        ({"prompt": "a", "completion": "\ud83d"}, "completion holds half a character"),
        ({"messages": [USER, {**ANSWER, "content": "\ude00"}]}, "messages holds half a character"),
    ],
)  # fmt: skip
def test_what_cannot_be_rendered_of_a_row_is_the_reason_to_skip_it(row, reason):
    (found,) = reasons([row])
    assert reason in found


@pytest.mark.parametrize("label", [None, "", " ", float("nan"), [0, 1], {"a": 1}])
def test_what_is_no_single_label_is_the_reason_to_skip_a_row(label):
    assert reasons([{"text": "a", "label": label}, {"text": "b", "label": 0}], "classification") == {"no single label"}


def test_a_column_of_the_same_name_in_other_letters_is_named():
    found = select_columns([{"prompt": "a", "completion": "b", "Completion": "c"}], "sft", {}, "x")
    assert found == [{"prompt": "a", "completion": "b"}] and found.unused == {"Completion": 1}


def test_what_an_instruction_is_about_and_comes_after_is_in_the_prompt():
    row = {"instruction": "Who won?", "context": "Ann beat Bob.", "response": "Ann", "category": "closed_qa"}
    found = select_columns([row, {**row, "context": "", "category": None}], "sft", {}, "x")
    assert found == [{"prompt": "Who won?\n\nAnn beat Bob.", "completion": "Ann"}, {"prompt": "Who won?", "completion": "Ann"}]  # fmt: skip # noqa: E501
    assert found.unused == {"category": 1}
    row = {"question": "Who won?", "context": "Ann beat Bob.", "answer": "Ann"}
    assert select_columns([row], "reference", {}, "x")[0]["prompt"] == "Who won?\n\nAnn beat Bob."
    assert select_columns([{"INSTRUCTION": "a", "RESPONSE": "b"}], "sft", {}, "x") == [
        {"prompt": "a", "completion": "b"}
    ]


def test_system_and_history_make_messages():
    row = {"instruction": "b", "input": "c", "output": "d", "system": "s", "history": [["hi", "ho"]]}
    asked = {"role": "user", "content": "b\n\nc"}
    system = {"role": "system", "content": "s"}
    found = select_columns([row, {**row, "system": "", "history": None}], "sft", {}, "x")
    assert found[0] == {"messages": [system, USER, ANSWER, asked, {"role": "assistant", "content": "d"}]}
    assert found[1] == {"messages": [asked, {"role": "assistant", "content": "d"}]}
    assert not found.unused
    row["history"] = json.dumps(row["history"])
    assert select_columns([row], "reference", {}, "x") == [{"prompt": [system, USER, ANSWER, asked], "reference": "d"}]
    shared = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}], "system": "s"}
    assert select_columns([shared], "sft", {}, "x") == [{"messages": [system, USER, ANSWER]}]
    # without one in any row they are prompt and completion
    plain = {"instruction": "b", "output": "d", "system": "", "history": []}
    assert select_columns([plain], "sft", {}, "x") == [{"prompt": "b", "completion": "d"}]


def test_preferences_are_all_text_or_all_turns():
    other = {"role": "assistant", "content": "no"}
    expected = [{"prompt": [USER], "chosen": [ANSWER], "rejected": [other]}]
    chats = {"chosen": [USER, ANSWER], "rejected": [USER, other]}
    for row in (
        {"prompt": "hi", "prompt_id": "1", **chats, "messages": [USER, ANSWER], "score_chosen": 1.0},
        {"prompt": "hi", "chosen": [ANSWER], "rejected": [other]},
        {"prompt": [USER], "chosen": "ho", "rejected": "no"},
        {"prompt": [USER], **chats},
        chats,
        {key: json.dumps(value) for key, value in chats.items()},
        {"conversations": [{"from": "human", "value": "hi"}], "chosen": {"from": "gpt", "value": "ho"}, "rejected": {"from": "gpt", "value": "no"}},  # noqa: E501
    ):  # fmt: skip
        assert select_columns([row], "preference", {}, "x") == expected
    system = {"role": "system", "content": "s"}  # which the chats may leave out, or have
    for row in (chats, {key: [system, *value] for key, value in chats.items()}):
        found = select_columns([{"prompt": [system, USER], **row}], "preference", {}, "x")
        assert found == [{**expected[0], "prompt": [system, USER]}]
    # whoever has the system's turn, it comes first, and once
    apart = {key: [system, {"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    whole = {key: [system, USER, {"role": "assistant", "content": key}] for key in ("chosen", "rejected")}
    for row in (
        {"prompt": "hi", **apart},
        {"prompt": [USER], **apart},
        {"prompt": [system, USER], **apart},
        {"prompt": "hi", **whole},
        {"prompt": [USER], **whole},
        {"prompt": [], **whole},
    ):
        (found,) = select_columns([row], "preference", {}, "x")
        assert found["prompt"] == [system, USER]
    for odd in (["a"], [None], [[USER]], [{"content": "x"}], [{"role": None, "content": "x"}]):
        assert reasons([{"prompt": odd, **whole}], "preference")
    stranger = {"prompt": [{"role": "system", "content": "another"}, USER], **whole}
    assert reasons([stranger], "preference") == {"its system turn is not that of its chosen answer"}
    text = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert select_columns([text], "preference", {}, "x") == [text]
    assert select_columns([{**text, "system": "s"}], "preference", {}, "x")[0]["prompt"][0]["role"] == "system"
    assert reasons([{**text, "rejected": "b"}], "preference") == {"chosen and rejected are the same"}
    assert reasons([{"prompt": "else", **chats}], "preference") == {"its prompt is no turn of its chosen answer"}
    started = {"chosen": [USER, ANSWER], "rejected": [{**USER, "content": "x"}, other]}
    assert "does not go on with the assistant" in reasons([started], "preference").pop()


@pytest.mark.parametrize(
    "row, separator",
    [
        ({"instruction": "Name a pet", "input": "", "output": "Cat"}, "\n\n"),
        ({"question": "a", "answer": "b"}, "\n\n"),
        ({"prompt": "a", "response": "b"}, "\n\n"),
        ({"prompt": "2+2=", "completion": "4"}, ""),  # TRL's own, joined as they are
        ({"source": "a", "target": " b"}, ""),
        ({"source": "a\n", "target": "b"}, ""),
        ({"text": "a"}, ""),
    ],
)
def test_prompt_and_answer_are_told_apart(row, separator):
    assert select_columns([row], "sft", {}, "x").separator == separator


@pytest.mark.parametrize(
    "name, text, reason",
    [
        ("a.csv", "prompt,completion\na,b\nc,d, and e\n", "line 3 has 3 fields and the first line names 2"),
        ("a.tsv", "prompt\tcompletion\na\tb\tc\n", "line 2 has 3 fields"),
        ("a.csv", "a,a\n1,2\n", "two columns 'a'"),
        ("a.csv", 'a,b\n1,"2\n3,4\n', "line 3 cannot be read"),
        ("a.csv", 'a,b\n1,"2" 3\n', "line 2 cannot be read"),
        ("a.csv", "a,b\n", "is empty"),
        ("a.jsonl.xz", "no", "not a whole xz file"),
        ("a.jsonl.bz2", "no", "not a whole bzip2 file"),
        ("a.txt.gz", "no", "not a whole gzip file"),
    ],
)
def test_tables_whose_fields_do_not_fit_are_refused(tmp_path, name, text, reason):
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=reason):
        read_rows(tmp_path / name)


def test_a_field_may_be_a_book_and_a_row_may_be_short(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"prompt,completion\nlong,{'word ' * 30_000}\n\nshort\n", encoding="utf-8")
    rows = read_rows(path)
    assert len(rows[0]["completion"]) == 150_000 and rows[1:] == [{"prompt": "short", "completion": None}]


@pytest.mark.parametrize("pack", [bz2.compress, gzip.compress, lzma.compress], ids=["bz2", "gz", "xz"])
def test_compressed_files_are_read(tmp_path, pack):
    path = tmp_path / f"rows.ndjson.{pack.__module__.replace('gzip', 'gz').replace('lzma', 'xz')}"
    path.write_bytes(pack(b'{"prompt": "a"}\n'))
    assert read_rows(path) == [{"prompt": "a"}]


def test_a_file_that_cannot_be_unpacked_is_named_as_compressed(tmp_path):
    (tmp_path / "rows.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(ValueError, match=r"rows\.jsonl\.zst is (compressed with zstd|not a whole zst file)"):
        read_rows(tmp_path / "rows.jsonl.zst")


def test_a_prompt_that_cannot_be_rendered_is_refused_by_its_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"messages": [USER]}, {"messages": [{**USER, "content": [{"type": "image_url"}]}]}]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 2: .*not text \(image_url\)"):
        read_prompts(path)


@pytest.mark.parametrize(
    ("prompt", "found"),
    [("a", "a "), ("a ", "a "), ("a\n", "a\n"), ("", " "), ([{"role": "user"}], [{"role": "user"}])],
)
def test_a_prompt_that_ends_in_a_space_is_separated_already(prompt, found):
    row = {"prompt": prompt, "completion": "b"}
    assert separate(row, " ") == {"prompt": found, "completion": "b"}


SHARED = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]


@pytest.mark.parametrize(
    ("row", "prompt", "unused"),
    [
        ({"messages": [USER, ANSWER], "source": "flan"}, [USER], {"source": 1}),
        ({"messages": [USER, ANSWER, USER], "source": "flan"}, [USER, ANSWER, USER], {"source": 1}),
        ({"conversations": SHARED, "input": "x"}, [USER], {"input": 1}),
        ({"text": "Once", "source": "books"}, "Once", {"source": 1}),
        ({"source": "a", "target": "b"}, "a", {"target": 1}),
        ({"input": "a"}, "a", {}),
        ({"prompt": "a", "messages": [USER]}, "a", {"messages": 1}),
    ],
)  # fmt: skip
def test_where_a_row_comes_from_is_no_prompt_and_an_answer_is_left_out(tmp_path, row, prompt, unused):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (found,), lines = read_prompts(path)
    assert found == {**row, "prompt": prompt}
    assert select_columns([row], "prompt", {}, "x").unused == unused
    assert [("no part of the prompts" in line, "left out" in line) for line in lines] == (
        [(True, False)] * bool(unused) + [(False, True)] * (prompt == [USER])
    )


def test_a_column_that_is_named_is_the_prompt(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": [USER], "source": "flan"}) + "\n", encoding="utf-8")
    assert read_prompts(path, "source")[0][0]["prompt"] == "flan"
    path.write_text(json.dumps({"messages": [ANSWER]}) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"row 1: only the assistant speaks in it"):
        read_prompts(path)


def test_a_chat_before_an_answer_is_its_prompt_whatever_stands_beside_it():
    row = {"conversations": [USER], "source": "flan", "completion": "ho", "label": True}
    assert select_columns([row], "kto", {}, "x")[0]["prompt"] == [USER]
