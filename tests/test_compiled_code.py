"""The tests themselves: each has a time limit, and compiled code has folders of its own without locks of the dead."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("TORCH_EXTENSIONS_DIR", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
SHOW_FOLDERS = f"""
import os

def test_shows_its_folders():
    print(*(os.environ[name] for name in {FOLDERS}), sep="\\n", file=open("folders", "w"))
"""
BUILD_LIKE_QUANTO = """
import os
from torch.utils import cpp_extension

def test_builds_in_its_package(monkeypatch):
    monkeypatch.setattr(cpp_extension, "_jit_compile", lambda *args, **kwargs: None)  # no compiler is needed
    os.makedirs("package")
    cpp_extension.load("own", ["own.cpp"], build_directory="package")
    assert not os.listdir("package") and os.path.isdir(os.environ["TORCH_EXTENSIONS_DIR"] + "/own")
"""
HANG = """
import time

def test_hangs():
    while True:
        time.sleep(0.1)

def test_after_it():
    pass
"""


@pytest.fixture
def run_pytest(tmp_path):
    """Runs a test file in a session of its own, with our settings and an empty temporary folder."""

    def run(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "tmp").mkdir(exist_ok=True)
        (tmp_path / "test_inner.py").write_text(code)
        env = {name: value for name, value in os.environ.items() if name not in FOLDERS}
        env |= {"TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
        given = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path), "-p", "conftest", "test_inner.py"]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *given, *flags]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)

    return run


@pytest.mark.kernels
def test_a_test_that_hangs_ends_and_the_next_one_runs(run_pytest):
    result = run_pytest(HANG, "-o", "timeout=1")
    assert "Timeout (>1.0s)" in result.stdout and "1 failed, 1 passed" in result.stdout


def test_every_test_has_a_limit(request):
    assert float(request.config.getini("timeout")) == 300


@pytest.mark.kernels
def test_compiled_code_has_folders_of_this_user_that_stay_without_locks_of_the_dead(run_pytest, tmp_path):
    assert run_pytest(SHOW_FOLDERS).returncode == 0
    seen = _folders(tmp_path)
    (own,) = (tmp_path / "tmp").glob("hf_decoder_tests_*")
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    assert len(set(seen)) == len(FOLDERS) and all(folder.is_relative_to(own) for folder in seen)
    locks = {}
    for name, age in (("old", 3600), ("new", 10)):
        locks[name] = seen[0] / name / "lock"
        locks[name].parent.mkdir(parents=True)
        locks[name].touch()
        os.utime(locks[name], (time.time() - age,) * 2)
    assert run_pytest(SHOW_FOLDERS).returncode == 0
    assert _folders(tmp_path) == seen
    assert not locks["old"].exists() and locks["new"].exists()


@pytest.mark.kernels
def test_a_folder_that_is_not_ours_is_not_used(run_pytest, tmp_path):
    (tmp_path / "tmp").mkdir()
    (tmp_path / "strange").mkdir()
    (tmp_path / "tmp" / f"hf_decoder_tests_{os.getuid()}").symlink_to(tmp_path / "strange")
    assert run_pytest(SHOW_FOLDERS).returncode == 0
    assert not any(f.resolve().is_relative_to(tmp_path / "strange") for f in _folders(tmp_path))


@pytest.mark.kernels
def test_an_extension_of_a_library_is_built_in_our_folder(run_pytest):
    result = run_pytest(BUILD_LIKE_QUANTO)
    assert result.returncode == 0, result.stdout + result.stderr


def _folders(tmp_path):
    return [Path(line) for line in (tmp_path / "folders").read_text().splitlines()]
