"""Reads what runs left in their folders: stages, curves, measures, answers. Of strangers, too: nothing is loaded."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_decoder.costs.accounting import flops_per_token
from hf_decoder.costs.presets import Shape

RECORD = "assistant.json"  # the stages of a run of all of them, in order
TESTS = "eval"  # the folder of what was measured of them: TEST/STAGE
MOST_BYTES = 64 * 2**20
MOST_ANSWERS = 4


def is_number(value: Any) -> bool:
    """Whether a value of a file is a finite number that a float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < sys.float_info.max


@dataclass
class StageRun:
    """One training: what it measured, its curve, and what its tests found."""

    name: str
    folder: Path
    results: Mapping[str, Any]
    history: list[Mapping[str, Any]]
    seconds: float | None = None
    command: str | None = None
    tests: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    answers: dict[str, list[Mapping[str, Any]]] = field(default_factory=dict)

    def number(self, *names: str) -> float | None:
        """The first of these measures that is there and a number."""
        return next((self.results[name] for name in names if is_number(self.results.get(name))), None)

    @property
    def tokens(self) -> float | None:
        """Tokens that were trained on."""
        seen = self.number("num_input_tokens_seen", "eval_num_tokens")
        if seen is None:
            seen = next((e["num_tokens"] for e in reversed(self.history) if is_number(e.get("num_tokens"))), None)
        return seen

    @property
    def flops(self) -> float | None:
        """Floating-point operations of the training, by `costs.accounting.flops_per_token`; None if unknown.

        What reinforcement learning samples comes on top.
        """
        shape, tokens = _shape(self.folder / "config.json"), self.tokens
        if shape is None or not tokens:
            return None
        context = self.number("block_size", "max_length") or shape.max_position_embeddings
        return flops_per_token(shape, min(int(context), shape.max_position_embeddings)) * tokens


@dataclass
class Run:
    """All stages of a run."""

    name: str
    folder: Path
    stages: list[StageRun]


def read_run(folder: str | Path) -> Run:
    """The run in `folder`: that of `assistant`, or of a single training.

    Raises:
        ValueError: if there is none, or one of its files is damaged.
    """
    folder = Path(folder)
    name = folder.resolve().name
    if (folder / RECORD).is_file():
        record = _object(_read(folder / RECORD)).get("stages")
        stages = []
        for stage, entry in _object(record).items():
            entry = _object(entry)
            if Path(stage).name == stage and (folder / stage / "trainer_state.json").is_file():
                found = _read_stage(stage, folder / stage)
                found.seconds = entry["seconds"] if is_number(entry.get("seconds")) else None
                found.command = str(entry["command"]) if "command" in entry else None
                _add_tests(found, folder / TESTS)
                stages.append(found)
        if stages:
            return Run(name, folder, stages)
    elif (folder / "trainer_state.json").is_file():
        return Run(name, folder, [_read_stage(name, folder)])
    raise ValueError(f"{folder} holds no finished training; name the folder of assistant, pretrain or finetune")


def _read_stage(name: str, folder: Path) -> StageRun:
    history = _object(_read(folder / "trainer_state.json")).get("log_history")
    entries: list[Mapping[str, Any]] = (
        [entry for entry in history if isinstance(entry, dict)] if isinstance(history, list) else []
    )
    return StageRun(name, folder, _object(_read(folder / "all_results.json")), entries)


def _add_tests(stage: StageRun, folder: Path) -> None:
    for path in sorted(folder.glob(f"*/{stage.name}/eval_results.json")):
        test = path.parents[1].name
        stage.tests[test] = _object(_read(path))
        answers = path.with_name("predictions.jsonl")
        if answers.is_file():
            with answers.open(encoding="utf-8", errors="replace") as lines:
                first = [lines.readline(MOST_BYTES) for _ in range(MOST_ANSWERS)]
            stage.answers[test] = [row for row in map(_parsed, filter(str.strip, first)) if isinstance(row, dict)]


def _read(path: Path) -> Any:
    if not path.is_file():
        return {}
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has more than {MOST_BYTES:,} bytes, which no run of ours writes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _shape(path: Path) -> Shape | None:
    """The shape that a config.json of a Llama-like model tells, or None."""
    try:
        config = _object(_read(path))
    except ValueError:
        return None
    heads = config.get("num_attention_heads")
    values: dict[str, Any] = {name: config.get(name) for name in Shape.__dataclass_fields__}
    if not values["head_dim"] and isinstance(heads, int) and heads > 0:
        values["head_dim"] = (config.get("hidden_size") or 0) // heads
    sizes = [value for name, value in values.items() if name != "tie_word_embeddings"]
    # As many layers as no model has would be as many steps of a loop.
    if not all(isinstance(size, int) and 0 < size < 10**7 for size in sizes) or values["num_hidden_layers"] > 10**4:
        return None
    return Shape(**values)
