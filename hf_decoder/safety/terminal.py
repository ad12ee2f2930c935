r"""Makes strangers' text safe for a terminal: characters that command it or deceive its reader are written as `\x1b`.

A model's output, a folder's name, a token or a quoted line of a file may contain such characters. Each is replaced on
its own, whatever is around it, so that a sequence in two pieces does not pass either.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any

# Control characters except newline and tab, lone surrogates, and characters that are invisible or reorder text.
# Joiners and variation selectors (U+200C, U+200D) stay, because Persian, Hindi and emoji need them.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff\U000e01f0-\U000e0fff]|\r(?!\n)"
)
# A progress bar returns to the start of its line before and after it is drawn, or moves up by whole lines.
_BAR = re.compile(r"(\r?)(.*?)(\r?)", re.DOTALL)
_UP = "\x1b[A"


def printable(text: str) -> str:
    r"""Writes every character of `text` that is not printable, except newlines and tabs, as an escape: `\x1b`."""
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def first_line(error: BaseException) -> str:
    """The first line of an error's innermost cause, or the name of its class where it says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def guard_streams() -> None:
    """Makes standard error, and standard output on a terminal, print only what `printable` returns from now on.

    Piped output stays as it is, byte by byte.
    """
    if not isinstance(sys.stderr, _Guarded):
        sys.stderr = _Guarded(sys.stderr, has_bars=True)
    if not isinstance(sys.stdout, _Guarded) and sys.stdout.isatty():
        sys.stdout = _Guarded(sys.stdout, has_bars=False)


class _Guarded:
    """A text stream that writes `printable(text)`."""

    def __init__(self, stream: Any, has_bars: bool):
        self.rich_proxied_file = stream  # rich writes its own sequences to it, for colours and its status line
        self._has_bars = has_bars

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)

    def write(self, text: str) -> int:
        start, end = "", ""
        if self._has_bars and text.strip("\n").replace(_UP, "") == "":
            start, text = text, ""
        elif self._has_bars and (found := _BAR.fullmatch(text)):
            start, text, end = found.groups()
        self.rich_proxied_file.write(start + printable(text) + end)
        return len(start + text + end)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)
