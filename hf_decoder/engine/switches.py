"""Debugging switches that turn off the whole engine or one part of it.

`HF_DECODER_ENGINE=0` in the environment turns everything off. `settings.override(decoding=False)` turns one part off
within a `with` block. `HF_DECODER_WAYS` and `override(ways=...)` pin the choices that the engine measures otherwise.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any


@dataclass
class Settings:
    """Which parts of the engine are on; the plain modules run instead of a part that is off."""

    training: bool = True  # fused operators between the matrix products of layers, and the loss
    attention: bool = True  # tiled or variable-length attention instead of torch's kernels with a mask
    decoding: bool = True  # decode steps without the modules, and in `generate()` prefill
    kernels: bool = True  # C++, for training and decode steps, and CUDA graphs, which are compiled at first use
    # Which of several ways to the same numbers is taken, by the name of the choice; torch's own if it is not named.
    # None: the fastest one, as measured on this machine (see `calibration`). Another machine may round otherwise.
    ways: Mapping[str, str] | None = None

    @contextmanager
    def override(self, **parts: Any) -> Iterator[None]:
        """Sets parts by name within the block; `all=False` sets all of them but `ways`.

        Raises:
            TypeError: for an unknown part.
        """
        if "all" in parts:
            parts = dict.fromkeys(vars(self).keys() - {"ways"}, parts.pop("all")) | parts
        before, after = dict(vars(self)), vars(replace(self, **parts))
        vars(self).update(after)
        try:
            yield
        finally:
            vars(self).update(before)


def _pinned(ways: str | None) -> dict[str, str] | None:
    """The ways that the environment names: `attention=tiles of 64,norm=C++`, or nothing for torch's alone."""
    return None if ways is None else dict(way.split("=", 1) for way in ways.split(",") if "=" in way)


is_on = os.environ.get("HF_DECODER_ENGINE", "1") != "0"
settings = Settings(is_on, is_on, is_on, is_on, _pinned(os.environ.get("HF_DECODER_WAYS")))

__all__ = ["Settings", "settings"]
