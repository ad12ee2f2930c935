"""Silences what other libraries say on import about parts of theirs that nobody asked for.

transformers imports torchao and PEFT imports bitsandbytes wherever they are installed, and these report every kernel
that does not run on this machine. What a command prints to stderr is for its own errors.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# What turns the progress bars of datasets and huggingface_hub off, read when these are imported.
BARS = ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")
# The loggers of torchao and bitsandbytes, and torch's on how torchao registers its types.
LOGGERS = ("torchao", "bitsandbytes", "torch.utils._pytree")


def silence() -> None:
    """Only errors from these libraries, until the process ends, and no progress bars into a file."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not on_terminal():
        for name in BARS:
            os.environ.setdefault(name, "1")


def on_terminal() -> bool:
    """Whether somebody watches: what goes to a file or a pipe gets lines in place of progress bars."""
    return sys.stdout.isatty() and sys.stderr.isatty()


@contextmanager
def quiet_imports() -> Iterator[None]:
    """The same for a while; the levels are put back as they were."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    silence()
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
