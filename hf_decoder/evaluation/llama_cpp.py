"""Runs llama.cpp as a peer of the benchmark in its own process, because it dies with SIGSEGV on some processors.

The child measures its own time, so that communication between the processes does not count.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any


class Seconds(float):
    """The time of a call that measured itself."""


class LlamaCppPeer:
    """Greedy decoding by llama.cpp with the weights of a GGUF file; a context manager that ends its process.

    Args:
        model: the GGUF file.
        threads: threads of llama.cpp.
        timeout: seconds that loading, or decoding one text, may take.

    `failure` says why the process crashed, raised or took too long; None while it works.
    """

    def __init__(self, model: Path, threads: int, timeout: float):
        self.failure: str | None = None
        self._timeout = timeout
        self._log = model.with_suffix(".log")
        context = multiprocessing.get_context("spawn")  # a fork would share torch's threads and locks
        self._connection, end = context.Pipe()
        self._process = context.Process(target=_decode, args=(end, str(model), str(self._log), threads), daemon=True)
        self._process.start()
        end.close()  # so that its death is the end of the pipe
        self._receive("loading")

    def __call__(self, prompt: list[int], new_tokens: int) -> Seconds:
        """Decodes once; NaN after a failure."""
        if self.failure is not None:
            return Seconds("nan")
        with contextlib.suppress(OSError):  # if it died between two texts, `_receive` reads the end of the pipe
            self._connection.send((prompt, new_tokens))
        return self._receive("decoding")

    def _receive(self, what: str) -> Seconds:
        try:
            if self._connection.poll(self._timeout):
                answer = self._connection.recv()
                if isinstance(answer, float):
                    return Seconds(answer)
                self.failure = answer
            else:
                self.failure = f"{what} took more than {self._timeout:g} s"
                self.close()
        except (EOFError, OSError):
            self._process.join()
            self.failure = f"{what} ended the process: {_cause(self._process.exitcode)}{self._last_words()}"
        return Seconds("nan")

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return f" ({lines[-1].strip()})" if lines else ""
        return ""

    def close(self) -> None:
        """Kills the process, whatever it is doing."""
        self._process.kill()
        self._process.join()

    def __enter__(self) -> LlamaCppPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        self._connection.close()


def _cause(exit_code: int | None) -> str:
    """An exit code in words; a negative one is a signal's number."""
    if exit_code is not None and exit_code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-exit_code).name
    return f"exit code {exit_code}"


def _decode(connection: Connection, model: str, log: str, threads: int) -> None:
    """The child: loads the model, and answers each (prompt, new_tokens) with seconds, or with what went wrong."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for stream in (1, 2):  # llama.cpp must not write into the table
        os.dup2(file, stream)
    try:
        for answer in _answers(connection, model, threads):
            connection.send(answer)
    except EOFError:
        return
    except Exception as error:
        connection.send(f"{type(error).__name__}: {' '.join(str(error).split())}")


def _answers(connection: Connection, model: str, threads: int) -> Iterator[float]:
    import llama_cpp

    llama: Any = llama_cpp.Llama(model, n_ctx=2048, n_threads=threads, n_threads_batch=threads, verbose=False)
    yield 0.0
    while True:
        prompt, new_tokens = connection.recv()
        start = time.perf_counter()
        llama.reset()
        llama.eval(prompt)
        for _ in range(new_tokens - 1):
            llama.eval([llama.sample(temp=0.0, top_k=1)])
        llama.sample(temp=0.0, top_k=1)
        yield time.perf_counter() - start
