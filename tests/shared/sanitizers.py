"""Runs C++ under the address and the undefined-behaviour sanitizer."""

import os
import subprocess
from pathlib import Path

import pytest

from hf_decoder.engine.cpp import build

FLAGS = "-O1 -g -std=c++17 -march=native -fopenmp -fsanitize=address,undefined -fno-sanitize-recover=all -x c++ -"


def run_sanitized(source: str, folder: Path) -> None:
    """Compiles a program in that folder and runs it; it must end without a word of them."""
    command = [build.find_compiler(), *FLAGS.split(), "-I", str(build.HERE), "-o", str(folder / "run")]
    if subprocess.run(command, input=source, capture_output=True, text=True).returncode:
        pytest.skip("this compiler comes without sanitizers")
    settings = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run([folder / "run"], env=settings, capture_output=True, text=True)
    assert not run.returncode, run.stderr
