"""The engine makes the model fast. It is installed with the package and never copied to a checkpoint."""

from typing import Any

__all__ = ["attach", "detach", "settings"]


def __getattr__(name: str) -> Any:  # the classes take seconds to import
    if name == "settings":
        from hf_decoder.engine.switches import settings as found
    elif name in __all__:
        from hf_decoder.engine import twins

        found = getattr(twins, name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = found
    return found
