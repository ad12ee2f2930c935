"""The flags of `hf-decoder env`: none."""

from __future__ import annotations

from dataclasses import dataclass

DESCRIPTION = "Prints what a bug report needs: versions, hardware, packages, compilers."


@dataclass
class EnvArguments:
    """Nothing to choose."""


ARGUMENTS = (EnvArguments,)
