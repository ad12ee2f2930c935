"""Writes the report of one run, or of several side by side: report.md, report.html and the curves as a picture."""

from __future__ import annotations

import base64
import datetime
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_decoder.reporting.markup import fenced, plain
from hf_decoder.reporting.runs import Run, StageRun, is_number
from hf_decoder.safety.terminal import printable

PICTURE = "report_curves.png"
# What the curve of a stage shows: the first of these that it logged, and its name.
CURVES = {
    "reward": "reward",
    "rewards/margins": "reward margin",
    "loss": "loss",
}
# Measures of a test -> their names, in the order of the columns.
MEASURES = {
    "exact_match": "exact match",
    "chrf": "chrF",
    "bleu": "BLEU",
    "python_parses": "parses",
    "stop_rate": "stops by itself",
    "accuracy": "accuracy",
    "f1": "F1",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
}
WHOLE = {"bleu", "chrf", "perplexity", "bits_per_byte"}  # the others are shares
LONGEST_TEXT = 1500


@dataclass
class Table:
    """Cells as text; the first column says what a row is of."""

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""


def write_report(runs: Sequence[Run], folder: str | Path) -> Path:
    """Writes the report of `runs` into `folder` and returns the path of report.html, one file without others.

    Everything that comes from the runs is shown as text, whatever it holds.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw_curves(runs, folder / PICTURE)
    title = " and ".join(printable(run.name) for run in runs)
    tables = [table for table in (_tests(runs), _tasks(runs), _costs(runs), _data(runs)) if table.rows]
    samples = _samples(runs)
    commands = "\n".join(printable(stage.command) for run in runs for stage in run.stages if stage.command)
    fields: dict[str, Any] = {"picture_title": "curves of all stages"}
    for name, markdown in (("report.md", True), ("report.html", False)):
        loader = FileSystemLoader(Path(__file__).parent)
        env = Environment(loader=loader, autoescape=not markdown, undefined=StrictUndefined, trim_blocks=markdown)
        show = plain if markdown else printable
        block = fenced if markdown else str
        fields |= {
            "title": f"Run {show(title)}" if len(runs) == 1 else f"Runs {show(title)}",
            "intro": show(_intro(runs)),
            "tables": [
                Table(show(t.title), [show(c) for c in t.header], [[show(c) for c in row] for row in t.rows], t.note)
                for t in tables
            ],
            "samples": [
                {
                    "title": show(sample["title"]),
                    "prompt": block(sample["prompt"]),
                    "answers": [(show(label), block(text)) for label, text in sample["answers"]],
                }
                for sample in samples
            ],
            "commands": block(commands) if commands else "",
            "picture": PICTURE if markdown else base64.b64encode((folder / PICTURE).read_bytes()).decode(),
        }
        (folder / name).write_text(env.get_template(name).render(fields), encoding="utf-8")
    return folder / "report.html"


def _intro(runs: Sequence[Run]) -> str:
    """Machine, versions and time, in a line."""
    facts = next((stage.results for run in runs for stage in run.stages if "device" in stage.results), {})
    versions = [f"{name} {facts[name]}" for name in ("python", "torch", "transformers") if name in facts]
    seconds = [sum(stage.seconds or stage.number("train_runtime") or 0 for stage in run.stages) for run in runs]
    times = " and ".join(map(_duration, seconds))
    date = datetime.date.today().isoformat()
    return ", ".join([*([str(facts["device"])] if "device" in facts else []), *versions, f"{times} of training", date])


def _rows(runs: Sequence[Run]) -> list[tuple[str, Run, StageRun]]:
    """All stages, each beside the same one of the other runs, and how a row of it is headed."""
    names = dict.fromkeys(stage.name for run in runs for stage in run.stages)
    return [
        (f"{name}, {run.name}" if len(runs) > 1 else name, run, stage)
        for name in names
        for run in runs
        for stage in run.stages
        if stage.name == name
    ]


def _tests(runs: Sequence[Run]) -> Table:
    """What each stage changed: every measure of every test after each stage, and the step from the stage before."""
    rows = _rows(runs)
    found = [
        (test, name)
        for test in dict.fromkeys(test for _, _, stage in rows for test in stage.tests)
        for name in MEASURES
        if any(is_number(stage.tests.get(test, {}).get(name)) for _, _, stage in rows)
    ]
    before = {id(stage): earlier for run in runs for earlier, stage in zip(run.stages, run.stages[1:], strict=False)}
    cells = [
        [head, *(_measure(test, name, stage, before.get(id(stage))) for test, name in found)]
        for head, _, stage in rows
    ]
    header = ["after the stage", *(f"{test}: {MEASURES[name]}" for test, name in found)]
    note = "On held-out rows; in brackets the step from the stage before."
    return Table("What each stage changed", header, cells if found else [], note)


def _measure(test: str, name: str, stage: StageRun, before: StageRun | None) -> str:
    value: Any = stage.tests.get(test, {}).get(name)
    earlier: Any = before.tests.get(test, {}).get(name) if before else None
    if not is_number(value):
        return "-"
    scale, form = (1, "{:.3g}") if name in WHOLE else (100, "{:.1f}%")
    step = f" ({scale * (value - earlier):+.1f})" if is_number(earlier) else ""
    return form.format(scale * value) + step


def _tasks(runs: Sequence[Run]) -> Table:
    """The benchmarks: a row a task, with the level of chance and of random weights."""
    columns = [(head, stage) for head, _, stage in _rows(runs) if _tasks_of(stage)]
    names = dict.fromkeys(name for _, stage in columns for name in _tasks_of(stage))
    rows = []
    for name in names:
        measured = [_tasks_of(stage).get(name, {}) for _, stage in columns]
        counts = next((str(one["counts"]) for one in measured if one.get("counts")), "")
        first = next((one for one in measured if one), {})
        cells = [_share(first.get("chance")), _share(first.get("random_weights"))]
        rows.append([f"{name}, {counts}", *cells, *(_share(one.get(counts)) for one in measured)])
    header = ["task, measure", "chance", "random weights", *(head for head, _ in columns)]
    return Table("Benchmarks", header, rows, "By lm-evaluation-harness.")


def _tasks_of(stage: StageRun) -> dict[str, Mapping[str, Any]]:
    tasks: dict[str, Mapping[str, Any]] = {}
    for results in stage.tests.values():
        found = results.get("tasks")
        for name, one in found.items() if isinstance(found, dict) else ():
            if isinstance(one, dict) and one.get("asked_for"):
                tasks[name] = one
    return tasks


def _share(value: Any) -> str:
    return f"{value:.4g}" if is_number(value) else "-"


def _costs(runs: Sequence[Run]) -> Table:
    """What each stage cost: all numbers as the trainings measured them, FLOPs as `costs.accounting` counts."""
    columns: dict[str, Callable[[StageRun], str]] = {
        "steps": lambda stage: _count(stage.number("train_steps")),
        "tokens": lambda stage: _count(stage.tokens),
        "training": lambda stage: _duration(stage.number("train_runtime")),
        "start to end": lambda stage: _duration(stage.seconds),
        "tokens/s": lambda stage: _count(stage.number("train_tokens_per_second")),
        "training FLOPs": lambda stage: _count(stage.flops),
        "memory": lambda stage: _count(stage.number("peak_memory_bytes"), "B"),
        "parameters": lambda stage: _count(stage.number("parameters")),
    }
    return _table("Cost", runs, columns)


def _data(runs: Sequence[Run]) -> Table:
    """What each stage read, and its loss at the end."""
    columns: dict[str, Callable[[StageRun], str]] = {
        "documents or rows": lambda stage: _count(stage.number("train_documents", "train_rows")),
        "held out": lambda stage: _count(stage.number("eval_documents", "eval_rows")),
        "skipped": lambda stage: _count(stage.number("skipped_rows")),
        "text": lambda stage: _count(stage.number("train_bytes"), "B"),
        "held-out loss": lambda stage: _share(stage.number("eval_loss")),
        "bits per byte": lambda stage: _share(stage.number("eval_bits_per_byte")),
    }
    return _table("Data", runs, columns)


def _table(title: str, runs: Sequence[Run], columns: Mapping[str, Callable[[StageRun], str]]) -> Table:
    """A row for each stage of each run."""
    rows = [[head, *(cell(stage) for cell in columns.values())] for head, _, stage in _rows(runs)]
    return Table(title, ["stage", *columns], rows)


def _count(value: float | None, unit: str = "") -> str:
    """A number of three digits with its thousands: 12.3 M."""
    if value is None:
        return "-"
    for power, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if abs(value) >= 10**power:
            return f"{value / 10**power:.3g} {prefix}{unit}"
    return f"{value:,.0f} {unit}".strip()


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _samples(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """The first prompts of each test, and what the models answered after each stage."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for head, _, stage in _rows(runs):
        for test, answers in stage.answers.items():
            for answer in answers:
                said = found.setdefault((test, _text(answer.get("prompt"))), {})
                said["reference"] = _text(answer.get("references") or answer.get("label"))
                said[f"after {head}"] = _text(answer.get("prediction"))
    numbers: Counter[str] = Counter()
    samples = []
    for (test, prompt), said in sorted(found.items(), key=lambda item: item[0][0]):
        numbers[test] += 1
        reference = said.pop("reference")
        title = f"{test}, {numbers[test]}"
        samples.append({"title": title, "prompt": prompt, "answers": [*said.items(), ("reference", reference)]})
    return samples


def _text(value: Any) -> str:
    """A prompt, an answer or references as text, cut where it is long."""
    if isinstance(value, list):
        parts = [str(part.get("content", "")) if isinstance(part, dict) else str(part) for part in value]
        value = "\n".join(parts)
    text = printable(str(value))
    return text if len(text) <= LONGEST_TEXT else f"{text[:LONGEST_TEXT]} [... {len(text) - LONGEST_TEXT:,} more]"


def draw_curves(runs: Sequence[Run], path: str | Path) -> None:
    """All stages in one picture, a panel each; the curves of several runs lie over each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(stage.name for run in runs for stage in run.stages))
    if all(len(run.stages) == 1 for run in runs):  # trainings by themselves, whatever their folders are called
        names = names[:1]
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    figure = Figure(figsize=(4.6 * columns if columns > 1 else 7, 3.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, number + 1)
        kind = None
        for colour, run in enumerate(runs):
            stage = next((s for s in run.stages if s.name == name), run.stages[0] if len(names) == 1 else None)
            if stage is None:
                continue
            kind = kind or next((key for key in CURVES if any(is_number(e.get(key)) for e in stage.history)), "loss")
            _draw(axes, stage, kind, colour if len(runs) > 1 else None, run.name if len(runs) > 1 else "")
        axes.set_title(name if len(runs) == 1 or len(names) > 1 else "", parse_math=False)
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel(CURVES.get(kind or "loss", "loss"))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            legend = axes.legend(fontsize="small")
            for text in legend.get_texts():
                text.set_parse_math(False)
    figure.savefig(path, dpi=140)


def _draw(axes: Any, stage: StageRun, kind: str, colour: int | None, label: str) -> None:
    """The curve in training, and that on held-out rows with points."""
    shown: dict[str, tuple[str, str, dict[str, Any]]] = {
        kind: ("training", "C0", {"linewidth": 1.1}),
        f"eval_{kind}": ("held out", "C1", {"marker": "o"}),
    }
    for key, (name, own, style) in shown.items():
        points = {  # of each step the last figure: the end of a run is measured once more
            entry["step"]: entry[key]
            for entry in stage.history
            if is_number(entry.get(key)) and is_number(entry.get("step"))
        }
        if points:
            dashes = {"linestyle": "--"} if colour is not None and key != kind else {}
            own = own if colour is None else f"C{colour}"
            said = f"{label}, {name}" if label else name
            # A leading underscore would hide the line from the legend.
            axes.plot(
                *zip(*points.items(), strict=True), color=own, markersize=4, label=f"\u200a{said}", **style, **dashes
            )
