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
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import Event, Thread

import torch
from transformers.utils import logging

HERE = Path(__file__).parent
# -ffp-contract=fast: fused multiply-add
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-ffp-contract=fast", "-fno-math-errno", "-shared", "-fPIC")
COMPILERS = ("c++", "g++", "clang++")
SECONDS = 300
# to its end, also where the process that asked for it has ended before
COMPILE = '"$@" -o "$0.$$" && mv "$0.$$" "$0" || { rm -f "$0.$$"; exit 1; }'

compiling: set[Path] = set()  # what this process compiles right now, which disturbs whatever is measured meanwhile

logger = logging.get_logger(__name__)


class Later:
    """What is compiled in the background, unless an earlier process has compiled it."""

    def __init__(self, get: Callable[[], object], what: str):
        """get: loads what is compiled, and compiles it first if need be; what: is named where that fails."""
        self._get, self._what, self._is_gotten = get, what, Event()
        self._thread: Thread | None = None

    def is_ready(self) -> bool:
        """Whether it is at hand at once. The first call begins to get it."""
        if self._thread is None:
            self._thread = Thread(target=self._get_or_say_why, daemon=True)
            self._thread.start()
        return self._is_gotten.is_set()

    def _get_or_say_why(self) -> None:
        try:
            self._get()
            self._is_gotten.set()
        except Exception as error:
            logger.info(f"{self._what} could not be compiled", exc_info=error)


@cache
def load_file(name: str, *defines: str) -> ctypes.CDLL:
    """The library of a file of this folder, compiled if no process of this user has before.

    Raises:
        RuntimeError: if there is no compiler, or it fails.
    """
    return load((HERE / name).read_text("utf-8"), *defines)


def load(source: str, *defines: str) -> ctypes.CDLL:
    """Compiles C++, which may include what lies in this folder, unless it has been already, and loads it."""
    library, compiler, flags = _place(source, defines)
    if not library.exists():
        command = ["sh", "-c", COMPILE, str(library), compiler, *flags, "-x", "c++", "-", "-I", str(HERE)]
        compiling.add(library)
        try:
            run = subprocess.run(
                command, input=source, capture_output=True, text=True, timeout=SECONDS, start_new_session=True
            )
        finally:
            compiling.discard(library)
        if run.returncode:
            lines = [line for line in run.stderr.splitlines() if "error" in line] or [run.stderr.strip()]
            raise RuntimeError(f"{compiler} failed: {lines[0]}")
    return ctypes.CDLL(str(library))


def is_built(name: str, *defines: str) -> bool:
    """Whether a process of this user has compiled a file of this folder.

    Raises:
        RuntimeError: if there is no compiler.
    """
    return _place((HERE / name).read_text("utf-8"), defines)[0].exists()


def _place(source: str, defines: tuple[str, ...]) -> tuple[Path, str, tuple[str, ...]]:
    """Where the library of a source is kept, the compiler and its flags."""
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler was found; install g++, or set CXX")
    flags = (*FLAGS, *(f"-D{define}" for define in defines))
    return own_folder() / f"step-{_key(compiler, flags, source)}.so", compiler, flags


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


def is_own(path: Path, is_kind: Callable[[int], bool] = stat.S_ISDIR) -> bool:
    """Whether a folder, or what is of another kind, belongs to this user, and nobody else may write to it."""
    found = path.lstat()
    if not hasattr(os, "getuid"):
        return is_kind(found.st_mode)  # where there are no such modes
    return is_kind(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022


def _key(compiler: str, flags: tuple[str, ...], source: str) -> str:
    """Of all that the compiled code depends on: `native` is another CPU elsewhere."""
    capabilities = sorted(name for name, there in getattr(torch.cpu, "get_capabilities", dict)().items() if there)
    headers = [path.read_text("utf-8") for path in sorted(HERE.glob("*.h"))]
    parts = [_version(compiler), *flags, *capabilities, cpu_facts("flags", "Features"), *headers, source]
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:32]


@cache
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60).stdout


def cpu_facts(*fields: str) -> str:
    """The lines of the first CPU that begin with these words, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").partition("\n\n")[0].splitlines()
    except OSError:
        return ""
    return "\n".join(line for line in lines if line.startswith(fields))


__all__ = ["Later", "compiling", "cpu_facts", "find_compiler", "is_built", "is_own", "load", "load_file", "own_folder"]
