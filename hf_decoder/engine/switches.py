"""Debugging switches that turn off the whole engine or one part of it.

`HF_DECODER_ENGINE=0` in the environment turns everything off; `settings.override(decoding=False)` turns one part
off for a while.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass
class Settings:
    """Which parts of the engine are used; whatever is off goes by the plain modules."""

    training: bool = True  # fused operators between the matrix products of layers, and the loss
    attention: bool = True  # attention in tiles, or within documents, in place of torch's kernels with a mask
    decoding: bool = True  # calls without gradients and `generate()` past the modules
    kernels: bool = True  # decoding steps in C++ and as CUDA graphs, which are compiled at first use

    @contextmanager
    def override(self, **parts: bool) -> Iterator[None]:
        """Sets parts by name while the context lasts; `all=False` sets them all.

        Raises:
            TypeError: for a part that is not known.
        """
        if "all" in parts:
            parts = dict.fromkeys(vars(self), parts.pop("all")) | parts
        before, after = dict(vars(self)), vars(replace(self, **parts))
        vars(self).update(after)
        try:
            yield
        finally:
            vars(self).update(before)


settings = Settings()
if os.environ.get("HF_DECODER_ENGINE", "1") == "0":
    settings = Settings(**dict.fromkeys(vars(settings), False))

__all__ = ["Settings", "settings"]
