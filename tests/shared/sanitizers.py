"""Runs C++ under the address and the undefined-behaviour sanitizer."""

import os
import subprocess
from pathlib import Path

import pytest

from hf_decoder.engine.cpp import build

FLAGS = ("-O1", "-g", "-std=c++17", "-march=native", "-fopenmp", "-x", "c++", "-")
CHECKS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def run_sanitized(source: str, folder: Path) -> None:
    """Compiles a program in that folder and runs it; it must end without a word of them."""

    def compiles(*flags: str) -> bool:
        command = [build.find_compiler(), *flags, *FLAGS, "-I", str(build.HERE), "-o", str(folder / "run")]
        return not subprocess.run(command, input=source, capture_output=True, text=True).returncode

    if not compiles(*CHECKS):
        assert compiles(), "the program itself does not compile"
        pytest.skip("this compiler comes without sanitizers")
    settings = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    run = subprocess.run([folder / "run"], env=settings, capture_output=True, text=True)
    assert not run.returncode, run.stderr
