"""Runs a function of `rank_work` in real processes over gloo, one per rank."""

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

OLDEST = Version(transformers.__version__) < Version("5.18")
resumes_in_several = pytest.mark.xfail(
    OLDEST, reason="transformers 5.17 loads the optimizer to cpu:0, which torch does not know", strict=True
)
saves_parts = pytest.mark.xfail(
    OLDEST, reason="transformers 5.17 gathers tensor-parallel weights in the first process alone", run=False
)

# Torch and transformers are imported once, by a server that every rank is forked from.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["hf_decoder.cli.main", "hf_decoder.cli.pretrain", "datasets"])


def run_ranks(world_size: int, work: Callable[..., Any], *args: Any, folder: Path, timeout: float = 200) -> list[Any]:
    """Runs `work(*args)` in `world_size` processes; returns what each rank returned, tensors included.

    A rank's exception, or no end within `timeout` seconds, fails the test with what the ranks said.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outcomes = [folder / f"rank{rank}.pt" for rank in range(world_size)]
    for path in outcomes:
        path.unlink(missing_ok=True)
    ranks = [
        PROCESSES.Process(target=_rank, args=(rank, world_size, port, str(path), work, args))
        for rank, path in enumerate(outcomes)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout)
    stuck = [process for process in ranks if process.is_alive()]
    for process in stuck:
        process.kill()
        process.join()
    results = [torch.load(path, weights_only=False) if path.exists() else ("nothing", "") for path in outcomes]
    failures = [f"rank {rank}: {value}" for rank, (what, value) in enumerate(results) if what != "result"]
    assert not failures and not stuck, "\n".join([*failures, f"{len(stuck)} ranks did not end"])
    return [value for _, value in results]


def _rank(rank: int, world_size: int, port: int, path: str, work: Callable[..., Any], args: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if world_size == 1:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    torch.set_num_threads(1)
    try:
        outcome = ("result", work(*args))
    except BaseException:
        outcome = ("error", traceback.format_exc())
    part = Path(path).with_suffix(".part")
    torch.save(outcome, part)
    part.replace(path)
    if torch.distributed.is_initialized():
        if outcome[0] == "result":
            torch.distributed.barrier()
        torch.distributed.destroy_process_group()
