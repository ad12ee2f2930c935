"""Reads the rows of a fine-tuning task, renders chats by the template, and counts the rows that teach nothing.

TRL's SFTTrainer puts the loss on completions when rows have a `completion`, and on the assistant's turns when asked by
`assistant_only_loss`; which tokens those are, the chat template's generation block says.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_decoder.data.conversations import (
    Rendering,
    Unusable,
    first_answer,
    is_learned,
    turns_fault,
    weighted_rows,
    without_weights,
)
from hf_decoder.data.label_names import label_map
from hf_decoder.data.packing import IGNORE_INDEX
from hf_decoder.data.records import (
    COLUMNS,
    MEDIA,
    TO_TEMPLATE,
    Row,
    Selection,
    Skipped,
    check_alike,
    describe_unused,
    drop_unusable,
    read_lines,
    read_rows,
    select_columns,
    separate,
)
from hf_decoder.evaluation.batch_generation import encode_prompt
from hf_decoder.evaluation.classification import encode_texts
from hf_decoder.training.callbacks import held_out_prompts
from hf_decoder.training.run_report import example_of, line_of
from hf_decoder.tuning.rewards import OF_TRL, REFERENCE
from hf_decoder.tuning.tasks import TASKS

if TYPE_CHECKING:
    from datasets import Dataset

# task -> kind of rows in `records.KINDS`, where the two have different names
KINDS_OF_ROWS = {"distillation": "sft", "reward": "preference"}
MOST_CHATS = 100  # that are looked through for one that may stand as an example, or for special tokens


@dataclass
class TaskData:
    """The usable rows of a task: what is trained on, what is held out, and what was left out of either."""

    train: list[Row]
    validation: list[Row]
    skipped: dict[str, Skipped]
    overlap: int
    masked: tuple[int, int] = (0, 0)  # of either, how many have no token to learn within the block (`skip_masked`)
    unused: dict[str, dict[str, int]] = field(default_factory=dict)  # by file, columns and in how many rows
    separator: str = ""  # what stands between a prompt of text and its answer (`records.Selection`)

    @property
    def roles(self) -> tuple[str, ...]:
        """The columns of the rows, by their roles."""
        return _roles(self.train)

    @property
    def weighs(self) -> bool:
        """Whether some assistant's turn is not to be learned."""
        return any(not is_learned(turn) for row in [*self.train, *self.validation] for turn in row.get("messages", ()))

    def describe(self) -> dict[str, Any]:
        """What has to stay the same of the rows for a run to go on (`checkpoints.describe_run`)."""
        digest = hashlib.sha256()
        for row in self.train:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode())
        return {"rows": len(self.train), "content": digest.hexdigest()[:16]}

    def counts(self) -> dict[str, int]:
        """How many rows were trained on, held out, and skipped, and how many stand in both parts."""
        return {
            "train_rows": len(self.train) - self.masked[0],
            "eval_rows": len(self.validation) - self.masked[1],
            "skipped_rows": sum(sum(skipped.reasons.values()) for skipped in self.skipped.values()),
            "overlapping_rows": self.overlap,
        }

    def warnings(self, prompt_template: str | None = None) -> list[str]:
        """One line for each thing about the rows that the user should know."""
        lines = [f"{name}: {skipped}" for name, skipped in self.skipped.items() if skipped.reasons]
        kind = "that only a reward can read" if COLUMNS in self.train[0] else "that are not used"
        lines += [f"{name}: {describe_unused(columns, kind)}" for name, columns in self.unused.items() if columns]
        if self.separator and prompt_template is None:
            lines.append(
                "a blank line stands between prompt and answer; eval puts it there for the same columns, and what "
                "generate continues has to end with it (--prompt_template '{prompt}' leaves it out)"
            )
        if self.overlap:
            lines.append(
                f"{self.overlap:,} of {len(self.validation):,} held-out rows also stand in the training rows; "
                "what is measured on them is too good"
            )
        return lines


def load_task(
    task: str,
    train_file: str,
    validation_file: str | None,
    columns: Mapping[str, str | None],
    *,
    completion_files: tuple[str | None, str | None] = (None, None),
    validation_fraction: float = 0.0,
    seed: int = 0,
    needed: Collection[str] = (),
) -> TaskData:
    """Reads the rows of `task` and leaves out those that it cannot use.

    Args:
        columns: role -> column, where the user named it (`records.select_columns`).
        completion_files: for sft, files of completions that run in parallel with the lines of the two files.
        validation_fraction: share of the training rows to hold out where there is no validation file.
        needed: columns without which a row of prompts is of no use, because a reward reads them.

    Raises:
        ValueError: for files or columns that do not fit the task, or without one usable row.
    """
    files = [train_file] if validation_file is None else [train_file, validation_file]
    parts: list[list[Row]] = []
    skipped: dict[str, Skipped] = {}
    unused: dict[str, dict[str, int]] = {}
    separators: list[str] = []
    for path, completions in zip(files, completion_files, strict=False):
        read = _with_completions(path, completions) if completions else read_rows(path)
        rows = _select(read, task, columns, path, needed)
        unused[path] = rows.unused
        separators.append(rows.separator)
        selected, skipped[path] = drop_unusable(rows)
        if not selected:
            raise ValueError(f"{path} has no usable row: {skipped[path]}")
        check_alike(rows, path, across_roles=KINDS_OF_ROWS.get(task, task) == "sft")
        parts.append(selected)
    train, validation = parts if len(parts) == 2 else _hold_out(parts[0], validation_fraction, seed)
    if (here := _roles(train)) != (there := _roles(validation or train)):
        raise ValueError(f"{train_file} has {', '.join(here)} and {validation_file} has {', '.join(there)}")
    if validation and is_conversational(train) != is_conversational(validation):
        raise ValueError(
            f"of {train_file} and {validation_file}, one holds text and the other messages; give two alike"
        )
    if task == "kto":  # TRL takes these rows in order, and learns little from good and bad ones apart
        random.Random(seed).shuffle(train)
    overlap = count_overlap(train, validation)
    return TaskData(train, validation, skipped, overlap, unused=unused, separator=separators[0])


def _select(
    read: Sequence[Row], task: str, columns: Mapping[str, str | None], path: str, needed: Collection[str]
) -> Selection:
    """`records.select_columns`; of prompts, with all other columns under `COLUMNS`, because a reward may read any."""
    if not TASKS[task].samples:
        return select_columns(read, KINDS_OF_ROWS.get(task, task), columns, path)
    rows = select_columns(read, "rewarded", columns, path)
    others = dict.fromkeys(column for row in read for column in row if column not in {*OF_TRL, *MEDIA})
    for number, (whole, row) in enumerate(zip(read, rows, strict=True)):
        beside = {column: whole.get(column) for column in others}
        beside |= {REFERENCE: row[REFERENCE]} if REFERENCE in row else {}
        prompt = row.get("prompt")
        if "messages" in row:
            prompt = turns = row["messages"]
            if isinstance(turns, list) and not turns_fault("messages", turns):
                beside[REFERENCE] = (first_answer(turns) or {}).get("content")
                prompt = list(itertools.takewhile(lambda turn: turn["role"] != "assistant", turns))
        missing = [column for column in needed if beside.get(column) in (None, "", [])]
        if any(row.get(role) for role in TO_TEMPLATE):
            prompt = Unusable("its tools and template options are of no use in sampling")
        elif missing:
            prompt = Unusable(f"no {missing[0]!r}, which a reward reads")
        rows[number] = {"prompt": prompt, COLUMNS: beside}
    rows.unused = {column: count for column, count in rows.unused.items() if column not in needed}
    return rows


def _roles(rows: Sequence[Row]) -> tuple[str, ...]:
    return tuple(role for role in rows[0] if role not in (*TO_TEMPLATE, COLUMNS))


def _with_completions(path: str, completion_file: str) -> list[Row]:
    prompts, completions = read_lines(path), read_lines(completion_file)
    if len(prompts) != len(completions):
        raise ValueError(
            f"{path} has {len(prompts):,} lines but {completion_file} has {len(completions):,}; "
            "they must run in parallel"
        )
    # Lines, unlike TRL's prompts and completions, have no space where they meet.
    return [{"source": p, "target": c} for p, c in zip(prompts, completions, strict=True)]


def count_overlap(train: Sequence[Row], held_out: Sequence[Row]) -> int:
    """How many rows of `held_out` are also in `train`; spaces at the ends do not count."""
    seen = {_key(row) for row in train}
    return sum(_key(row) in seen for row in held_out)


def _key(row: Row) -> str:
    stripped = {role: value.strip() if isinstance(value, str) else value for role, value in row.items()}
    return json.dumps(stripped, sort_keys=True, default=str)


def _hold_out(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    count = round(fraction * len(rows))
    if count == 0:
        return rows, []
    if count >= len(rows):
        raise ValueError(f"{len(rows)} rows are too few to hold out {count} of them; give a validation file")
    chosen = set(random.Random(seed).sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in chosen], [rows[i] for i in sorted(chosen)]


def skip_unrendered(data: TaskData, tokenizer: Any) -> list[str]:
    """Leaves out the conversations that the chat template does not render whole, and says how many and why.

    Returns a line for each file that lost rows, and one about what of turns the template does not read.

    Raises:
        ValueError: if there is no chat template, or no training row is left.
    """
    if tokenizer.chat_template is None:
        raise ValueError(
            "the rows hold messages, or a system text, a history or tools, which make messages of them; the tokenizer "
            f"of {tokenizer.name_or_path} has no chat template"
        )
    lines = []
    rendering = Rendering(tokenizer)
    paths = (next(iter(data.skipped)), next(reversed(data.skipped)))
    for path, part in zip(paths, ("train", "validation"), strict=True):
        rows, kept = getattr(data, part), []
        lost = Skipped(len(rows))
        for row in rows:
            reason = rendering.row_fault(row)
            if reason is None:
                kept.append(row)
            else:
                lost.reasons[reason] += 1
        if rows and not kept and part == "train":
            raise ValueError(f"{path} has no usable row: {lost}")
        setattr(data, part, kept)
        data.skipped[path].reasons.update(lost.reasons)
        lines += [f"{path}: {lost}"] if lost.reasons else []
    if rendering.unused:
        keys = ", ".join(f"{key} ({count:,} conversations)" for key, count in rendering.unused.items())
        lines.append(f"of turns, the chat template does not read: {keys}")
    return lines


def trainer_rows(
    data: TaskData, tokenizer: Any, args: Any, prompt_template: str | None
) -> tuple[Dataset, Dataset | None]:
    """The rows to train on and those held out, as TRL's trainer of `args` takes them; settles where the loss is."""
    if data.weighs:
        rows_of = functools.partial(weighted_rows, tokenizer=tokenizer, assistant_only=args.assistant_only_loss)
        args.assistant_only_loss = False  # the labels say it
    else:
        rows_of = functools.partial(text_rows, prompt_template=prompt_template, separator=data.separator)
    return rows_of(data.train), rows_of(data.validation) if data.validation else None


def text_rows(rows: Sequence[Row], prompt_template: str | None = None, separator: str = "") -> Dataset:
    """Rows for TRL's trainers; a prompt that is text is put into `prompt_template`.

    Without a template, `separator` follows a prompt that does not end in a space.
    """
    from datasets import Dataset, Features, Json, List, Value

    filled = [_fill(row, prompt_template, separator) for row in rows]
    # As JSON, turns keep their own keys: a table gives each the keys of all, without a value.
    kinds = {role: List(Json()) if isinstance(value, list) else Value("string") for role, value in filled[0].items()}
    kinds |= {"tools": Value("string"), "chat_template_kwargs": Json(), "label": Value("bool")}
    features = {role: kinds[role] for role in filled[0]}
    for row, whole in zip(filled, rows, strict=True):
        beside = {column: value for column, value in whole.get(COLUMNS, {}).items() if column not in features}
        # text in a column of JSON is taken for JSON
        row |= {column: json.dumps(value) if isinstance(value, str) else value for column, value in beside.items()}
    return Dataset.from_list(filled, Features({role: features.get(role, Json()) for role in filled[0]}))


def _fill(row: Row, prompt_template: str | None, separator: str = "") -> Row:
    row = {role: value for role, value in row.items() if role != COLUMNS}
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        if prompt_template is None:
            return separate(row, separator)
        return {**row, "prompt": prompt_template.replace("{prompt}", prompt)}
    row = {
        role: without_weights(value) if isinstance(value, list) and role not in TO_TEMPLATE else value
        for role, value in row.items()
    }
    if row.get("tools") is not None:
        row["tools"] = json.dumps(row["tools"])  # which TRL reads
    if "chat_template_kwargs" in row:
        row["chat_template_kwargs"] = row["chat_template_kwargs"] or {}
    return row


def skip_masked(trainer: Any, data: TaskData, prompt_template: str | None = None) -> list[str]:
    """Counts the rows whose prompt fills the block as skipped, and returns a line about those of each file.

    TRL's trainers cut rows at `max_length`. Of such a row nothing is left to learn: it is dropped without a word, or
    packed with the others without a label. Rows of which only the end is cut off have a line too.

    Raises:
        ValueError: if a file has no other rows, naming the length of its shortest prompt and the limit.
    """
    args, lines, masked = trainer.args, [], []
    packing = getattr(args, "packing", False)  # DPO has none
    packs = (packing, packing if getattr(args, "eval_packing", None) is None else args.eval_packing)
    parts = ((data.train, trainer.train_dataset), (data.validation, trainer.eval_dataset))
    paths = (next(iter(data.skipped)), next(reversed(data.skipped)))
    names = (paths[0], paths[1] if paths[1] != paths[0] else f"the held-out part of {paths[0]}")
    for path, name, packed, (rows, prepared) in zip(paths, names, packs, parts, strict=True):
        lost = _count_masked(prepared, len(rows), args.packing_strategy if packed else None) if rows else 0
        masked.append(lost)
        if rows and lost == len(rows):
            filled = [_fill(row, prompt_template, data.separator) for row in rows]
            lengths = [_prompt_length(row, trainer.processing_class) for row in filled]
            raise ValueError(
                f"{name} has no row with an answer to learn: its shortest prompt has {min(lengths):,} tokens, and "
                f"--max_length or the model's context cuts a row off after {args.max_length:,}"
            )
        if lost:
            what = "an answer is longer than" if _is_whole(prepared) else "the prompt fills"
            reason = f"{what} the {args.max_length:,} tokens of --max_length or of the model's context"
            data.skipped[path].reasons[reason] += lost
            lines.append(f"{name}: {lost:,} of {len(rows):,} rows skipped: {reason}")
        if rows and (cut := _count_full(prepared, args, packed)):
            lines.append(
                f"{name}: {cut:,} of {len(rows):,} rows fill the {args.max_length:,} tokens of --max_length or of the "
                "model's context: what is longer is cut off there"
            )
    data.masked = (masked[0], masked[1])
    return lines


def _is_whole(prepared: Dataset) -> bool:
    """Whether rows hold answers together with their prompts, and are never cut, as those of a reward model."""
    return "chosen_ids" in prepared.column_names and "prompt_ids" not in prepared.column_names


def _count_full(prepared: Dataset, args: Any, packed: bool) -> int:
    """How many rows reach `max_length`, where what lies behind is cut off."""
    answers = [name for name in ("chosen_ids", "rejected_ids", "completion_ids") if name in prepared.column_names]
    if _is_whole(prepared):
        return 0
    if answers:
        longest = (len(row["prompt_ids"]) + max(len(row[name]) for name in answers) for row in prepared)
    elif not packed:
        longest = (len(ids) for ids in prepared["input_ids"])
    elif args.packing_strategy == "bfd":
        longest = (length for lengths in prepared["seq_lengths"] for length in lengths)
    else:  # what is longer stands in another row
        return 0
    return sum(length >= args.max_length for length in longest)


def _count_masked(prepared: Dataset, rows: int, strategy: str | None) -> int:
    """How many of `rows` the trainer's `prepared` rows, packed by `strategy`, hold without a label or no longer."""
    if strategy is None:
        return rows - len(prepared)
    if strategy != "bfd":  # nothing is cut off: the rest of a row stands in another
        return 0
    count = 0
    for row in prepared.select_columns(["labels", "seq_lengths"]).with_format("numpy"):
        starts = np.cumsum([0, *row["seq_lengths"][:-1]])
        count += int((np.add.reduceat((row["labels"] != IGNORE_INDEX).astype(int), starts) == 0).sum())
    return count


def _prompt_length(row: Row, tokenizer: Any) -> int:
    """Tokens before the first that the model is to write, those of its tools included."""
    tools = json.loads(row["tools"]) if row.get("tools") else None
    if "messages" not in row:
        return len(encode_prompt(tokenizer, row.get("prompt") or row["chosen"], tools))
    answer = next(number for number, turn in enumerate(row["messages"]) if turn["role"] == "assistant")
    return len(encode_prompt(tokenizer, row["messages"][:answer], tools))


def skip_long_prompts(data: TaskData, tokenizer: Any, prompt_template: str | None, most: int) -> list[str]:
    """Leaves out the rows whose prompt has more than `most` tokens, and returns a line about those of each file.

    Raises:
        ValueError: if a file has no other rows.
    """
    lines = []
    paths = (next(iter(data.skipped)), next(reversed(data.skipped)))
    for path, part in zip(paths, ("train", "validation"), strict=True):
        rows = getattr(data, part)
        lengths = [
            len(encode_prompt(tokenizer, _fill(row, prompt_template, data.separator)["prompt"])) for row in rows
        ]
        kept = [row for row, length in zip(rows, lengths, strict=True) if length <= most]
        reason = f"the prompt has more than the {most:,} tokens that --max_completion_length leaves of the context"
        if rows and not kept:
            raise ValueError(f"{path} has no usable row: {reason}; the shortest has {min(lengths):,}")
        if lost := len(rows) - len(kept):
            data.skipped[path].reasons[reason] += lost
            lines.append(f"{path}: {lost:,} of {len(rows):,} rows skipped: {reason}")
        setattr(data, part, kept)
    return lines


def class_rows(rows: Sequence[Row], tokenizer: Any, label2id: Mapping[str, int], max_length: int | None) -> Dataset:
    """Rows for a classifier: `input_ids` of the text and `labels`, the class id.

    Raises:
        ValueError: counting the labels outside `label2id`.
    """
    from datasets import Dataset

    names = [str(row["label"]) for row in rows]
    label_map(names, list(label2id))
    ids = encode_texts(tokenizer, [row["text"] for row in rows], max_length)
    return Dataset.from_dict({"input_ids": ids, "labels": [label2id[name] for name in names]})


def is_conversational(rows: Sequence[Row]) -> bool:
    """Whether rows hold lists of messages in place of text."""
    return any(isinstance(value, list) for value in rows[0].values())


def example_prompt(data: TaskData, prompt_template: str | None = None) -> Any:
    """A prompt of the user's own rows, text or messages, short enough to stand in a line of code."""
    if data.roles == ("text",):
        return example_of([line_of([row["text"]]) for row in (data.validation or data.train)[:MOST_CHATS]])
    return example_of(prompts_of(data, prompt_template))


def prompts_of(data: TaskData, prompt_template: str | None = None, most: int = MOST_CHATS) -> list[Any]:
    """The prompts of the first `most` held-out rows, or training rows where none is held out: text or messages."""
    rows = (data.validation or data.train)[:most]
    if "messages" in data.roles:
        return [list(itertools.takewhile(lambda turn: turn["role"] != "assistant", row["messages"])) for row in rows]
    if "prompt" in data.roles:
        return [_fill(row, prompt_template, data.separator)["prompt"] for row in rows]
    if data.roles == ("text",):
        return held_out_prompts([row["text"] for row in rows], count=most)
    return [row.get("text") or row["chosen"] for row in rows]
