"""Idle OpenMP threads of one Python thread do not slow down another one."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from tiny_models import random_ids, tiny_model

from hf_decoder import HfDecoderForCausalLM
from hf_decoder.engine.threads import _gnu_openmp, release_threads

TASKS = Path("/proc/self/task")

pytestmark = pytest.mark.skipif(_gnu_openmp() is None or not TASKS.is_dir(), reason="no OpenMP of GNU, or no Linux")


def count(at_most: int = 0) -> int:
    """The threads of this process; waits until there are at most so many."""
    end = time.monotonic() + 10
    while (threads := len(list(TASKS.iterdir()))) > at_most and at_most and time.monotonic() < end:
        time.sleep(0.01)
    return threads


@pytest.fixture
def alone():
    """The number of threads without those of OpenMP, of which there are two more from now on."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    compute()
    with_theirs = count()
    release_threads()
    yield count(with_theirs - 2)
    release_threads()
    torch.set_num_threads(before)


def compute() -> None:
    torch.ones(2**20).exp()


def test_threads_go_and_come_back(alone):
    for _ in range(3):
        compute()
        assert count() == alone + 2
        release_threads()
        assert count(alone) == alone
    release_threads()  # there are none


@pytest.mark.parametrize("fails", [False, True])
def test_generate_leaves_none(fails, alone):
    model = tiny_model()
    compute()
    if fails:
        with pytest.raises(ValueError):
            model.generate(random_ids(1, 4), max_new_tokens=-1)
    else:
        model.generate(random_ids(1, 4), max_new_tokens=3)
    assert count(alone) <= alone


def test_from_pretrained_leaves_none(tmp_path, alone):
    tiny_model().save_pretrained(tmp_path)
    compute()
    HfDecoderForCausalLM.from_pretrained(tmp_path)
    assert count(alone) <= alone


def test_a_forked_process_does_not_wait_for_threads_that_it_lacks(alone):
    compute()
    child = os.fork()
    if child == 0:
        release_threads()
        os._exit(7)
    end = time.monotonic() + 20
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < end:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(ended[1]) == 7
