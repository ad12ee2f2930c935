"""Defines the report. A check gives a finding, a finding becomes a row, and all rows make the report."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_decoder.doctor.subject import Subject

LEVELS = ("quick", "default", "deep")
PASS, FAIL, SKIP, WARN = "pass", "fail", "skip", "warn"


@dataclass(frozen=True)
class Finding:
    """What one check saw. A `remedy` here takes the place of the check's own."""

    status: str
    detail: str
    remedy: str | None = None


def passed(detail: str) -> Finding:
    return Finding(PASS, detail)


def failed(detail: str, remedy: str | None = None) -> Finding:
    return Finding(FAIL, detail, remedy)


def skipped(detail: str) -> Finding:
    return Finding(SKIP, detail)


def warned(detail: str, remedy: str | None = None) -> Finding:
    return Finding(WARN, detail, remedy)


@dataclass(frozen=True)
class Check:
    """One row before it is run.

    `claim`: what holds where it passes. `means`: what a failure does to a user. `remedy`: the way to mend it.
    `level`: the quickest level that includes it. `needs`: "model", "logits" (of a model, which must be numbers),
    "tokenizer", or "" for files alone.
    """

    name: str
    claim: str
    means: str
    remedy: str
    run: Callable[[Subject], Finding]
    level: str = "quick"
    needs: str = "model"


@dataclass(frozen=True)
class Row:
    """One row of a report. `means` and `remedy` are empty unless it failed or warns; `seconds` is its duration."""

    name: str
    status: str
    detail: str
    remedy: str
    claim: str
    means: str
    seconds: float


@dataclass(frozen=True)
class DoctorReport:
    """All rows for one checkpoint, in the order in which they ran."""

    checkpoint: str
    model_type: str
    level: str
    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """Whether no row failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.status == FAIL)

    def to_dict(self) -> dict[str, object]:
        return {
            "checkpoint": self.checkpoint,
            "model_type": self.model_type,
            "level": self.level,
            "ok": self.ok,
            "rows": [asdict(row) for row in self.rows],
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
