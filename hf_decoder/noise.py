"""Keeps quiet what libraries say on import about parts of theirs that nobody asked for.

transformers imports torchao and PEFT imports bitsandbytes wherever they are installed, and these report every kernel
that does not run on this machine. What a command prints to stderr is for its own errors.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# The loggers of torchao and bitsandbytes, and torch's on how torchao registers its types.
LOGGERS = ("torchao", "bitsandbytes", "torch.utils._pytree")


def silence() -> None:
    """Only errors from these libraries, until the process ends."""
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


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
