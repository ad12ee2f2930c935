"""Runs a program in a new Python process without secrets, with or without this package."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PACKAGE = "hf_decoder"
# Environment variables that a computation needs.
KEPT = re.compile(
    r"PATH|HOME|USER|LOGNAME|LANG|LC_\w+|TZ|TMPDIR|TEMP|TMP|USERPROFILE|SYSTEMROOT|APPDATA|LOCALAPPDATA|XDG_CACHE_HOME"
    r"|PYTHON\w*|VIRTUAL_ENV|CONDA_PREFIX|LD_\w+|DYLD_\w+|CC|CXX|CPATH|LIBRARY_PATH"
    r"|(?:CUDA|CUBLAS|CUDNN|NVIDIA|NCCL|HIP|HSA|ROCR|OMP|GOMP|KMP|MKL|DNNL|ONEDNN|OPENBLAS|TORCH|TORCHINDUCTOR|PYTORCH|TRITON|HF_DECODER)_\w+"
)
SECRET = re.compile("TOKEN|SECRET|PASS|KEY|CREDENTIAL|AUTH", re.IGNORECASE)


def hide_package(package: str) -> None:
    """Hides a package from every finder, an editable install's own included, as if it were not installed.

    The source of this function is put in front of a program, so it imports what it needs.
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


def child_environment(*, hidden: bool, home: Path, hub_cache: Path) -> dict[str, str]:
    """The environment of a process that may run a stranger's code, without secrets.

    Settings of Python, compilers, devices and threads are kept. All other variables are dropped, tokens, keys and
    proxies' passwords included. `home` becomes HF_HOME, so that no saved token is found. The Hub is offline.
    """
    kept = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name) and not SECRET.search(name)}
    root = str(Path(__file__).resolve().parents[2])
    paths = [
        path for path in kept.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path).resolve() != Path(root)
    ]
    own = {"HF_HOME": str(home), "HF_HUB_CACHE": str(hub_cache), "HF_HUB_OFFLINE": "1"}
    return {**kept, **own, "PYTHONPATH": os.pathsep.join(paths if hidden else [root, *paths])}


def run_fresh(program: Path, argument: str, *, hidden: bool, hub_cache: Path, timeout: float) -> str:
    """Runs the file `program` with one argument in an empty folder, offline, and returns what it prints.

    The interpreter gets the file as text, because it must also run without this package, which `hidden` hides.

    Args:
        hub_cache: folder with the Hub's files.

    Raises:
        RuntimeError: if the process fails, with the last line of its standard error.
    """
    source = program.read_text(encoding="utf-8")
    if hidden:
        source = f"{inspect.getsource(hide_package)}\nhide_package({PACKAGE!r})\n{source}"
    with tempfile.TemporaryDirectory() as scratch:
        home, empty = Path(scratch, "home"), Path(scratch, "empty")
        home.mkdir()
        empty.mkdir()
        process = subprocess.run(
            [sys.executable, "-c", source, argument],
            cwd=empty,
            env=child_environment(hidden=hidden, home=home, hub_cache=hub_cache),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    if process.returncode:
        lines = process.stderr.strip().splitlines() or [f"exit code {process.returncode}"]
        raise RuntimeError(lines[-1])
    return process.stdout
