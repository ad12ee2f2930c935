"""Examines a checkpoint of any causal language model row by row, and only reads it.

Every row states a claim. A row that fails says what that means to a user, and how to fix it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hf_decoder.data.documents import load_text
from hf_decoder.doctor import (
    adapters,
    files,
    generation,
    numerics,
    parameters,
    portability,
    quality,
    tokenizer,
    training,
)
from hf_decoder.doctor.report import FAIL, LEVELS, PASS, SKIP, WARN, Check, DoctorReport, Finding, Row, failed, skipped
from hf_decoder.doctor.subject import Subject, Unloadable
from hf_decoder.safety.terminal import first_line

# The order in which the rows run: files before the model, and last the rows that free the model's memory.
CHECKS: tuple[Check, ...] = (
    *files.CHECKS,
    *tokenizer.CHECKS,
    *numerics.CHECKS,
    *generation.CHECKS,
    *parameters.CHECKS,
    *quality.CHECKS,
    *portability.CHECKS,
    *adapters.CHECKS,
    *training.CHECKS,
)


def run_doctor(
    checkpoint: str | Path,
    *,
    level: str = "default",
    rows: Sequence[str] | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
    text_file: str | Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> DoctorReport:
    """Examines a folder or Hub name.

    Args:
        level: "quick", "default" or "deep". Each level includes the rows of those before it.
        rows: names of the rows to run, of any level. None runs all rows of the level.
        trust_remote_code: runs code of the folder. Without it, code of the folder runs only if it is this package's to
            the byte.
        revision: branch, tag or commit of a Hub name.
        text_file: text like the training's to measure the model on: a file, a table or a folder.
        progress: called with the claim of each row before it runs.

    Raises:
        ValueError: if there is no such checkpoint, level, row or text.
    """
    if level not in LEVELS:
        raise ValueError(f"level {level!r} is unknown; choose one of: {', '.join(LEVELS)}")
    names = [check.name for check in CHECKS]
    for name in rows or ():
        if name not in names:
            raise ValueError(f"row {name!r} is unknown; choose among: {', '.join(names)}")
    if rows is not None:
        checks = [check for check in CHECKS if check.name in rows]
    else:
        checks = [check for check in CHECKS if LEVELS.index(check.level) <= LEVELS.index(level)]
    subject = Subject(checkpoint, trust_remote_code=trust_remote_code, revision=revision)
    if text_file is not None:
        subject.text = "\n\n".join(load_text(str(text_file), validation_fraction=0)["train"][:1000]["text"])
    done = []
    for check in checks:
        if progress is not None:
            progress(check.claim)
        done.append(_run(check, subject))
    model_type = _printable(str(subject.values.get("model_type", "unknown")))
    return DoctorReport(str(checkpoint), model_type, level, tuple(done))


def examine_adapter(folder: str | Path) -> tuple[Row, ...]:
    """Runs the rows about files on an adapter's folder. Without its base an adapter has no logits."""
    subject = Subject(folder, adapter=True)
    return tuple(_run(check, subject) for check in files.CHECKS)


def _run(check: Check, subject: Subject) -> Row:
    start = time.perf_counter()
    try:
        if check.needs == "logits" and not numerics.has_numbers(subject):
            finding = skipped("the logits are not finite, so nothing can be compared")
        else:
            finding = check.run(subject)
    except Unloadable as error:
        needs = "tokenizer" if check.needs == "tokenizer" else "model"
        finding = skipped(f"needs a {needs} that loads: {error}")
    except Exception as error:  # a foreign model may raise anything
        finding = failed(f"{type(error).__name__}: {first_line(error)}")
    seconds = time.perf_counter() - start
    amiss = finding.status in (FAIL, WARN)
    return Row(
        name=check.name,
        status=finding.status,
        detail=_printable(finding.detail),
        remedy=_printable(finding.remedy or check.remedy) if amiss else "",
        claim=check.claim,
        means=check.means if finding.status == FAIL else "",
        seconds=round(seconds, 2),
    )


def _printable(text: str) -> str:
    """A stranger's text on one line, without control characters."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))


__all__ = [
    "CHECKS",
    "FAIL",
    "LEVELS",
    "PASS",
    "SKIP",
    "WARN",
    "DoctorReport",
    "Finding",
    "Row",
    "examine_adapter",
    "run_doctor",
]
