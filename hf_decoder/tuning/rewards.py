"""Rewards of reinforcement learning, by name or import path; a reward that fails ends the run in one clear line.

A reward is a function as TRL calls it: `reward(prompts, completions, completion_ids, **columns)` returns one number a
completion, or None where it has nothing to say. `columns` are the other columns of the rows, each as a list.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import math
import os
import re
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from hf_decoder.safety.limits import TooLongError, ended_after

Reward = Callable[..., Sequence[float | None]]

REFERENCE = "reference"  # the column that `exact_match` reads
MODEL = "reward_model"
NAMES = f"python_parses, exact_match, regex:PATTERN, length:TOKENS, {MODEL}:FOLDER or package.module:function"
OF_TRL = {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}


def text_of(answer: Any) -> str:
    """The text of a prompt or a completion, of which a chat has the last turn."""
    return answer if isinstance(answer, str) else str(answer[-1]["content"] or "")


def python_parses(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
    """1 for a completion that is Python, together with a prompt that begins a block of it; 0 for any other."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        code = text_of(completion)
        begun = isinstance(prompt, str) and _parses(prompt.rstrip() + " pass")
        rewards.append(float(bool(code.strip()) and _parses(prompt + code if begun else textwrap.dedent(code))))
    return rewards


def _parses(code: str) -> bool:
    """Whether this is Python that says something: comments alone do not."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of strange escapes in strings
        try:
            return bool(ast.parse(code).body)
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            return False


def exact_match(completions: Sequence[Any], reference: Sequence[Any], **columns: Any) -> list[float]:
    """1 for a completion that is its row's reference, or one of them, spaces at the ends aside."""
    pairs = zip(completions, reference, strict=True)
    return [float(text_of(completion).strip() in _options(known)) for completion, known in pairs]


def _options(reference: Any) -> set[str]:
    """The right answers of a row: a text, several, or the turns of a chat."""
    options = reference if isinstance(reference, list) else [reference]
    return {(option if isinstance(option, str) else text_of([option])).strip() for option in options}


def regex(completions: Sequence[Any], pattern: re.Pattern[str], **columns: Any) -> list[float]:
    """1 for a completion in which the pattern is found."""
    return [float(pattern.search(text_of(completion)) is not None) for completion in completions]


def length(completion_ids: Sequence[Sequence[int]], tokens: int, **columns: Any) -> list[float]:
    """1 for a completion of so many tokens; less for each token more or fewer, down to 0 for none or twice as many."""
    return [max(0.0, 1 - abs(len(ids) - tokens) / tokens) for ids in completion_ids]


def find_reward(name: str) -> Reward:
    """The reward of this name; `reward_model:FOLDER` is not among them.

    Raises:
        ValueError: for a name that is unknown, or without what belongs behind its colon; for a module that cannot be
            imported, or that has no such function.
    """
    kind, _, setting = name.partition(":")
    if name in ("python_parses", "exact_match"):
        return python_parses if name == "python_parses" else exact_match
    if kind == "length":
        if not setting.isdecimal() or not int(setting):
            raise ValueError(f"reward {name!r} needs a number of tokens: length:64")
        return functools.partial(length, tokens=int(setting))
    if kind == "regex":
        try:
            pattern = re.compile(setting)
        except re.error as error:
            raise ValueError(f"reward {name!r} is no regular expression: {error}") from None
        if not setting:
            raise ValueError(r"reward 'regex' needs a pattern: 'regex:\d+$'")
        return functools.partial(regex, pattern=pattern)
    if not setting or not all(part.isidentifier() for part in kind.split(".")):
        raise ValueError(f"reward {name!r} is unknown; it may be {NAMES}")
    return _imported(kind, setting, name)


def _imported(module_name: str, function: str, name: str) -> Reward:
    if os.getcwd() not in sys.path:  # an installed command does not look there
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a module of the user's may raise anything
        raise ValueError(f"reward {name!r}: {module_name} cannot be imported: {_words(error)}") from None
    found = getattr(module, function, None)
    if not callable(found):
        raise ValueError(f"reward {name!r}: {module_name} has no function {function}")
    if inspect.iscoroutinefunction(found):
        raise ValueError(f"reward {name!r} is an async function; give one that returns the rewards")
    return found


def columns_read(reward: Reward) -> set[str]:
    """The columns of a row, prompt aside, without which a reward cannot be called."""
    parameters = inspect.signature(reward).parameters.values()
    needed = {
        p.name for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    return needed - OF_TRL


def guarded(name: str, reward: Reward, seconds: float) -> Reward:
    """`reward`, whose failures are ValueErrors that name it: an exception, what is no number, too few, too long.

    It runs in a thread, which is the one way to leave a call behind that never ends. An expression would hold the
    interpreter there, and runs in the main thread, where a timer ends it.
    """
    by_timer = isinstance(reward, functools.partial) and reward.func is regex

    def call(prompts: Sequence[Any], **columns: Any) -> list[float | None]:
        result: list[Any] = []
        failure: list[BaseException] = []

        def work() -> None:
            try:
                result.extend(reward(prompts=prompts, **columns))
            except BaseException as error:  # SystemExit, too: the reward is not to end the run by itself
                failure.append(error)

        try:
            if by_timer:
                with ended_after(seconds):
                    result.extend(reward(prompts=prompts, **columns))
            else:
                thread = threading.Thread(target=work, name=f"reward {name}", daemon=True)
                thread.start()
                thread.join(seconds)
                if thread.is_alive():
                    raise TooLongError
        except TooLongError:
            raise ValueError(f"reward {name!r} did not end within {seconds:g} s (--reward_timeout)") from None
        if failure:
            raise ValueError(f"reward {name!r} failed: {_words(failure[0])}")
        if len(result) != len(prompts):
            raise ValueError(f"reward {name!r} returned {len(result)} values for {len(prompts)} completions")
        return [None if value is None else _number(name, value) for value in result]

    call.__name__ = name
    return call


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"reward {name!r} returned {value!r:.40}, which is no number") from None
    if not math.isfinite(number):
        raise ValueError(f"reward {name!r} returned {number}; give None where there is nothing to reward")
    return number


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
