"""Silences other libraries: their messages on import, and those of transformers while it loads or saves.

transformers imports torchao and PEFT imports bitsandbytes if they are installed, and these report every kernel that
does not run on this machine. A command's stderr is for its own errors.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# Variables that turn off the progress bars of datasets and huggingface_hub, which read them on import.
BARS = ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS")
# The loggers of torchao and bitsandbytes, and the one of torch that comments on torchao's types.
LOGGERS = ("torchao", "bitsandbytes", "torch.utils._pytree")


def silence() -> None:
    """Lets these libraries log errors only, until the process ends; turns off progress bars unless on a terminal."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not on_terminal():
        for name in BARS:
            os.environ.setdefault(name, "1")


def on_terminal() -> bool:
    """Whether output goes to a terminal; files and pipes get lines instead of progress bars."""
    return sys.stdout.isatty() and sys.stderr.isatty()


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Silences the libraries within the block alone."""
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
