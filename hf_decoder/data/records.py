"""Reads rows of prompts, answers, conversations, labels and preferences, and recognises them by their columns.

A file is .jsonl, .ndjson, .json, .csv, .tsv or .parquet with named columns. Any other suffix is text with one row per
line (column `text`). All but parquet may be compressed. `KINDS` lists the columns that a task accepts, the preferred
ones first. In rows of Alpaca and Dolly (Taori et al. 2023; Conover et al. 2023), the prompt is the `instruction`
followed by its `input` or `context`. A `system` text, a `history` or `tools` beside a prompt turn it into messages.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_decoder.data.conversations import (
    Unusable,
    first_answer,
    is_learned,
    parse,
    read_tools,
    read_turns,
    says_something,
    start_in_common,
    system_apart,
    text_fault,
    turns_fault,
    without_last_answer,
)
from hf_decoder.data.reading import check_rows, plain_name, read_text

Row = dict[str, Any]

# role -> column names in public data sets, in lower case; the role's own name first
ALIASES = {
    "text": ("text", "sentence", "review", "content"),
    "prompt": ("prompt", "instruction", "question", "conversations", "conversation", "input", "source"),
    "completion": ("completion", "response", "output", "answer", "target"),
    "reference": ("reference", "references", "completion", "response", "output", "answer", "target", "label"),
    "messages": ("messages", "conversations", "conversation"),
    "label": ("label", "labels", "class", "sentiment"),
    "chosen": ("chosen", "preferred"),
    "rejected": ("rejected", "dispreferred"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools", "functions"),
    "chat_template_kwargs": ("chat_template_kwargs",),
}
VAGUE = ("input", "source")  # of a prompt: beside a chat or a text they may say something else
# prompt column -> columns that are appended to it after a blank line
COMPANIONS = {"instruction": ("input", "context"), "question": ("context",)}
# columns beside a conversation: the first two become turns, the others go to the chat template
SURROUNDINGS = ("system", "history", "tools", "chat_template_kwargs")
TO_TEMPLATE = ("tools", "chat_template_kwargs")
COLUMNS = "columns"  # of a row of prompts: what rewards read beside the prompt, by column
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
EMPTY: tuple[Any, ...] = (None, "", [], {})  # values that a table has where a row has none
BETWEEN = "\n\n"  # between a recognised prompt and its answer, and between the parts of a prompt
KINDS = {
    "sft": (("messages",), ("prompt", "completion"), ("text",)),
    "classification": (("text", "label"),),
    "preference": (("prompt", "chosen", "rejected"), ("chosen", "rejected")),
    "kto": (("prompt", "completion", "label"),),
    "rewarded": (("prompt", "reference"), ("prompt",), ("messages",)),
    "reference": (("prompt", "reference"),),
    "prompt": (("prompt",), ("messages",), ("text",)),
}


def read_rows(path: str | Path) -> list[Row]:
    """Reads the rows of a file, each a mapping of column names to values.

    Raises:
        ValueError: for a file that is missing, empty, or not in the format of its suffix; names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"file {path} does not exist")
    suffix = Path(plain_name(path)).suffix
    rows: Any
    if suffix == ".parquet":
        rows = _parquet_rows(path)
    elif suffix in (".jsonl", ".ndjson"):
        rows = _json_lines(path)
    elif suffix == ".json":
        try:
            rows = json.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is not JSON: {error}") from None
    elif suffix in (".csv", ".tsv"):
        rows = _table_rows(path, "\t" if suffix == ".tsv" else ",")
    else:
        rows = [{"text": line} for line in read_lines(path)]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} must hold rows with named columns: a list of objects")
    if not rows:
        raise ValueError(f"{path} is empty; it needs at least one row")
    return rows


def read_lines(path: str | Path) -> list[str]:
    """Reads the lines of a text file, split at line feeds only, so that parallel files stay parallel."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"file {path} does not exist")
    lines = [line.removesuffix("\r") for line in read_text(path).split("\n")]
    return lines[:-1] if lines and not lines[-1] else lines


def _json_lines(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} must be an object with named columns, not {line[:40]!r}")
        rows.append(row)
    return rows


def _table_rows(path: Path, delimiter: str) -> list[Row]:
    csv.field_size_limit(2**31 - 1)  # a field may be a book
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    try:
        names = next(reader, [])
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"{path} has two columns {twice[0]!r}; give each its own name")
        for fields in reader:
            if len(fields) > len(names):
                raise ValueError(
                    f"{path}, line {reader.line_num} has {len(fields)} fields and the first line names {len(names)}: "
                    f"a field that holds {delimiter!r} stands in double quotes"
                )
            if fields:
                rows.append(dict(itertools.zip_longest(names, fields)))
    except csv.Error as error:
        raise ValueError(
            f"{path}, line {reader.line_num} cannot be read: {error}; a field that begins with a double quote ends "
            'with one, and those inside it are written twice ("")'
        ) from None
    return rows


def _parquet_rows(path: Path) -> list[Row]:
    import pyarrow.parquet

    check_rows(path, path)
    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is not a parquet file: {error}") from None


class Selection(list[Row]):
    """Rows of one kind, by role.

    `unused`: column that no role uses -> how many rows have a value there. `separator`: goes between prompt and answer
    where no space does. It is empty for TRL's column names, because TRL joins the two as they are.
    """

    unused: dict[str, int]
    separator: str


def select_columns(
    rows: Sequence[Mapping[str, Any]], kind: str, named: Mapping[str, str | None], source: str
) -> Selection:
    """Keeps the columns of `kind`, renamed to their roles.

    Conversations have the form of `conversations.read_turns`. If any row has a `system` text, a `history` or `tools`
    beside a text prompt, all rows become conversations. A value that cannot be used is `Unusable`.

    Args:
        named: role -> column, where the user named it. Others are recognised by `ALIASES`; `COMPANIONS` of a
            recognised prompt are appended to it.
        source: name of the rows in error messages.

    Raises:
        ValueError: if columns that `kind` needs are missing; lists the columns.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    wanted = {role: column for role, column in named.items() if column is not None}
    for role, column in wanted.items():
        if column not in columns:
            raise ValueError(f"{source} has no column {column!r} for --{role}_column; it has: {', '.join(columns)}")
    by_name = {column.lower(): column for column in reversed(columns)}
    attempts = (True, False) if kind in ("prompt", "rewarded") else (False,)
    for is_first, roles in itertools.product(attempts, KINDS[kind]):
        # Columns that the user named decide which set of roles it is.
        if set(wanted) - set(roles):
            continue
        # At first, a chat or a text goes before them, and a chat is one of which the answer is cut.
        hidden = (*VAGUE, *(ALIASES["messages"] if roles == ("prompt",) else ())) if is_first else ()
        free = {name: column for name, column in by_name.items() if name not in hidden}
        found = {
            role: wanted.get(role) or next((free[name] for name in ALIASES[role] if name in free), "")
            for role in roles
        }
        if all(found.values()):
            return _select(rows, kind, found, by_name, set(wanted))
    needed = " or ".join(" + ".join(roles) for roles in KINDS[kind])
    flags = ", ".join(dict.fromkeys(f"--{role}_column" for roles in KINDS[kind] for role in roles))
    raise ValueError(
        f"{source} has the columns {', '.join(columns)}, and {needed} is needed; name the columns with {flags}"
    )


def _select(
    rows: Sequence[Mapping[str, Any]], kind: str, found: dict[str, str], by_name: dict[str, str], named: set[str]
) -> Selection:
    """Does `select_columns` with the column `found` for each role; `by_name` maps lower-case names to columns."""
    free = {name: column for name, column in by_name.items() if column not in found.values()}
    about = COMPANIONS.get(found.get("prompt", "").lower(), ()) if "prompt" not in named else ()
    companions = [free[name] for name in about if name in free]
    is_answering = kind == "kto" or not {"label", "text"} & found.keys()
    around = {
        role: next(free[name] for name in ALIASES[role] if name in free)
        for role in (SURROUNDINGS if is_answering else ())
        if any(name in free for name in ALIASES[role])
    }
    media = [free[name] for name in MEDIA if is_answering and name in free]
    selected = Selection()
    surroundings = [{role: _surrounding(role, row.get(column)) for role, column in around.items()} for row in rows]
    talks = any(value for beside in surroundings for role, value in beside.items() if role != "chat_template_kwargs")
    for row, beside in zip(rows, surroundings, strict=True):
        values = {role: row.get(column) for role, column in found.items()}
        if companions:
            values["prompt"] = _joined(values["prompt"], {column: row.get(column) for column in companions})
        if kind == "kto":
            values["label"] = _verdict(values["label"])
        if is_answering:
            values = {role: read_turns(value) for role, value in values.items()}
            lost = [column for column in media if row.get(column) not in EMPTY]
            unread = next((value for value in beside.values() if isinstance(value, Unusable)), None)
            if lost or unread:
                values = dict.fromkeys(values, unread or Unusable(f"its {lost[0]} cannot be read, only text"))
            elif kind == "preference":
                values = _pair(values, beside, talks)
            elif talks:
                values = _surround(values, beside)
            if talks or any(isinstance(value, list) for value in values.values()):
                values |= {role: beside[role] for role in TO_TEMPLATE if role in beside}
        selected.append(values)
    used = {*found.values(), *companions, *around.values(), *media}
    if not any(set(TO_TEMPLATE) & values.keys() for values in selected):
        used -= {around[role] for role in TO_TEMPLATE if role in around}
    others = [column for column in dict.fromkeys(column for row in rows for column in row) if column not in used]
    counts = {column: sum(row.get(column) not in EMPTY for row in rows) for column in others}
    selected.unused = {column: count for column, count in counts.items() if count}
    answers = {"completion", "chosen", "reference", "references"}
    as_is = found.get("prompt") == "prompt" and not answers.isdisjoint(found.values())
    meets = all(_meets(values) for values in selected)
    selected.separator = "" if "prompt" not in found or as_is or meets else BETWEEN
    return selected


def describe_unused(counts: Mapping[str, int], kind: str = "that are not used") -> str:
    """A line about the columns of `Selection.unused`, which are of this kind."""
    return f"columns {kind}: " + ", ".join(f"{name} ({count:,} rows)" for name, count in counts.items())


def separate(row: Row, separator: str) -> Row:
    """The row with `separator` after its prompt, if that is text and does not end in a space."""
    prompt = row.get("prompt")
    return {**row, "prompt": prompt + separator} if isinstance(prompt, str) and not prompt[-1:].isspace() else row


def _joined(prompt: Any, companions: Mapping[str, Any]) -> Any:
    """Joins an instruction and its companions by blank lines; empty ones are left out."""
    if not isinstance(prompt, str) or not prompt.strip():
        return prompt
    parts = {column: value for column, value in companions.items() if value not in EMPTY}
    if others := [column for column, value in parts.items() if not isinstance(value, str)]:
        return Unusable(f"its {others[0]} is not text")
    return BETWEEN.join([prompt, *(part for part in parts.values() if part.strip())])


def _meets(values: Row) -> bool:
    """Whether a space separates a prompt from each of its answers."""
    texts = [value for value in values.values() if isinstance(value, str) and not isinstance(value, Unusable)]
    return len(texts) < 2 or texts[0][-1:].isspace() or all(text[:1].isspace() for text in texts[1:])


def _surrounding(role: str, value: Any) -> Any:
    """Reads a column beside a conversation: turns, tools or options of the template; None if it is empty."""
    if role == "system":
        value = [{"role": "system", "content": value}] if isinstance(value, str) and value.strip() else value or None
        return value if value is None or isinstance(value, list) else Unusable("its system is not text")
    if role == "tools":
        return read_tools(value)
    is_text = isinstance(value, str) and value.strip()
    read = parse(value) if is_text else value or None
    if is_text and read is None:
        return Unusable(f"its {role} is no list of turns: {value[:40]!r}")
    if role == "chat_template_kwargs":
        return (
            read if read is None or isinstance(read, Mapping) else Unusable("its chat_template_kwargs are no mapping")
        )
    if isinstance(read, list) and all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in read):
        names = ("user", "assistant")
        return [{"role": name, "content": text} for pair in read for name, text in zip(names, pair, strict=True)]
    turns = read_turns(read)
    return turns if turns is None or isinstance(turns, list) else Unusable("its history is no list of turns")


def _surround(values: Row, beside: Row) -> Row:
    """Turns a row into a conversation that begins with its system and history columns."""
    first = next(iter(values))
    start, answer = values[first], values.get("completion")
    before = [*(beside.get("system") or []), *(beside.get("history") or [])]
    if isinstance(start, str) and start.strip():
        start = [{"role": "user", "content": start}]
    if not isinstance(start, list) or not start:
        return values
    if first == "prompt" and not isinstance(values["prompt"], list) and "completion" in values:
        if not isinstance(answer, str) or not answer.strip():
            return {"messages": Unusable("empty completion")}
        said = [{"role": "assistant", "content": answer}]
        if "label" in values:  # of the answer alone
            return {**values, "prompt": [*before, *start], "completion": said}
        return {"messages": [*before, *start, *said]}
    if before and isinstance(start[0], Mapping) and start[0].get("role") == "system":
        if beside.get("system") and beside["system"] != start[:1]:
            return {**values, first: Unusable("its system column is not what its system turn says")}
        before = before[len(beside.get("system") or []) :]
        return {**values, first: [start[0], *before, *start[1:]]}
    return {**values, first: [*before, *start]}


def _verdict(label: Any) -> Any:
    """Whether an answer is good, as a label says it: true or false, 1 or 0, also as text."""
    known = {"true": True, "1": True, "false": False, "0": False}
    found = known.get(str(label).strip().lower().removesuffix(".0"))
    return Unusable("its label is neither true nor false") if found is None else found


def _pair(values: Row, beside: Row, talks: bool) -> Row:
    """Turns a row into a preference for TRL: all text, or turns with the common start of both chats as prompt."""
    prompt, answers = values.get("prompt"), [values["chosen"], values["rejected"]]
    if answers[0] == answers[1]:
        return {**values, "chosen": Unusable("chosen and rejected are the same")}
    if not talks and not any(isinstance(value, list) for value in values.values()):
        return values
    if any(value is None or _fault("answer", value) for value in answers):
        return values
    chosen, rejected = ([{"role": "assistant", "content": x}] if isinstance(x, str) else x for x in answers)
    common = start_in_common(chosen, rejected)
    if isinstance(prompt, str) and prompt.strip():
        asked = [turn for turn in chosen[:common] if turn["role"] == "user" and turn["content"]]
        if asked and not any(str(turn["content"]).strip() == prompt.strip() for turn in asked):
            return {**values, "prompt": Unusable("its prompt is no turn of its chosen answer")}
        prompt = [] if asked else [{"role": "user", "content": prompt}]
    elif prompt is not None and (not isinstance(prompt, list) or (prompt and _fault("prompt", prompt))):
        return values
    (system, turns), (own, said) = system_apart(prompt or []), system_apart(chosen[:common])
    if system and own and system != own:
        return {**values, "prompt": Unusable("its system turn is not that of its chosen answer")}
    # the chats begin with all of the prompt, or with its last turns
    told = next(n for n in range(min(len(turns), len(said)), -1, -1) if turns[len(turns) - n :] == said[:n])
    before = _surround({"prompt": [*(system or own), *turns[: len(turns) - told], *said]}, beside)["prompt"]
    pair = {"prompt": before, "chosen": chosen[common:], "rejected": rejected[common:]}
    for role in ("chosen", "rejected"):
        if not pair[role] or pair[role][0]["role"] != "assistant":
            return dict.fromkeys(pair, Unusable(f"{role} does not go on with the assistant where the prompt ends"))
    return pair


@dataclass
class Skipped:
    """Counts the rows that were left out by reason, with the first row of each, counted from 1."""

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
    """Separates the rows that a task can learn from; counts the others by reason.

    A row is unusable if its prompt, completion, text or answer is empty, or if its conversation is malformed or the
    assistant says nothing in it.
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
    if isinstance(value, Unusable):
        return str(value)
    if role in (*TO_TEMPLATE, COLUMNS):
        return None
    if role == "label":
        is_one = isinstance(value, str | int | float) and value == value and str(value).strip()  # NaN is none
        return text_fault(role, str(value)) if is_one else "no single label"
    if isinstance(value, str) and value.strip():
        return "messages is text, not a list of turns" if role == "messages" else text_fault(role, value)
    if value is None or not value or isinstance(value, str):
        return f"empty {role}"
    if not isinstance(value, list):
        return f"{role} is not text"
    if role == "reference" and all(isinstance(option, str) for option in value):
        return next((fault for option in value if (fault := text_fault(role, option))), None)
    if fault := turns_fault(role, value):
        return fault
    if role == "reference" and first_answer(value) is None:
        return "no assistant turn"
    answers = [turn for turn in value if turn["role"] == "assistant" and is_learned(turn)]
    if role == "messages" and not any(map(says_something, answers)):
        return "no assistant turn"
    if role in ("messages", "completion", "chosen", "rejected") and not all(map(says_something, answers)):
        return f"{role} has an assistant turn that says nothing"
    return None


def check_alike(rows: Sequence[Row], source: str, *, across_roles: bool = False) -> None:
    """Refuses rows that mix text and messages, in one role or, with `across_roles`, in all of them together.

    Raises:
        ValueError: naming the `source` and a row of each.
    """
    seen: dict[tuple[str, bool], int] = {}
    for number, row in enumerate(rows, 1):
        for role, value in row.items():
            if value and isinstance(value, str | list) and not isinstance(value, Unusable):
                seen.setdefault(("" if across_roles else role, isinstance(value, list)), number)
    for (role, has_messages), number in seen.items():
        if has_messages and (role, False) in seen:
            raise ValueError(
                f"{source} mixes text and messages{f' as its {role}' if role else ''}: row {seen[role, False]:,} "
                f"holds text and row {number:,} holds messages; one file holds one of them"
            )


def pair_lines(prompt_file: str | Path, reference_file: str | Path, prompt_column: str | None = None) -> list[Row]:
    """Reads a file of prompts and one of reference lines, in parallel, as rows with `prompt` and `reference`.

    Raises:
        ValueError: if they differ in length.
    """
    prompts = [row["prompt"] for row in read_prompts(prompt_file, prompt_column)[0]]
    references = read_lines(reference_file)
    if len(prompts) != len(references):
        raise ValueError(
            f"{prompt_file} has {len(prompts):,} prompts but {reference_file} has {len(references):,} lines; "
            "they must run in parallel"
        )
    return [{"prompt": p, "reference": r} for p, r in zip(prompts, references, strict=True)]


def read_prompts(path: str | Path, prompt_column: str | None = None) -> tuple[list[Row], list[str]]:
    """Reads the rows of a file with their prompt as `prompt`; all other columns stay as they are.

    A conversation is a prompt up to what the assistant says at its end. Also returns lines about what no prompt holds.

    Raises:
        ValueError: as `read_rows` and `select_columns`; and for a prompt that cannot be rendered, naming its row.
    """
    rows, answered = read_rows(path), 0
    chosen = select_columns(rows, "prompt", {"prompt": prompt_column}, str(path))
    for number, one in enumerate(chosen, 1):
        prompt = next(iter(one.values()))
        fault = _fault("prompt", prompt) if isinstance(prompt, list | str) and str(prompt).strip() else None
        if not fault and one.get("tools"):
            fault = "its tools are passed to no model here"
        elif not fault and isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            prompt, answered = without_last_answer(prompt), answered + 1
            fault = None if prompt else "only the assistant speaks in it"
        if fault:
            raise ValueError(f"{path}, row {number:,}: {fault}")
        rows[number - 1] = {**rows[number - 1], "prompt": prompt}
    lines = [f"{path}: {describe_unused(chosen.unused, 'that are no part of the prompts')}"] if chosen.unused else []
    if answered:
        lines.append(f"{path}: {answered:,} of {len(rows):,} conversations end with an answer, which is left out")
    return rows, lines
