import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from fixtures import flex_attention_without_compiler, in_tiles, layers, small_chunks

from hf_decoder.engine import calibration, settings
from hf_decoder.engine.cpp import build
from hf_decoder.engine.training import compiled


@pytest.fixture(scope="session")
def cpp_library():
    """C++ for training, which this machine compiles once; a skip where it cannot."""
    if build.find_compiler() is None:
        pytest.skip("no C++ compiler")
    return compiled._library()


@pytest.fixture
def measuring(monkeypatch, tmp_path):
    """As in the first process on a machine: nothing is pinned or known, and the cache folder is empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build._folder_of_process.cache_clear()
    monkeypatch.setattr(calibration, "_chosen", {})
    monkeypatch.setattr(calibration, "_tables", {})
    with settings.override(ways=None):
        yield tmp_path


__all__ = ["flex_attention_without_compiler", "in_tiles", "layers", "measuring", "small_chunks"]
