"""Limits the time and memory of strangers' chat templates, and of regular expressions."""

from __future__ import annotations

import functools
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 10.0
MEMORY_BYTES = 256 << 20
# The most that a rendered conversation may be longer than its messages, tools and documents.
MOST_FACTOR, MOST_CHARACTERS = 8, 1 << 20


class TooLongError(BaseException):
    """Not an Exception, because jinja catches every Exception while it evaluates constants."""


def _has_timer() -> bool:
    return threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer")


@contextmanager
def ended_after(seconds: float) -> Iterator[None]:
    """Raises TooLongError within a block that takes longer. Works in the main thread only, and not on Windows.

    It ends Python, templates and matches of `re`, which look for signals; other code in C goes on to its end.
    """
    if not _has_timer():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise TooLongError

    handler = signal.signal(signal.SIGALRM, stop)
    others_seconds, others_interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, others_seconds, others_interval)
        signal.signal(signal.SIGALRM, handler)


@contextmanager
def bounded(what: str) -> Iterator[None]:
    """Ends the block once it takes more than `SECONDS`, or `MEMORY_BYTES` more than the process holds already.

    Works in the main thread only, and not on Windows. The limit of memory needs Linux.

    Raises:
        ValueError: naming `what`.
    """
    if not _has_timer():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    try:
        with ended_after(SECONDS):
            try:
                if (status := Path("/proc/self/statm")).exists():
                    taken = int(status.read_text().split()[0]) * resource.getpagesize()
                    limits = [limit for limit in (taken + MEMORY_BYTES, before[0]) if limit != resource.RLIM_INFINITY]
                    resource.setrlimit(resource.RLIMIT_AS, (min(limits), before[1]))
                yield
            finally:
                resource.setrlimit(resource.RLIMIT_AS, before)
    except TooLongError:
        raise ValueError(f"{what} takes more than {SECONDS:.0f} seconds, and was stopped") from None
    except MemoryError:
        raise ValueError(f"{what} asks for more than {MEMORY_BYTES >> 20} MiB of memory, and was stopped") from None


def bound_templates() -> None:
    """Makes transformers render every chat template within the limits from now on."""
    from transformers import tokenization_utils_base

    render: Callable[..., Any] = tokenization_utils_base.render_jinja_template
    if not hasattr(render, "__wrapped__"):
        tokenization_utils_base.render_jinja_template = _bounded(render)


def _bounded(render: Callable[..., Any]) -> Callable[..., Any]:
    from jinja2 import TemplateError

    class ChatTemplateError(ValueError, TemplateError):
        """Raised for a template that cannot be rendered; a TemplateError too, which TRL expects."""

    @functools.wraps(render)
    def bounded_render(*args: Any, **kwargs: Any) -> Any:
        try:
            with bounded("it"):
                rendered, indices = render(*args, **kwargs)
        except Exception as error:  # a template may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ChatTemplateError(f"the chat template cannot be rendered: {reason[:300]}") from error
        length = sum(map(len, rendered))
        given = len(str([value for key, value in kwargs.items() if key != "chat_template"])) + len(str(args))
        if length > MOST_CHARACTERS + MOST_FACTOR * given:
            raise ChatTemplateError(f"the chat template makes {length:,} characters of {given:,}, and is not used")
        return rendered, indices

    return bounded_render
