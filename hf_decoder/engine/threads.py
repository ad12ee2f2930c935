"""Lets idle OpenMP threads go.

Each Python thread that computes keeps OpenMP threads of its own. As soon as there are more of all of them than cores,
GNU's OpenMP no longer waits for work but sleeps, and waking up costs more than many an operator: a token of a small
model took 2.5 ms in place of 1.7 in a thread beside one that had loaded the model.
"""

import ctypes
import os
from functools import cache
from multiprocessing import parent_process

import torch

HARD = 2  # omp_pause_hard
PROCESS = os.getpid()  # the one that has imported this


def release_threads() -> None:
    """Ends the idle OpenMP threads of the calling thread; its next parallel region starts new ones, in 0.1 ms.

    A forked process lacks the threads of its parent, and OpenMP would wait for them for ever: nothing is done there.
    """
    is_forked = os.getpid() != PROCESS or parent_process() is not None
    library = _gnu_openmp()
    if library is not None and not is_forked and torch.get_num_threads() > 1:
        library.omp_pause_resource(HARD, library.omp_get_initial_device())


@cache
def _gnu_openmp() -> ctypes.CDLL | None:
    """The library that torch computes with, if it is GNU's: LLVM's would end the threads of all."""
    try:
        library = ctypes.CDLL(None)
    except TypeError:  # Windows
        return None
    has = [hasattr(library, name) for name in ("omp_pause_resource", "omp_get_initial_device", "__kmpc_fork_call")]
    return library if has == [True, True, False] else None


__all__ = ["release_threads"]
