"""A program in a Python process of its own, with this package or where it cannot be found."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

PACKAGE = "hf_decoder"


def hide_package(package: str) -> None:
    """Makes a package look as if it were not installed: no finder finds it, an editable install's own included.

    Its text goes before that of a program, so it imports what it needs.
    """
    import sys
    from importlib.machinery import PathFinder
    from typing import Any

    find: Any = PathFinder.find_spec

    def find_others(name: str, *args: Any, **kwargs: Any) -> Any:
        return None if name.partition(".")[0] == package else find(name, *args, **kwargs)

    PathFinder.find_spec = staticmethod(find_others)  # type: ignore[method-assign,assignment]
    sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
    try:
        __import__(package)
    except ModuleNotFoundError:
        return
    raise SystemExit(f"{package} could not be hidden")


def run_fresh(
    program: Path, argument: str, *, hidden: bool, folder: Path, environment: dict[str, str], timeout: float
) -> str:
    """Runs the file `program` with one argument in `folder`, and returns what it prints.

    The file goes to the interpreter as text, because it must also run where this package cannot be found: with
    `hidden` that is so wherever it is installed.

    Raises:
        RuntimeError: if the process fails, with the last line of what it said.
    """
    source = program.read_text(encoding="utf-8")
    if hidden:
        source = f"{inspect.getsource(hide_package)}\nhide_package({PACKAGE!r})\n{source}"
    process = subprocess.run(
        [sys.executable, "-c", source, argument],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        raise RuntimeError(lines[-1])
    return process.stdout
