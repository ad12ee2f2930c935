"""What the tests of whole tools share: a tokenizer, processes that start from nothing, folders for compiled code."""

import contextlib
import functools
import getpass
import os
import platform
import stat
import subprocess
import sys
import tempfile
import textwrap
import time
from importlib.metadata import version
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # processes that share the cores; before torch starts its threads
    os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_DECODER_WAYS"] = ""  # torch's own, or what a test pins: the same on every machine

import torch
from torch.utils import cpp_extension

from hf_decoder.safety.quiet import silence

silence()  # the results are easier to find

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

STALE_LOCK_SECONDS = 300
LONG_TEST_SECONDS = 3600  # for the slow tests; the others have the time limit of pyproject.toml


def compiled_code_folder() -> Path:
    """A folder for compiled code that later runs of this user find again, and that no other user can write to."""
    name = f"hf_decoder_tests_{os.getuid() if hasattr(os, 'getuid') else getpass.getuser()}"
    folder = Path(tempfile.gettempdir(), name)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if hasattr(os, "getuid") and (not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid()):
        folder = Path(tempfile.mkdtemp(prefix=name))  # somebody else was there first
    folder.chmod(0o700)
    return folder / f"python{platform.python_version()}-torch{version('torch')}"


def remove_stale_locks(folder: Path) -> None:
    """Removes the lock files that killed processes left behind, for which torch.utils.cpp_extension waits for ever.

    Other caches lock by flock, which ends with the process.
    """
    for lock in folder.glob("**/lock"):
        try:
            if time.time() - lock.stat().st_mtime > STALE_LOCK_SECONDS:
                lock.unlink()
        except FileNotFoundError:  # another session was faster
            continue


COMPILED_CODE = compiled_code_folder()
for variable in ("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
    os.environ[variable] = str(COMPILED_CODE / variable.lower())
EXTENSIONS = Path(os.environ["TORCH_EXTENSIONS_DIR"])
remove_stale_locks(EXTENSIONS)


def load_extension(load, *args, **kwargs):
    """`torch.utils.cpp_extension.load` in our own folder, whichever the caller names: quanto's is its package."""
    return load(*args, **{**kwargs, "build_directory": None})


cpp_extension.load = functools.partial(load_extension, cpp_extension.load)

ROOT = Path(__file__).resolve().parents[1]

# Makes packages look as if they were not installed: no finder finds them, an editable install's own included.
PRELUDE = """
import sys
from importlib.machinery import PathFinder

HIDDEN = {hide!r}

def without_hidden(find):
    def find_or_not(name, *args, **kwargs):
        return None if name.replace("-", "_").partition(".")[0] in HIDDEN else find(name, *args, **kwargs)
    return find_or_not

PathFinder.find_spec = staticmethod(without_hidden(PathFinder.find_spec))
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in getattr(finder, "__module__", "")]
for name in HIDDEN:
    try:
        __import__(name)
    except ModuleNotFoundError:
        continue
    raise SystemExit(name + " is not hidden")
"""


def pytest_collection_modifyitems(items):
    for item in items:
        if any(item.get_closest_marker(mark) for mark in ("slow", "soak")) and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(LONG_TEST_SECONDS))


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    """torch.compile keeps eight graphs of a function, and `forward` is one function for all models of a process.

    Past the limit it raises, or leaves the code uncompiled and says nothing that a test would see.
    """
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()


@pytest.fixture
def run_python(tmp_path):
    """Runs code in a fresh process, in an empty folder, with its own caches and no terminal; returns its output.

    `hide` names packages that cannot be imported there, `variables` are set in its environment. Anything but exit
    code 0 fails the test.
    """

    def run(code: str, *args: object, hide: tuple[str, ...] = (), **variables: str) -> str:
        folder = tmp_path / f"process{len(list(tmp_path.glob('process*')))}"
        (folder / "cwd").mkdir(parents=True)
        script = folder / "script.py"
        script.write_text(PRELUDE.format(hide=hide) + textwrap.dedent(code), encoding="utf-8")
        env = {
            name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRANSFORMERS_VERBOSITY")
        }
        env |= {"HF_HOME": str(folder / "home"), "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
        if "hf_decoder" not in hide:
            env["PYTHONPATH"] = str(ROOT)
        env |= variables
        result = subprocess.run(
            [sys.executable, str(script), *map(str, args)],
            cwd=folder / "cwd",
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )
        output = result.stdout + result.stderr
        assert result.returncode == 0, output
        return output

    return run


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level tokenizer of 300 tokens."""
    from hf_decoder.data.tokenization import train_tokenizer

    return train_tokenizer(
        ["def main(argv):\n    return 0 if argv else 1\n", "the end of the text"] * 4, vocab_size=300
    )


FIGURES: list[str] = []


@pytest.fixture
def figures():
    """Adds a line to the figures that the long tests print at the end of the run."""
    return FIGURES.append


def pytest_terminal_summary(terminalreporter):
    if FIGURES:
        terminalreporter.section("figures")
        for line in FIGURES:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def packed_kernels():
    """Compiled products of packed weights, or a skip where this machine has none."""
    from hf_decoder.engine.quantized.products import obstacle

    if (reason := obstacle()) is not None:
        pytest.skip(reason)
