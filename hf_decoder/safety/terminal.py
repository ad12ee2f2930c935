r"""Makes text of strangers safe for a terminal. What would command it or deceive its reader is spelt out: `\x1b`.

A model's output, a folder's name, a token or a quoted line of a file may hold such characters. Each is replaced by
itself, whatever stands around it, so that a sequence in two pieces passes no more than one in one piece.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from typing import Any

# Controls but newline and tab; half a surrogate pair; characters that show nothing or reorder what is shown. What
# joins letters or chooses their form (U+200C, U+200D, variation selectors) stays: Persian, Hindi and emoji need it.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b\u200e\u200f"
    "\u2028-\u202e\u2060-\u206f\u3164\ud800-\udfff\ufeff\uffa0\ufff0-\ufffb"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e00ff\U000e01f0-\U000e0fff]|\r(?!\n)"
)
# How a progress bar moves: to the start of its line before and after it is drawn, or up by whole lines.
_BAR = re.compile(r"(\r?)(.*?)(\r?)", re.DOTALL)
_UP = "\x1b[A"


def printable(text: str) -> str:
    r"""`text` with newlines and tabs as they are, and every other character that is no text spelt out: `\x1b`."""
    return _UNPRINTABLE.sub(lambda found: found.group().encode("unicode_escape").decode(), text)


def first_line(error: BaseException) -> str:
    """The first line of an error's innermost cause, or the name of its class where it says nothing."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def guard_streams() -> None:
    """From here on standard error takes printable text alone, and standard output too where it is a terminal.

    What is piped stays as it is, byte by byte.
    """
    if not isinstance(sys.stderr, _Guarded):
        sys.stderr = _Guarded(sys.stderr, has_bars=True)
    if not isinstance(sys.stdout, _Guarded) and sys.stdout.isatty():
        sys.stdout = _Guarded(sys.stdout, has_bars=False)


class _Guarded:
    """A text stream that writes what `printable` makes of a text."""

    def __init__(self, stream: Any, has_bars: bool):
        self.rich_proxied_file = stream  # rich writes sequences of its own to it: for colours and its status line
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
