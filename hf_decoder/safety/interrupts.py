"""Turns Ctrl-C and SIGTERM into one exception, removes an empty output folder, and says how to go on.

Nothing heavy is imported here: the command line catches signals before it imports torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The signal `number` asked the program to end."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.number = number


def interrupt(number: signal.Signals) -> None:
    raise Interrupted(number)


@contextlib.contextmanager
def on_signal(handle: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Calls `handle` for Ctrl-C and SIGTERM within the block, where it runs in the main thread.

    Forked processes, such as a DataLoader's workers, inherit the handler; the signal ends them as if there were none.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    owner = os.getpid()

    def receive(number: int, frame: Any) -> None:
        if os.getpid() != owner:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        else:
            handle(signal.Signals(number))

    before = {number: signal.signal(number, receive) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextlib.contextmanager
def going_on(words: Callable[[], str | None], folder: str | Path | None = None) -> Iterator[None]:
    """Adds to an interrupt what the command line says of it; removes `folder` where the block leaves it empty.

    Args:
        words: follows "stopped by SIGINT"; None: nothing is to be said.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.go_on = words()  # type: ignore[attr-defined]
        if folder is not None:
            with contextlib.suppress(OSError):
                os.rmdir(folder)  # only an empty one goes
        raise


def describe(stop: KeyboardInterrupt) -> tuple[int, str | None]:
    """The exit code of a program that an interrupt ends, and the line about it."""
    number = getattr(stop, "number", signal.SIGINT)
    words = getattr(stop, "go_on", "; the same command starts from the beginning")
    return 128 + number, None if words is None else f"stopped by {number.name}{words}"
