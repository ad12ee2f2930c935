"""Turns Ctrl-C and SIGTERM into one exception, removes an empty output folder, and says how to continue.

Nothing heavy is imported here, because the command line catches signals before it imports torch.
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
    """Raised when the signal `number` asks the program to end."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.number = number


def interrupt(number: signal.Signals) -> None:
    raise Interrupted(number)


@contextlib.contextmanager
def on_signal(handle: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Calls `handle` for Ctrl-C and SIGTERM within the block, if it runs in the main thread.

    A signal ends forked processes, such as a DataLoader's workers, as if there were no handler.
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
    """Adds the message of the command line to an interrupt; removes `folder` if the block leaves it empty.

    Args:
        words: gives the text after "stopped by SIGINT", or None for no message.
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
    """The exit code and the message of a program that an interrupt ends."""
    number = getattr(stop, "number", signal.SIGINT)
    words = getattr(stop, "go_on", "; the same command starts from the beginning")
    return 128 + number, None if words is None else f"stopped by {number.name}{words}"
