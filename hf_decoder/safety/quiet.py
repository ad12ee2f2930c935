"""Silences other libraries: their messages on import, and those of transformers while it loads or saves.

transformers imports torchao and PEFT imports bitsandbytes wherever they are installed, and these report every kernel
that does not run on this machine. What a command prints to stderr is for its own errors.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
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
    """`silence` within the block alone."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    silence()
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def quiet() -> Iterator[None]:
    """Within the block, transformers logs errors alone and draws no bars, and Python warns of nothing."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
