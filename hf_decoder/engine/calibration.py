"""Chooses among ways that give the same numbers the one that is fastest on this machine, by a short measurement.

Torch's own way comes first among the candidates, and another one is taken only where it was faster, so nothing here is
slower than torch. What was measured is kept on disk for this CPU, this number of threads, and these versions of torch
and of the engine. `settings.ways` pins the choices.
"""

import atexit
import hashlib
import json
import math
import os
import platform
import stat
import statistics
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

import torch
from transformers.utils import logging

from hf_decoder.engine.cpp.build import compiling, cpu_facts, is_own, own_folder
from hf_decoder.engine.operators import runs_as_written
from hf_decoder.engine.switches import settings
from hf_decoder.engine.threads import release_threads

logger = logging.get_logger(__name__)

MARGIN = 0.97  # of torch's time, at most, for another way to be taken
SECONDS, LEAST_ROUNDS, MOST_ROUNDS = 0.06, 5, 15  # of one choice, after the first run of each candidate
SAMPLE_SECONDS = 5e-4  # a shorter candidate is run several times for one figure
HOPELESS = 1.5  # times the fastest: not run again
STEADY = 2  # times the shortest run: a median above it is good for this process alone, and not kept
COMPUTES = 0.8  # of the time in which this thread must have had a core, for the same
TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-6}  # of a result's norm; half precision: HALF_TOLERANCE
HALF_TOLERANCE = 3e-2
LONGEST_WAIT_SECONDS = 30  # for a measurement of another thread
MOST_DRAWN = 2**16 + 1  # random numbers; a larger tensor repeats them, in rows that differ
MAX_BYTES, MAX_MACHINES = 2**20, 16  # of the file; an older version of torch or of the engine is a machine as well

Candidates = Mapping[str, Callable[..., Any]]
Times = dict[str, float | None]  # milliseconds of each candidate, None of one that failed

taken: dict[str, str] = {}  # the last way of each name, for whoever wants to tell what ran
_chosen: dict[tuple, str] = {}
_tables: dict[str, dict[str, Times]] = {}  # what the file holds, by machine
_lock = threading.Lock()
_thread = threading.local()  # has `measures` in the thread that measures


def choose(name: str, key: tuple, candidates: Candidates, inputs: Callable[[], Sequence[Any]]) -> str:
    """The name of the fastest candidate, which is measured at the first call with this name and key.

    Within a trace nothing is measured, and the first candidate is taken unless a better one is known.

    Args:
        name: what is chosen. `settings.ways` may name a candidate for it.
        key: of the case, numbers and words; sizes should be rounded by `bucket`.
        candidates: torch's own way first. Each takes the inputs and gives a tensor, or several, with the same numbers.
        inputs: makes them, on a CPU.

    Raises:
        ValueError: for a pinned way that is none of the candidates.
    """
    case = (name, key, torch.get_num_threads())
    if settings.ways is not None:
        way = settings.ways.get(name)
        if way is not None and way not in candidates:
            raise ValueError(f"{way!r} is no way for {name!r}; choose among {', '.join(candidates)}")
    else:
        way = _chosen.get(case) or _find_in_turn(case, candidates, inputs)
    taken[name] = way = way or next(iter(candidates))
    return way


def bucket(size: int, least: int, most: int) -> int:
    """The next power of two, within these limits."""
    return min(max(1 << max(size - 1, 0).bit_length(), least), most)


def numbers(*shape: int, dtype: torch.dtype = torch.float32, needs_grad: bool = False) -> torch.Tensor:
    """Random input of a candidate, of at least one number. It leaves torch's own random numbers alone."""
    generator, count = torch.Generator("cpu").manual_seed(sum(shape)), math.prod(shape)
    drawn = torch.randn(min(count, MOST_DRAWN), generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    drawn = drawn.repeat(-(-count // MOST_DRAWN))[:count] if count > MOST_DRAWN else drawn
    return drawn.view(shape).requires_grad_(needs_grad)


def measured() -> dict[str, Times]:
    """What has been measured on this machine with so many threads: the milliseconds of each candidate."""
    return dict(_table(_machine(torch.get_num_threads())))


def fastest(times: Times) -> str:
    """The candidate that these times speak for."""
    first, *others = times
    limit = (times[first] or math.inf) * MARGIN
    faster = {name: time for name in others if (time := times[name]) is not None and time <= limit}
    return min(faster, key=faster.__getitem__) if faster else first


def _find_in_turn(case: tuple, candidates: Candidates, inputs: Callable[[], Sequence[Any]]) -> str | None:
    """What `_find` gives, one thread at a time."""
    if getattr(_thread, "measures", False):  # a candidate asks
        return _find(case, candidates, inputs)
    if not _lock.acquire(timeout=LONGEST_WAIT_SECONDS):
        return None
    try:
        return _chosen.get(case) or _find(case, candidates, inputs)
    finally:
        _lock.release()


def _find(case: tuple, candidates: Candidates, inputs: Callable[[], Sequence[Any]]) -> str | None:
    """The choice, from the file or by measuring; None where nothing is known and nothing may be measured."""
    name, key, threads = case
    machine, entry = _machine(threads), " ".join(str(part) for part in (name, *key) if part is not None)
    times = _table(machine).get(entry)
    if times is None or [*times] != [*candidates]:
        is_traced = torch._guards.TracingContext.try_get() is not None or torch._C._len_torch_dispatch_stack()
        if is_traced or not runs_as_written():  # a mode or a compiler stands between a call and its numbers
            return None
        found = _in_clean_thread(lambda: _measure(name, candidates, inputs))
        times, is_steady = found or (dict.fromkeys(candidates), False)  # the first one failed: its caller will say why
        _table(machine)[entry] = times
        if is_steady:
            _keep(machine, entry, times)
    _chosen[case] = fastest(times)
    return _chosen[case]


def _in_clean_thread(function: Callable[[], Any]) -> Any:
    """Runs it without the caller's autocast, gradient mode, hooks and modes of torch, all of which are a thread's."""
    if getattr(_thread, "measures", False):
        return function()
    found = []

    def run() -> None:
        _thread.measures = True
        try:
            found.append(function())
        except Exception as error:
            logger.info("A measurement failed", exc_info=error)

    thread = threading.Thread(target=run, daemon=True)
    release_threads()  # beside those of this thread, all that runs in several threads would seem slow
    thread.start()
    thread.join()
    return found[0] if found else None


def _measure(name: str, candidates: Candidates, inputs: Callable[[], Sequence[Any]]) -> tuple[Times, bool]:
    """The times, and whether nothing else has disturbed them much."""
    given, is_alone = inputs(), not compiling
    first, expected, repeats = next(iter(candidates)), None, {}
    times: Times = dict.fromkeys(candidates)
    for way, run in candidates.items():
        try:
            run(*given)  # what is made once
            start = perf_counter()
            result = run(*given)
            repeats[way] = max(1, int(SAMPLE_SECONDS / (perf_counter() - start)))
        except Exception as error:
            if way == first:
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning(f"{way!r} for {name!r} fails on this machine and is not used: {reason}")
            continue
        if expected is None:
            expected = result
            if not all(of.isfinite().all() for of in ([result] if isinstance(result, torch.Tensor) else result)):
                raise ValueError("torch's own result is not finite, and so says nothing of the others")
        elif not _are_close(result, expected):
            logger.warning(f"{way!r} for {name!r} gives other numbers than {first!r} on this machine and is not used")
            del repeats[way]
    spent: dict[str, list[float]] = {way: [] for way in repeats}
    computed, begin = thread_time(), perf_counter()
    runs, rounds, end = list(spent), 0, begin + SECONDS
    while len(runs) > 1 and (rounds < LEAST_ROUNDS or (rounds < MOST_ROUNDS and perf_counter() < end)):
        rounds += 1
        for way in runs:
            start = perf_counter()
            for _ in range(repeats[way]):
                candidates[way](*given)
            spent[way].append((perf_counter() - start) / repeats[way])
        if rounds > 1:
            limit = HOPELESS * min(min(of_way) for of_way in spent.values())
            runs = [way for way in runs if min(spent[way]) <= limit]
    computes = not rounds or thread_time() - computed >= COMPUTES * (perf_counter() - begin)
    for way, of_way in spent.items():
        times[way] = round(1e3 * min(of_way), 4) if of_way else 0.0  # the only one; what disturbs a run adds to it
    are_steady = all(statistics.median(of_way) <= STEADY * min(of_way) for of_way in spent.values() if of_way)
    return times, is_alone and not compiling and computes and are_steady


def _are_close(result: Any, expected: Any) -> bool:
    """Whether two results differ by rounding alone."""
    if isinstance(expected, torch.Tensor):
        result, expected = (result,), (expected,)
    for mine, other in zip(result, expected, strict=True):
        tolerance = TOLERANCES.get(other.dtype, HALF_TOLERANCE)
        mine, other = mine.detach().float(), other.detach().float()
        if mine.shape != other.shape or not (mine - other).norm() <= tolerance * other.norm():  # nan is refused, too
            return False
    return True


def _table(machine: str) -> dict[str, Times]:
    if machine not in _tables:
        _tables[machine] = _read().get(machine, {})
    return _tables[machine]


def _file() -> Path:
    return own_folder() / "calibration.json"


def _read() -> dict[str, dict[str, Times]]:
    """What the file holds, without what is damaged; nothing where it is not this user's own."""
    try:
        file = _file()
        if not is_own(file, stat.S_ISREG) or file.stat().st_size > MAX_BYTES:
            return {}
        tables = json.loads(file.read_text("utf-8"))
        return {
            machine: {entry: times for entry, times in table.items() if _are_times(times)}
            for machine, table in tables.items()
        }
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}


def _are_times(times: Any) -> bool:
    return (
        isinstance(times, dict)
        and bool(times)
        and all(time is None or (type(time) in (int, float) and 0 <= time < math.inf) for time in times.values())
        and next(iter(times.values())) is not None
    )


def _keep(machine: str, entry: str, times: Times) -> None:
    """Adds an entry to the file, which another process may have written meanwhile; a full disk is no error."""
    try:
        tables = _read()
        tables[machine] = {**tables.pop(machine, {}), entry: times}  # the latest one last
        tables = dict(list(tables.items())[-MAX_MACHINES:])
        descriptor, name = tempfile.mkstemp(dir=_file().parent, prefix="calibration-")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(tables, file, indent=1)
            Path(name).replace(_file())
        finally:
            Path(name).unlink(missing_ok=True)
    except OSError:
        pass


def _machine(threads: int) -> str:
    return f"{_hardware_and_versions()}, {threads} threads"


@cache
def _hardware_and_versions() -> str:
    """All that a measurement depends on; a hypervisor may hide features of one and the same CPU."""
    folder = Path(__file__).parent
    sources = b"".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.suffix in (".py", ".cpp", ".h"))
    cpu = cpu_facts("model name", "cpu family", "model\t", "flags", "Features") or platform.processor()
    features = hashlib.sha256(cpu.encode()).hexdigest()[:12]
    model = cpu_facts("model name").partition(":")[2].strip() or platform.machine()
    capability = torch.backends.cpu.get_cpu_capability()
    engine = hashlib.sha256(sources).hexdigest()[:12]
    return f"{model} ({capability}, {features}), torch {torch.__version__}, engine {engine}"


def _after_fork() -> None:
    global _lock
    _lock = threading.Lock()  # another thread of the parent may have held it


# a measurement in the background ends before the interpreter does: its threads would lose the ground they run on
atexit.register(lambda: _lock.acquire(timeout=LONGEST_WAIT_SECONDS))
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

__all__ = ["bucket", "choose", "fastest", "measured", "numbers", "taken"]
