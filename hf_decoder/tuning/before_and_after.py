"""Says what a stage changed: its measures before and after, and what the model wrote of the same prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_decoder.evaluation.batch_generation import complete, encode_prompt
from hf_decoder.reporting.markup import fenced

MOST_PROMPTS = 4
NEW_TOKENS = 64


def fitting_prompts(prompts: Sequence[Any], model: Any, tokenizer: Any) -> list[Any]:
    """The first few of `prompts` that leave room for an answer in the model's context."""
    limit = getattr(model.config, "max_position_embeddings", None) or 2**31
    return [prompt for prompt in prompts if prompt and _length(prompt, tokenizer) + NEW_TOKENS <= limit][:MOST_PROMPTS]


def _length(prompt: Any, tokenizer: Any) -> float:
    try:
        return len(encode_prompt(tokenizer, prompt))
    except ValueError:  # of a template that takes no such beginning of a chat
        return float("inf")


def answers(model: Any, tokenizer: Any, prompts: Sequence[Any]) -> list[str]:
    """The likeliest answers of a model that is being trained."""
    was_training = model.training
    model.eval()
    found = list(complete(model, tokenizer, prompts, {"do_sample": False, "max_new_tokens": NEW_TOKENS}))
    model.train(was_training)
    return found


def write_answers(path: Path, prompts: Sequence[Any], before: Sequence[str], after: Sequence[str]) -> None:
    """Writes prompts and the answers before and after the training as Markdown."""
    lines = ["# Answers before and after", "", "The likeliest tokens, not chosen by hand.", ""]
    for number, (prompt, *both) in enumerate(zip(prompts, before, after, strict=True), 1):
        asked = (
            prompt if isinstance(prompt, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)
        )
        lines += [f"## {number}", ""]
        for heading, text in zip(("Prompt", "Before", "After"), (asked, *both), strict=True):
            lines += [f"{heading}:", "", fenced(text), ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def describe_change(
    history: Sequence[Mapping[str, Any]], measured: Mapping[str, Any], measures: Mapping[str, str]
) -> str:
    """What the stage changed, in a line: each measure before and after.

    Args:
        history: Trainer's, whose first evaluation is the one before the training.
        measured: the measures of the end; empty where no rows are held out, and the training's own tell.
        measures: metric -> its name; without the first one nothing is known.
    """
    names = dict(measures) if measured else {key.removeprefix("eval_"): name for key, name in measures.items()}
    key = next(iter(names))
    first = next((entry for entry in history if entry.get(key) is not None), {})
    last = measured or next((entry for entry in reversed(history) if entry.get(key) is not None), {})
    where = "on the held-out rows" if measured else "in training, no rows being held out"
    if key not in first or key not in last:
        return f"what the stage changed is not known: no {names[key]} was measured"
    pairs = [
        (name, first[one], last[one]) for one, name in names.items() if None not in (first.get(one), last.get(one))
    ]
    shown = ", ".join(f"{name} {_number(before)} -> {_number(after)}" for name, before, after in pairs)
    if all(_number(before) == _number(after) for _, before, after in pairs):
        return f"the stage changed nothing {where}: {shown}; more steps or a higher --learning_rate may"
    return f"the stage changed, {where}: {shown}"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
