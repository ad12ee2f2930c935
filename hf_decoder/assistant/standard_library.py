"""Makes questions, answers, calls and functions to write from the sources of Python's standard library.

What is asked about a function can be answered from the question, so that a small model can learn it. The held-out rows
are of the files that pretraining holds out, too: no model has seen them.
"""

from __future__ import annotations

import ast
import json
import random
import re
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hf_decoder.data.documents import load_standard_library

HELD_OUT = {"questions": 200, "calls": 100, "functions": 100}
LONGEST_HEADER, LONGEST_SUMMARY, LONGEST_FUNCTION = 100, 100, 320  # characters
VALUES = (0, 1, 2, 10, True, None, "a", "name", "path", "x.txt")
Row = dict[str, Any]
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


def write_rows(folder: Path, seed: int = 0) -> dict[str, int]:
    """Writes `chats` and `functions` to train on, and each kind of rows held out, as .jsonl; returns how many.

    `chats.jsonl` holds all kinds, to fine-tune on: questions, calls of a tool, and functions to write.
    `functions.jsonl` holds the last kind alone, for reinforcement learning.
    """
    splits = load_standard_library()
    folder.mkdir(parents=True, exist_ok=True)
    train = make_rows(splits["train"]["text"], seed)
    held_out = make_rows(splits["validation"]["text"], seed)
    seen = {str(row["prompt"]) for rows in train.values() for row in rows}
    files = {
        "chats": _shuffled([row for rows in train.values() for row in rows], seed),
        "functions": train["functions"],
        **{
            f"held_out_{kind}": [row for row in rows if str(row["prompt"]) not in seen][: HELD_OUT[kind]]
            for kind, rows in held_out.items()
        },
    }
    for name, rows in files.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return {name: len(rows) for name, rows in files.items()}


def make_rows(texts: Iterable[str], seed: int = 0) -> dict[str, list[Row]]:
    """The rows that source texts give, shuffled: `prompt` and `completion`, each one turn of a chat, and `tools`."""
    rows: dict[str, list[Row]] = {"questions": [], "calls": [], "functions": []}
    for text in texts:
        for function in _functions(text):
            header = _header(function)
            if len(header) <= LONGEST_HEADER:
                row = _question(function, header, seed)
                rows["calls" if "tools" in row else "questions"].append(row)
                rows["functions"] += _to_write(function, header)
    return {kind: _shuffled(_unique(found), seed) for kind, found in rows.items()}


def _functions(text: str) -> Iterator[FunctionNode]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of strange escapes in strings
        try:
            tree = ast.parse(text)
        except SyntaxError:  # of lib2to3's and other programs of an earlier Python
            return
    for node in ast.walk(tree):
        if isinstance(node, FunctionNode) and not (node.name.startswith("__") and node.name != "__init__"):
            yield node


def _header(function: FunctionNode) -> str:
    """`def name(arguments):`, without annotations."""
    for argument in ast.walk(function.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"def {function.name}({ast.unparse(function.args)}):"


def _question(function: FunctionNode, header: str, seed: int) -> Row:
    """A question about a function, or the task of calling it."""
    draw = random.Random(f"{seed} {header}")
    arguments = function.args
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    own = [name for name in names if name not in ("self", "cls")]
    rows = [
        _row(f"What is the name of this function?\n\n{header}", function.name),
        _row(f"Which arguments does this function take?\n\n{header}", ", ".join(own) or "none"),
    ]
    summary = _summary(function)
    if summary:
        rows.append(_row(f"What does this function do?\n\n{header}", summary))
    if 0 < len(own) <= 3 and arguments.vararg is arguments.kwarg is None:
        rows.append(_call(function.name, summary, {name: draw.choice(VALUES) for name in own}))
    return draw.choice(rows)  # one a function, so that the kinds come equally often


def _call(name: str, summary: str, arguments: dict[str, Any]) -> Row:
    """The task of calling the one tool that there is with these arguments."""
    said = " and ".join(f"{argument} = {json.dumps(value)}" for argument, value in arguments.items())
    parameters = {"type": "object", "properties": {argument: {} for argument in arguments}, "required": [*arguments]}
    tool = {"name": name, **({"description": summary} if summary else {}), "parameters": parameters}
    row = _row(f"Call {name} with {said}.", "")
    row["completion"][0]["tool_calls"] = [{"type": "function", "function": {"name": name, "arguments": arguments}}]
    return {**row, "tools": [{"type": "function", "function": tool}]}


def _to_write(function: FunctionNode, header: str) -> list[Row]:
    """The task of writing this function, where it is short and says what it does."""
    summary = _summary(function)
    body = function.body[1:] if summary else []
    if not body or (body[-1].end_lineno or 0) - body[0].lineno > LONGEST_FUNCTION // 10:
        return []
    text = textwrap.indent("\n".join(map(ast.unparse, body)), " " * 4)
    if len(header) + len(text) > LONGEST_FUNCTION:
        return []
    return [_row(f"Write this function: {summary}\n\n{header}", f"{header}\n{text}")]


def _summary(function: FunctionNode) -> str:
    """The first sentence of the docstring, or nothing where there is none or it is long."""
    first = (ast.get_docstring(function) or "").strip().partition("\n\n")[0]
    sentence = re.split(r"(?<=\.)\s", " ".join(first.split()), maxsplit=1)[0]
    return sentence if 10 <= len(sentence) <= LONGEST_SUMMARY and sentence.isprintable() else ""


def _row(prompt: str, completion: str) -> Row:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completion": [{"role": "assistant", "content": completion}],
    }


def _unique(rows: Iterable[Row]) -> list[Row]:
    return list({str(row["prompt"]): row for row in rows}.values())


def _shuffled(rows: list[Row], seed: int) -> list[Row]:
    return random.Random(seed).sample(rows, len(rows))
