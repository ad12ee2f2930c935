"""Escapes names and words of others for Markdown, metadata and code. They are shown and never read as markup."""

from __future__ import annotations

import json
import re

# what Markdown or HTML would read as markup: but for an underscore within a word, and colons outside addresses
_MARKUP = re.compile(r"[\\`*\[\]<>&|~$]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)
_CODE = re.compile(r"[\w ./:@+=,-]+")


def plain(text: object) -> str:
    """The words of others as Markdown that shows them as they are, in one line, whatever they hold.

    Entities in place of backslashes: neither Markdown nor HTML reads them as markup.
    """
    return _MARKUP.sub(lambda found: f"&#{ord(found[0][-1])};", " ".join(str(text).split()))


def code(text: object) -> str:
    """The name of something as a code span, or `plain` where it holds what would end one."""
    return f"`{text}`" if _CODE.fullmatch(str(text)) else plain(text)


def line(text: object) -> str:
    """The words of others for the metadata, which is no Markdown: one line, and nothing that looks like a tag."""
    return " ".join(str(text).split()).translate({ord("<"): "\u2039", ord(">"): "\u203a"})


def quoted(name: str) -> str:
    """`name` as a string of Python for a block of code, without what HTML would take for a tag."""
    return json.dumps(name).replace("<", "\\u003c")


def fenced(text: str) -> str:
    """`text` as a Markdown block, fenced by more backticks than it holds in a row."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
