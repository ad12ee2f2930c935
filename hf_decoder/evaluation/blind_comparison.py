"""Blind comparison of two models by a person: makes the pairs, stores the judgments, and computes the win rate.

A person sees two answers to a prompt, left and right, and never which model wrote which. The order of the pairs and
the sides come from a seed, so an interrupted session goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Z95 = 1.959963984540054  # 97.5% quantile of the normal distribution: two-sided 95%
CHOICES = ("left", "right", "tie", "both_bad")
START = b'{"key": "'  # of a judgment's line


@dataclass(frozen=True)
class Pair:
    """Two answers to one prompt, as they are shown. `left_is_a` is what the person must not know."""

    prompt: str
    left: str
    right: str
    left_is_a: bool

    @property
    def key(self) -> str:
        """Names the pair by its texts, whichever side they are on."""
        a, b = (self.left, self.right) if self.left_is_a else (self.right, self.left)
        return hashlib.sha256(json.dumps([self.prompt, a, b]).encode()).hexdigest()[:16]

    def winner(self, choice: str) -> str:
        """`A`, `B`, `tie` or `both_bad`. Raises ValueError for a choice that is none of `CHOICES`."""
        if choice not in CHOICES:
            raise ValueError(f"choice {choice!r} is unknown; choose one of: {', '.join(CHOICES)}")
        if choice in ("tie", "both_bad"):
            return choice
        return "A" if (choice == "left") == self.left_is_a else "B"


def blind_pairs(prompts: Sequence[str], a: Sequence[str], b: Sequence[str], *, seed: int = 0) -> list[Pair]:
    """The pairs in a shuffled order, each with its sides drawn; equal answers and repeated pairs are left out.

    Each model is on the left in half of the pairs, one more or less, so that a liking for a side favours neither.
    """
    rows = dict.fromkeys(zip(prompts, a, b, strict=True))
    pairs = [(prompt, x, y) for prompt, x, y in rows if x.strip() != y.strip()]
    draw = random.Random(seed)
    draw.shuffle(pairs)
    sides = [i % 2 == 0 for i in range(len(pairs))]
    draw.shuffle(sides)
    return [Pair(p, x, y, True) if s else Pair(p, y, x, False) for (p, x, y), s in zip(pairs, sides, strict=True)]


class JudgmentFile:
    """Judgments as JSONL; each is on the disk before the next pair is shown.

    What an interrupt left of a judgment is cut off when the file is opened again.

    Raises:
        ValueError: on opening, if a line is not a judgment, or one of two other models.
    """

    def __init__(self, path: str | Path, names: tuple[str, str]):
        self.path = Path(path)
        self.names = names
        self.judged: dict[str, tuple[str, str | None]] = {}  # key of a pair -> winner and choice
        self._added: list[tuple[Pair, int]] = []  # with the length of the file before
        self.path.parent.mkdir(parents=True, exist_ok=True)
        data = self.path.read_bytes() if self.path.exists() else b""
        lines = data.split(b"\n")
        last = lines.pop()  # empty unless an interrupt or an editor left it without its end
        for number, line in enumerate(lines, 1):
            self._remember(line, number)
        if last:
            with self.path.open("r+b") as file:
                if _read(last) is None and (last.startswith(START) or START.startswith(last)):
                    file.truncate(len(data) - len(last))
                else:
                    self._remember(last, len(lines) + 1)
                    file.seek(len(data))
                    file.write(b"\n")

    def _remember(self, line: bytes, number: int) -> None:
        row = _read(line)
        if row is None:
            raise ValueError(f"{self.path}, line {number} is not a judgment; name another --output_dir")
        if (models := (row["model_a"], row["model_b"])) != self.names:
            raise ValueError(
                f"{self.path} holds judgments of {' and '.join(models)}, not of {' and '.join(self.names)}; "
                "name another --output_dir"
            )
        self.judged[row["key"]] = row["winner"], row.get("choice")

    def add(self, pair: Pair, choice: str, note: str = "") -> bool:
        """Appends a judgment and waits until the disk has it; False if the pair was judged before."""
        winner = pair.winner(choice)
        if pair.key in self.judged:
            return False
        a, b = (pair.left, pair.right) if pair.left_is_a else (pair.right, pair.left)
        row: dict[str, Any] = {"key": pair.key, "winner": winner, "choice": choice}
        row |= {
            "model_a": self.names[0],
            "model_b": self.names[1],
            "prompt": pair.prompt,
            "answer_a": a,
            "answer_b": b,
        }
        row |= {"note": note} if note else {}
        with self.path.open("a", encoding="utf-8") as file:
            length = file.tell()
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._added.append((pair, length))
        self.judged[pair.key] = winner, choice
        return True

    @property
    def can_undo(self) -> bool:
        return bool(self._added)

    def undo(self) -> Pair | None:
        """Takes back the last judgment since the file was opened, on the disk too; None if there is none."""
        if not self._added:
            return None
        pair, length = self._added.pop()
        with self.path.open("r+b") as file:
            file.truncate(length)
            os.fsync(file.fileno())
        del self.judged[pair.key]
        return pair

    def remaining(self, pairs: Sequence[Pair]) -> list[Pair]:
        """The pairs that are not judged yet, in their order."""
        return [pair for pair in pairs if pair.key not in self.judged]

    def tally(self, pairs: Sequence[Pair]) -> Tally:
        """Counts the judgments of these pairs; the file may hold those of other answers too."""
        judged = [self.judged[pair.key] for pair in pairs if pair.key in self.judged]
        winners = [winner for winner, _ in judged]
        wins_a, wins_b, ties, both_bad = (winners.count(winner) for winner in ("A", "B", "tie", "both_bad"))
        return Tally(wins_a, wins_b, ties, both_bad, sum(choice == "left" for _, choice in judged))


def _read(line: bytes) -> dict[str, Any] | None:
    """The judgment of a line, or None for any other line."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    fields = ("key", "winner", "model_a", "model_b")
    is_one = isinstance(row, dict) and all(isinstance(row.get(name), str) for name in fields)
    return row if is_one else None


@dataclass(frozen=True)
class Tally:
    """Judgments counted: for A, for B, ties, those that call both bad, and how many chose the left answer."""

    wins_a: int
    wins_b: int
    ties: int
    both_bad: int = 0
    lefts: int = 0

    @property
    def decided(self) -> int:
        return self.wins_a + self.wins_b

    def results(self) -> dict[str, Any]:
        """Win rate of A among the decided judgments, its 95% interval, and the judgments still needed."""
        low, high = wilson_interval(self.wins_a, self.decided)
        return {
            "judgments": self.decided + self.ties + self.both_bad,
            "wins_a": self.wins_a,
            "wins_b": self.wins_b,
            "ties": self.ties,
            "both_bad": self.both_bad,
            "win_rate_a": self.wins_a / self.decided if self.decided else None,
            "interval_low": low,
            "interval_high": high,
            "judgments_needed": judgments_needed(self.wins_a, self.decided),
            "left_chosen": self.lefts / self.decided if self.decided else None,
        }

    def lines(self, names: tuple[str, str]) -> list[str]:
        """The results for a person to read."""
        found = self.results()
        counts = f"{names[0]} {self.wins_a}, {names[1]} {self.wins_b}, ties {self.ties}, both bad {self.both_bad}"
        if not self.decided:
            return [counts, "no judgment prefers a side yet"]
        rate = (
            f"{names[0]} is preferred in {100 * found['win_rate_a']:.1f}% of {self.decided} decided judgments "
            f"(95% interval {100 * found['interval_low']:.1f}% to {100 * found['interval_high']:.1f}%)"
        )
        needed = found["judgments_needed"]
        if needed is None:
            verdict = "as many for either: at this rate no number of judgments would tell them apart"
        elif needed == 0:
            better = names[0] if self.wins_a > self.wins_b else names[1]
            verdict = f"the interval excludes 50%: {better} is preferred"
        else:
            verdict = f"undecided: about {needed} more decided judgments at this rate would exclude 50%"
        return [counts, rate, verdict, f"the left answer was chosen in {100 * found['left_chosen']:.0f}%"]


def wilson_interval(wins: int, count: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval (1927) for a share of `wins` in `count`; 0 to 1 where nothing was counted."""
    if count == 0:
        return 0.0, 1.0
    share = wins / count
    centre = share + z * z / (2 * count)
    spread = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def judgments_needed(wins: int, count: int, z: float = Z95) -> int | None:
    """How many more decided judgments bring the interval off 50% if the share of wins stays as it is.

    Wilson's interval leaves 1/2 out exactly when |share - 1/2| > z / (2 sqrt(n)). None at a share of one half, and
    where nothing was counted.
    """
    if count == 0 or 2 * wins == count:
        return None
    total = math.floor((z / (2 * abs(wins / count - 0.5))) ** 2) + 1
    return max(0, total - count)
