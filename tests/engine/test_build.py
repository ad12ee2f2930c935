"""Compiled code comes from the user's own folder, and a missing compiler is no error."""

import copy
import os
import subprocess
import time

import pytest
import torch
from tiny_models import random_ids, tiny_model

from hf_decoder.engine import detach
from hf_decoder.engine.cpp import build
from hf_decoder.engine.decoding import cpp_step

IDS = random_ids(1, 9)
FIXED = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    """A process that has built nothing, with its own cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.load_file.cache_clear()
    yield tmp_path
    build.load_file.cache_clear()


def static_text(model) -> torch.Tensor:
    return model.generate(IDS, cache_implementation="static", **FIXED)


@pytest.mark.kernels
@pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")
def test_the_folder_is_the_users_alone_and_what_is_in_it_serves_again(nothing_built, monkeypatch):
    build.load_file("probe.cpp")
    folder = build.own_folder()
    assert folder == nothing_built / "hf_decoder/engine" and folder.stat().st_mode & 0o777 == 0o700
    (library,) = folder.glob("*.so")
    built = library.stat().st_mtime_ns
    build.load_file.cache_clear()
    build.load_file("probe.cpp")
    assert library.stat().st_mtime_ns == built and len(list(folder.iterdir())) == 1


@pytest.mark.process
@pytest.mark.skipif(build.find_compiler() is None, reason="no C++ compiler")
def test_what_a_process_begins_in_the_background_outlives_it(nothing_built, run_python, monkeypatch):
    begin = """
    import time
    from hf_decoder.engine.decoding.cpp_step import later
    assert not later.is_ready()
    time.sleep(1)
    """
    run_python(begin, XDG_CACHE_HOME=str(nothing_built))
    assert waits_for(lambda: any(build.own_folder().glob("*.so")))
    monkeypatch.setattr(build.subprocess, "run", only_asks)
    assert waits_for(build.Later(cpp_step._function, "the step").is_ready)


def waits_for(condition) -> bool:
    return any(condition() or time.sleep(0.1) for _ in range(1200))


def only_asks(command, run=subprocess.run, **kwargs):
    assert "--version" in command, "compiled once more"
    return run(command, **kwargs)


@pytest.mark.parametrize("fault", ["writable", "link", "file"])
def test_a_folder_that_others_may_write_to_is_not_used(fault, nothing_built):
    folder = nothing_built / "hf_decoder/engine"
    if fault == "file":
        folder.parent.mkdir()
        folder.write_text("")
    elif fault == "link":
        (nothing_built / "elsewhere").mkdir()
        folder.parent.mkdir()
        folder.symlink_to(nothing_built / "elsewhere")
    else:
        folder.mkdir(parents=True)
        folder.chmod(0o777)
    planted = folder / "step-planted.so"
    if fault != "file":
        planted.write_bytes(b"not a library")
    found = build.own_folder()
    assert found != folder and nothing_built not in found.parents
    assert found.stat().st_mode & 0o777 == 0o700


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files")
def test_a_folder_of_another_user_is_not_used(nothing_built, monkeypatch):
    (nothing_built / "hf_decoder/engine").mkdir(parents=True, mode=0o700)
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    assert build.own_folder() != nothing_built / "hf_decoder/engine"


@pytest.mark.parametrize("compiler", ["", "/bin/false"])
def test_without_a_compiler_the_plain_way_is_taken(compiler, nothing_built, monkeypatch, caplog):
    model = tiny_model(attn_implementation="sdpa")
    expected = static_text(detach(copy.deepcopy(model)))
    monkeypatch.setenv("CXX", compiler or "no-such-compiler")
    assert torch.equal(static_text(model), expected)
    assert torch.equal(static_text(model), expected)
