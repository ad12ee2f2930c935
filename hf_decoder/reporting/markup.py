"""Escapes names and words of others for Markdown, metadata and code, so that none is read as markup."""

from __future__ import annotations

import json
import re

# Markup of Markdown or HTML, except underscores within words and colons outside addresses.
_MARKUP = re.compile(r"[\\`*\[\]<>&|~$]|(?<![^\W_])_|_(?![^\W_])|:(?=//)|(?<=www)\.", re.IGNORECASE)
_CODE = re.compile(r"[\w ./:@+=,-]+")


def plain(text: object) -> str:
    """Escapes words of others for Markdown, on one line. Entities also escape them for HTML, unlike backslashes."""
    return _MARKUP.sub(lambda found: f"&#{ord(found[0][-1])};", " ".join(str(text).split()))


def code(text: object) -> str:
    """A name as a code span, or `plain` if it has characters that could end the span."""
    return f"`{text}`" if _CODE.fullmatch(str(text)) else plain(text)


def line(text: object) -> str:
    """Words of others for the metadata: one line, and nothing that looks like a tag."""
    return " ".join(str(text).split()).translate({ord("<"): "\u2039", ord(">"): "\u203a"})


def quoted(name: str) -> str:
    """`name` as a Python string for a block of code, without what HTML would read as a tag."""
    return json.dumps(name).replace("<", "\\u003c")


def fenced(text: str) -> str:
    """`text` as a Markdown block, fenced by more backticks than it holds in a row."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"
