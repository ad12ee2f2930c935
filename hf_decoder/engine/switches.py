"""Debugging switches that turn off the whole engine or one part of it.

`HF_DECODER_ENGINE=0` in the environment turns everything off. `settings.override(decoding=False)` turns one part off
within a `with` block.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace


@dataclass
class Settings:
    """Which parts of the engine are on; the plain modules run instead of a part that is off."""

    training: bool = True  # fused operators between the matrix products of layers, and the loss
    attention: bool = True  # tiled or variable-length attention instead of torch's kernels with a mask
    decoding: bool = True  # prefill and decode steps without the modules, in `generate()` and `forward()`
    kernels: bool = True  # decode steps in C++ and as CUDA graphs, which are compiled at first use

    @contextmanager
    def override(self, **parts: bool) -> Iterator[None]:
        """Sets parts by name within the block; `all=False` sets all of them.

        Raises:
            TypeError: for an unknown part.
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
