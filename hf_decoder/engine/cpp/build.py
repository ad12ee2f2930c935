"""Compiles the C++ code of this folder with the installed compiler, once per machine and user.

Compiled code is loaded only from a folder that belongs to the user and that nobody else may write to. Otherwise
another user could plant code there.
"""

import ctypes
import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from hf_decoder.engine.precision import cpu_has

HERE = Path(__file__).parent
# -ffp-contract=fast: fused multiply-add
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 300


@cache
def load_step() -> ctypes.CDLL:
    """Loads the library of step.cpp; compiles it unless an earlier process of this user has.

    Raises:
        RuntimeError: if there is no compiler, or it fails.
    """
    return load((HERE / "step.cpp").read_text("utf-8"))


def load(source: str) -> ctypes.CDLL:
    """Compiles and loads C++ that may include files of this folder; compiles only once."""
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler was found; install g++, or set CXX")
    flags = (*FLAGS, f"-DPREFETCH_LOCALITY={1 if cpu_has('amx_bf16') else 0}")
    folder = own_folder()
    library = folder / f"step-{_key(compiler, flags, source)}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, "step.so")
            command = [compiler, *flags, "-x", "c++", "-", "-I", str(HERE), "-o", str(made)]
            run = subprocess.run(command, input=source, capture_output=True, text=True, timeout=SECONDS)
            if run.returncode:
                lines = [line for line in run.stderr.splitlines() if "error" in line] or [run.stderr.strip()]
                raise RuntimeError(f"{compiler} failed: {lines[0]}")
            made.replace(library)  # atomic, because another process may look for it
    return ctypes.CDLL(str(library))


def find_compiler() -> str | None:
    """The C++ compiler: CXX, or the first of the usual names."""
    names = (os.environ["CXX"],) if os.environ.get("CXX") else COMPILERS
    return next((found for name in names if (found := shutil.which(name))), None)


def own_folder() -> Path:
    """The folder for compiled code: in the user's cache, or one for this process if others may write there."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "hf_decoder" / "engine"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if all(is_own(place) for place in (folder, folder.parent)):
            return folder
    except OSError:
        pass
    return _folder_of_process()


@cache
def _folder_of_process() -> Path:
    return Path(tempfile.mkdtemp(prefix="hf_decoder_"))


def is_own(folder: Path) -> bool:
    """Whether a folder belongs to this user, and nobody else may write to it."""
    if not hasattr(os, "getuid"):
        return True  # the system has no such modes
    found = folder.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _key(compiler: str, flags: tuple[str, ...], source: str) -> str:
    """A hash of everything that the compiled code depends on, the CPU included because of -march=native."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    capabilities = sorted(name for name, there in getattr(torch.cpu, "get_capabilities", dict)().items() if there)
    header = (HERE / "vectors.h").read_text("utf-8")
    parts = [version, *flags, *capabilities, _cpu_flags(), header, source]
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]


def _cpu_flags() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


__all__ = ["find_compiler", "load", "load_step", "own_folder"]
