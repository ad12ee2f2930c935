"""Rows of prompts, answers, conversations, labels and preferences: read from files, recognised by their columns.

A file is .jsonl, .json, .csv, .tsv or .parquet with named columns, or text of any other suffix with one row a line
(column `text`); each but parquet also gzipped. `KINDS` lists what a task may be given, in the order in which it is
looked for. Rows as Alpaca has them (Taori et al. 2023), an `instruction` and the `input` it is about, have both in
their prompt.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .corpus import read_text

Row = dict[str, Any]

# role -> names under which public data sets hold it; the role's own name first
ALIASES = {
    "text": ("text", "sentence", "review", "content"),
    "prompt": ("prompt", "instruction", "question", "input", "source"),
    "completion": ("completion", "response", "output", "answer", "target"),
    "reference": ("reference", "references", "completion", "response", "output", "answer", "target", "label"),
    "messages": ("messages", "conversations", "conversation"),
    "label": ("label", "labels", "class", "sentiment"),
    "chosen": ("chosen", "preferred"),
    "rejected": ("rejected", "dispreferred"),
}
KINDS = {
    "sft": (("messages",), ("prompt", "completion"), ("text",)),
    "classification": (("text", "label"),),
    "preference": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "reference": (("prompt", "reference"),),
    "prompt": (("prompt",), ("messages",), ("text",)),
}


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a file, each a mapping of column names to values.

    Raises:
        ValueError: for a file that is missing, empty, or not what its suffix says; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"file {path} does not exist")
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if suffix == ".parquet":
        rows = _parquet_rows(path)
    elif suffix not in (".jsonl", ".json", ".csv", ".tsv"):
        rows = [{"text": line} for line in read_lines(path)]
    elif suffix == ".jsonl":
        rows = _json_lines(path)
    elif suffix == ".json":
        try:
            rows = json.loads(read_text(path))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
    else:
        text = io.StringIO(read_text(path), newline="")
        rows = list(csv.DictReader(text, delimiter="\t" if suffix == ".tsv" else ","))
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold rows with named columns: a list of objects")
    if not rows:
        raise ValueError(f"{path} is empty; it needs at least one row")
    return rows


def read_lines(path: str | Path) -> list[str]:
    """The lines of a text file without their ends: split at line feeds only, so that parallel files stay parallel."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"file {path} does not exist")
    text = read_text(path)
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    return lines[:-1] if lines and not lines[-1] else lines


def _json_lines(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} must be an object with named columns, not {line[:40]!r}")
        rows.append(row)
    return rows


def _parquet_rows(path: Path) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from None


def select_columns(
    rows: Sequence[Mapping[str, Any]], kind: str, named: Mapping[str, str | None], source: str
) -> list[Row]:
    """`rows` with the columns of `kind` alone, renamed to their roles.

    Args:
        named: role -> column name, where the user named it; the others are recognised by `ALIASES`, and an `input`
            beside a recognised `instruction` follows it in the prompt, after a blank line.
        source: what the error message calls the rows.

    Raises:
        ValueError: listing the columns there are, where those that `kind` needs are missing or not recognised.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    wanted = {role: column for role, column in named.items() if column is not None}
    for role, column in wanted.items():
        if column not in columns:
            raise ValueError(f"{source} has no column {column!r} for --{role}_column; it has: {', '.join(columns)}")
    for roles in KINDS[kind]:
        # A role that the user named decides for the kind that has it.
        if set(wanted) - set(roles):
            continue
        found = {role: wanted.get(role) or next((c for c in ALIASES[role] if c in columns), None) for role in roles}
        if all(found.values()):
            selected = [{role: row.get(str(column)) for role, column in found.items()} for row in rows]
            if "prompt" not in wanted and found.get("prompt") == "instruction" and "input" not in found.values():
                selected = [{**chosen, "prompt": _with_input(row)} for row, chosen in zip(rows, selected, strict=True)]
            return selected
    needed = " or ".join(" + ".join(roles) for roles in KINDS[kind])
    flags = ", ".join(dict.fromkeys(f"--{role}_column" for roles in KINDS[kind] for role in roles))
    raise ValueError(
        f"{source} has the columns {', '.join(columns)}, and {needed} is needed; name the columns with {flags}"
    )


def _with_input(row: Mapping[str, Any]) -> Any:
    """An instruction and, after a blank line, the input it is about, where the row has one."""
    parts = [row.get("instruction"), row.get("input")]
    if not all(isinstance(part, str) and part.strip() for part in parts):
        return parts[0]
    return "\n\n".join(map(str, parts))


@dataclass
class Skipped:
    """Rows that were left out, by reason, and the first of each, counted from 1."""

    rows: int
    reasons: Counter[str] = field(default_factory=Counter)
    first: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return "; ".join(
            f"{count:,} of {self.rows:,} rows skipped: {reason}"
            + (f", first row {self.first[reason]:,}" if reason in self.first else "")
            for reason, count in self.reasons.items()
        )


def drop_unusable(rows: Sequence[Row]) -> tuple[list[Row], Skipped]:
    """The rows that a task can learn from, and how many it cannot and why.

    Unusable are an empty prompt, completion, text or answer, and a conversation that is malformed or in which the
    assistant says nothing.
    """
    kept, skipped = [], Skipped(len(rows))
    for number, row in enumerate(rows, 1):
        reason = next((reason for role in row if (reason := _fault(role, row[role]))), None)
        if reason is None:
            kept.append(row)
        else:
            skipped.reasons[reason] += 1
            skipped.first.setdefault(reason, number)
    return kept, skipped


def _fault(role: str, value: Any) -> str | None:
    """Why a row with this value cannot be used, or None."""
    if role == "label":
        return "no label" if value is None or value == "" else None
    if isinstance(value, str):
        return None if value.strip() else f"empty {role}"
    if value is None or not value:
        return f"empty {role}"
    if not isinstance(value, list):
        return f"{role} is not text"
    if role == "reference" and all(isinstance(option, str) for option in value):
        return None
    if not all(isinstance(turn, Mapping) and "role" in turn and "content" in turn for turn in value):
        return f"{role} has a turn without role or content"
    if not all(isinstance(turn["content"], str | list | None) for turn in value):
        return f"{role} has a turn whose content is not text"
    if role == "reference" and first_answer(value) is None:
        return "no assistant turn"
    if role == "messages" and not any(turn["role"] == "assistant" and turn["content"] for turn in value):
        return "no assistant turn"
    return None


def first_answer(turns: Sequence[Mapping[str, Any]]) -> str | None:
    """What the assistant says first in a conversation, or None."""
    said = (turn["content"] for turn in turns if turn["role"] == "assistant")
    return next((content for content in said if isinstance(content, str) and content.strip()), None)


def check_alike(rows: Sequence[Row], source: str, *, across_roles: bool = False) -> None:
    """Refuses rows of which some hold text and others messages where a trainer takes only one of them.

    `across_roles` says that this holds for all roles of a row together, too.

    Raises:
        ValueError: naming the `source` and a row of each.
    """
    seen: dict[tuple[str, bool], int] = {}
    for number, row in enumerate(rows, 1):
        for role, value in row.items():
            if value and isinstance(value, str | list):
                seen.setdefault(("" if across_roles else role, isinstance(value, list)), number)
    for (role, has_messages), number in seen.items():
        if has_messages and (role, False) in seen:
            raise ValueError(
                f"{source} mixes text and messages{f' as its {role}' if role else ''}: row {seen[role, False]:,} "
                f"holds text and row {number:,} holds messages; one file holds one of them"
            )


def count_overlap(train: Sequence[Row], held_out: Sequence[Row]) -> int:
    """How many rows of `held_out` also stand in `train`; labels and answers count, spaces at the ends do not."""
    seen = {_key(row) for row in train}
    return sum(_key(row) in seen for row in held_out)


def _key(row: Row) -> str:
    return json.dumps(
        {role: value.strip() if isinstance(value, str) else value for role, value in row.items()},
        sort_keys=True,
        default=str,
    )


def pair_lines(prompt_file: str | Path, reference_file: str | Path) -> list[Row]:
    """Rows of two text files that run in parallel, columns `prompt` and `reference`.

    Raises:
        ValueError: if they differ in length.
    """
    prompts = [str(row["prompt"]) for row in read_prompts(prompt_file)]
    references = read_lines(reference_file)
    if len(prompts) != len(references):
        raise ValueError(
            f"{prompt_file} has {len(prompts):,} prompts but {reference_file} has {len(references):,} lines; "
            "they must run in parallel"
        )
    return [{"prompt": p, "reference": r} for p, r in zip(prompts, references, strict=True)]


def read_prompts(path: str | Path, prompt_column: str | None = None) -> list[Row]:
    """The rows of a file with their prompt under `prompt`, and all their other columns as they are."""
    rows = read_rows(path)
    chosen = select_columns(rows, "prompt", {"prompt": prompt_column}, str(path))
    return [{**row, "prompt": next(iter(one.values()))} for row, one in zip(rows, chosen, strict=True)]
