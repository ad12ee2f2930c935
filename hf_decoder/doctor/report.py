"""Defines the report. A check returns a finding, a finding becomes a row, and the rows make the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_decoder.doctor.subject import Subject

LEVELS = ("quick", "default", "deep")
PASS, FAIL, SKIP, WARN = "pass", "fail", "skip", "warn"


@dataclass(frozen=True)
class Finding:
    """The result of one check. A `remedy` here replaces that of the check."""

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
    """A row before it runs.

    `claim` holds where the row passes. `means` says what a failure does to a user, and `remedy` how to fix it.
    `level` is the quickest level that includes the row. `needs` is "model", "logits" (a model with finite logits),
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
    """A row of a report. A row that passes has no `remedy`, and only one that fails has `means`."""

    name: str
    status: str
    detail: str
    remedy: str
    claim: str
    means: str
    seconds: float


@dataclass(frozen=True)
class DoctorReport:
    """All rows of one checkpoint, in the order in which they ran."""

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
