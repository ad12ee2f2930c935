"""Each reward by hand, and the ways in which a row of prompts is read."""

import json

import pytest

from hf_decoder.tuning.rewards import columns_read, find_reward, guarded
from hf_decoder.tuning.rows import load_task, text_rows

DEFINITION = "def f(x):\n"


def reward(name, completions, prompts=None, **columns):
    prompts = prompts or [""] * len(completions)
    ids = [list(range(len(str(one)))) for one in completions]
    return find_reward(name)(prompts=prompts, completions=completions, completion_ids=ids, **columns)


def said(text):
    return [{"role": "assistant", "content": text}]


@pytest.mark.parametrize(
    "prompt, completion, value",
    [
        (DEFINITION, "    return x\n", 1),
        (DEFINITION, "return x\n", 0),  # no body of the definition
        (DEFINITION, "    return (x\n", 0),
        ("Add two numbers:\n", "    x + y\n", 1),
        ("", "x = 1\n\ndef g():\n    pass\n", 1),
        ("", "this is no Python", 0),
        ("", "", 0),
        ("", "# a comment\n", 0),
        ("", "x\0", 0),
        ("", "(" * 500, 0),
        ("", '"\\d"', 1),  # with a warning of Python's
        ([{"role": "user", "content": DEFINITION}], said("x = 1"), 1),
    ],
)
def test_python_parses(prompt, completion, value):
    assert reward("python_parses", [completion], [prompt]) == [value]


def test_the_other_rewards():
    assert reward("exact_match", [" a ", "b", said("c"), "d"], reference=["a", ["x", "b"], "c", "a"]) == [1, 1, 1, 0]
    assert reward(r"regex:^\d+$", ["12", "a1", said("3")]) == [1, 0, 1]
    assert reward("length:4", ["abcd", "ab", "abcdef", "", "abcdefghi"]) == [1, 0.5, 0.5, 0, 0]
    assert columns_read(find_reward("exact_match")) == {"reference"}
    assert not columns_read(find_reward("length:4")) | columns_read(find_reward("python_parses"))


def test_an_expression_that_goes_on_for_ever_is_ended():
    slow = guarded("slow", find_reward("regex:(a+)+$"), 0.3)
    with pytest.raises(ValueError, match=r"reward .slow. did not end within 0\.3 s"):
        slow(prompts=[""], completions=["a" * 40 + "!"])
    assert slow(prompts=["", ""], completions=["aa", "b"]) == [1, 0]


def test_columns_of_prompts_reach_the_rewards(tmp_path):
    """The rows of SFT serve for it, too: the first answer is what a completion is compared with."""
    chat = [{"role": "user", "content": "hi"}, *said("hello"), {"role": "user", "content": "bye"}, *said("ciao")]
    files = {
        "text": [
            {"prompt": "1 + 1 =", "answer": " 2", "label": "x", "messages": 1},
            {"prompt": "2 + 2 =", "answer": ""},
        ],
        "chat": [{"messages": chat}, {"messages": chat, "tools": [{"name": "clock"}]}],
    }
    rows = {}
    for name, lines in files.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in lines))
        data = load_task("grpo", str(path), None, {}, needed=["reference"])
        (rows[name],) = text_rows(data.train)
        assert data.counts()["skipped_rows"] == 1
        assert ("no 'reference'" if name == "text" else "tools") in str(data.skipped[str(path)])
    assert rows["text"] == {"prompt": "1 + 1 =", "answer": " 2", "reference": " 2", "label": "x", "messages": 1}
    assert rows["chat"]["prompt"] == chat[:1] and rows["chat"]["reference"] == "hello"
