"""`hf-decoder doctor CHECKPOINT ...`: tests checkpoints row by row, several of them side by side."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_decoder.cli.arguments import takes_argv
from hf_decoder.cli.flags.doctor import DoctorArguments
from hf_decoder.doctor import FAIL, PASS, SKIP, WARN, DoctorReport, run_doctor
from hf_decoder.safety.terminal import printable

if TYPE_CHECKING:
    from rich.console import Console

STYLES = {PASS: "green", FAIL: "bold red", WARN: "yellow", SKIP: "dim"}
WIDTH = 120  # of output to a file or a pipe


@takes_argv
def main(args: DoctorArguments) -> int:
    """Runs the rows and prints them. Exit code 1 says that a row of some checkpoint fails."""
    if args.quick and args.deep:
        raise ValueError("--quick and --deep exclude each other; choose one")
    if args.json is not None and not Path(args.json).absolute().parent.is_dir():
        raise ValueError(f"--json {args.json}: folder {Path(args.json).parent} does not exist")
    level = "quick" if args.quick else "deep" if args.deep else "default"
    reports = [_examine(name, level, args) for name in args.checkpoints]
    ok = all(report.ok for report in reports)
    if args.json is not None:
        values = {"ok": ok, "reports": [report.to_dict() for report in reports]}
        Path(args.json).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    _print([_printable(report) for report in reports])
    return 0 if ok else 1


def _examine(name: str, level: str, args: DoctorArguments) -> DoctorReport:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True)
    shown = Text(printable(name))
    with console.status(shown) as status:
        return run_doctor(
            name,
            level=level,
            rows=args.rows,
            trust_remote_code=args.trust_remote_code,
            revision=args.revision,
            text_file=args.text_file,
            progress=lambda claim: status.update(shown + f": {claim}"),
        )


def _printable(report: DoctorReport) -> DoctorReport:
    """The report without control characters. rich bypasses the guard of the streams."""
    rows = tuple(replace(row, detail=printable(row.detail), remedy=printable(row.remedy)) for row in report.rows)
    names = {"checkpoint": printable(report.checkpoint), "model_type": printable(report.model_type)}
    return replace(report, rows=rows, **names)


def _print(reports: Sequence[DoctorReport]) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    if len(reports) == 1:
        _print_one(console, reports[0])
    else:
        _print_side_by_side(console, reports)
    for report in reports:
        for row in report.failures:
            console.print(f"\n{report.checkpoint}: {row.name}: {row.claim}", style=STYLES[FAIL], markup=False)
            console.print(f"  seen:  {row.detail}\n  means: {row.means}\n  fix:   {row.remedy}", markup=False)
    console.print()
    for report in reports:
        counts = {status: sum(row.status == status for row in report.rows) for status in (PASS, FAIL, WARN, SKIP)}
        seconds = sum(row.seconds for row in report.rows)
        console.print(
            f"{report.checkpoint}: {counts[PASS]} passed, {counts[FAIL]} failed, {counts[WARN]} warned, "
            f"{counts[SKIP]} skipped ({report.level}, {seconds:.0f} s)",
            markup=False,
        )


def _print_one(console: Console, report: DoctorReport) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(f"{report.checkpoint} ({report.model_type})"), title_justify="left")
    for heading in ("row", "claim", "", "seen"):
        table.add_column(heading, no_wrap=heading != "seen", overflow="fold")
    for row in report.rows:
        seen = row.detail if row.status != WARN else f"{row.detail}. To fix: {row.remedy}"
        table.add_row(row.name, Text(row.claim), Text(row.status, STYLES[row.status]), Text(seen))
    console.print(table)


def _print_side_by_side(console: Console, reports: Sequence[DoctorReport]) -> None:
    """Prints one column for each checkpoint, and the warnings below."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("row", no_wrap=True)
    table.add_column("claim", no_wrap=True)
    for report in reports:
        table.add_column(Text(f"{Path(report.checkpoint).name}\n({report.model_type})"))
    for rows in zip(*(report.rows for report in reports), strict=True):
        table.add_row(rows[0].name, rows[0].claim, *(Text(row.status, STYLES[row.status]) for row in rows))
    console.print(table)
    for report in reports:
        for row in report.rows:
            if row.status == WARN:
                seen = f"{report.checkpoint}: {row.name}: {row.detail}. To fix: {row.remedy}"
                console.print(seen, style=STYLES[WARN], markup=False)
