"""Runs tasks of EleutherAI's lm-evaluation-harness on a loaded model, with the level of chance beside each figure."""

from __future__ import annotations

import copy
import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

SUITES = Path(__file__).with_name("suites.yaml")
# The measure that counts of a task which no suite holds: the first of these that it has.
MEASURES = ("acc_norm", "acc", "exact_match", "f1", "bleu", "chrf", "mcc", "perplexity", "word_perplexity")
CHOSEN = ("acc", "acc_norm")  # the measures of which guessing has a level
# Builders of `datasets` that read data alone; of the others one unpickles, and one asks a database.
BUILDERS = ("arrow", "csv", "json", "parquet", "text")
TRUST = "give --trust_remote_code if you trust it"


def suites() -> dict[str, dict[str, dict[str, str]]]:
    """The named sets: of each task, its `metric` and what it `asks`."""
    return yaml.safe_load(SUITES.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Suite:
    """Tasks to run. `counts`: the measure that counts of those in a named set, of which there is one if `is_named`."""

    manager: Any
    names: list[str]
    counts: Mapping[str, str]
    is_named: bool


def find_tasks(words: Sequence[str], include_path: str | None = None, *, trusted: bool = False) -> Suite:
    """The tasks that `words` name: `a,b c`, patterns such as `mmlu_*`, or a named set.

    Raises:
        ValueError: if lm_eval is not installed, there is no such folder, its tasks would run code unless `trusted`, or
            a task is unknown.
    """
    known = suites()
    asked = [name for word in words for name in word.split(",") if name]
    sets = [known[name] for name in asked if name in known]
    manager = _open_tasks([task for name in asked for task in known.get(name, [name])], include_path, trusted)
    names: dict[str, None] = {}
    for name in asked:
        found = list(known[name]) if name in known else manager.match_tasks([name])
        if not found:
            close = difflib.get_close_matches(name, [*known, *manager.all_tasks], n=3)
            hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "lm_eval ls tasks lists them all"
            raise ValueError(f"--tasks {name!r} is no task of lm-evaluation-harness; {hint}")
        names |= dict.fromkeys(found)
    counts = {task: entry["metric"] for tasks in sets for task, entry in tasks.items()}
    return Suite(manager, list(names), counts, bool(sets))


def _open_tasks(names: Sequence[str], include_path: str | None, trusted: bool) -> Any:
    """lm_eval's TaskManager, which knows its own tasks and those of the folder `include_path`.

    Its own tasks, whose index takes ten seconds, are left out where the folder has all of `names`.
    """
    try:
        import lm_eval.utils
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError:
        raise ValueError("--tasks needs lm-evaluation-harness: pip install 'hf-decoder[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if not trusted:
        lm_eval.utils.env = _sandbox(lm_eval.utils.env)
    if include_path is not None:
        if not Path(include_path).is_dir():
            raise ValueError(f"--include_path {include_path} is no folder; name one that holds tasks as .yaml")
        if not trusted:
            check_no_code(Path(include_path))
        manager = TaskManager(include_path=include_path, include_defaults=False)
        if all(manager.match_tasks([name]) for name in names):
            return manager
    return TaskManager(include_path=include_path)


def _sandbox(env: Any) -> Any:
    """The environment of the tasks' templates, in which these reach nothing but their row.

    lm_eval renders them unguarded, so that a template can run any code.
    """
    from jinja2 import BaseLoader, StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    sandboxed = ImmutableSandboxedEnvironment(
        loader=BaseLoader(), undefined=StrictUndefined, keep_trailing_newline=True
    )
    sandboxed.filters.update(env.filters)
    return sandboxed


def check_no_code(folder: Path) -> None:
    """Refuses tasks that lm_eval would run code for: functions, classes, metrics by name, files from elsewhere.

    Raises:
        ValueError: naming the file and what is in it.
    """
    for path in sorted(folder.rglob("*.yaml")):
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader)
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            raise ValueError(f"task file {path} is not valid YAML: {' '.join(str(error).split())}") from None
        for node in _nodes(root):
            if not node.tag.startswith("tag:yaml.org,2002:"):
                raise ValueError(f"task file {path} runs code ({node.tag} {node.value}); {TRUST}")
            if isinstance(node, yaml.MappingNode):
                for key, value in node.value:
                    if fault := _fault(folder, path, str(key.value), value):
                        raise ValueError(f"task file {path} may run code ({fault}); {TRUST}")


def _nodes(root: Any) -> Iterator[Any]:
    """Every node of a YAML document once, however often aliases name it."""
    seen: set[int] = set()
    left = [root] if root is not None else []
    while left:
        node = left.pop()
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            if isinstance(node, yaml.MappingNode):
                left += [part for pair in node.value for part in pair]
            elif isinstance(node, yaml.SequenceNode):
                left += node.value


def _fault(folder: Path, path: Path, key: str, value: Any) -> str | None:
    """What of a key and its value in a task file may run code, or None."""
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES
    from lm_eval.api import metrics  # noqa: F401  (fills the registry)
    from lm_eval.api.registry import METRIC_REGISTRY

    words = [str(node.value) for node in _nodes(value) if isinstance(node, yaml.ScalarNode)]
    if key in ("class", "hf_evaluate", "unsafe_code") and words != ["false"]:
        return key
    if key == "dataset_path" and words and words[0] in set(_PACKAGED_DATASETS_MODULES) - set(BUILDERS):
        return f"dataset_path: {words[0]}"
    if key == "metric" and words and words[0] not in METRIC_REGISTRY:
        return f"the metric {words[0]}, which lm_eval would look for on the Hub"
    if key == "include":
        outside = [word for word in words if not (path.parent / word).resolve().is_relative_to(folder.resolve())]
        if outside or any(not word.endswith(".yaml") for word in words):
            return f"include: {' '.join(words)}"
    return None


def run_tasks(
    model: Any,
    tokenizer: Any,
    suite: Suite,
    *,
    batch_size: int = 8,
    limit: float | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    trusted: bool = False,
) -> dict[str, dict[str, Any]]:
    """The figures of each task and group of `suite`, as lm_eval's own command line computes them.

    Returns:
        By name of task or group: its measures by lm_eval's names (`acc`, `acc_stderr`, ...), `rows`, and for
        `acc` and `acc_norm` the level of `chance`: the mean over the rows of 1 / the number of answers.

    Raises:
        ValueError: for a task that cannot be loaded or run.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # Its pool for standard errors forks this process, whose threads may hold locks: a child then hangs, and so do we.
    # One process draws the same samples.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    harness_model = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    try:
        found: Any = lm_eval.simple_evaluate(
            model=harness_model,
            tasks=suite.names,
            task_manager=suite.manager,
            num_fewshot=num_fewshot,
            limit=int(limit) if limit is not None and limit >= 1 else limit,
            apply_chat_template=apply_chat_template,
            confirm_run_unsafe_code=trusted,
        )
    except Exception as error:  # of a stranger's task: a template, a missing data set, a network that is not there
        raise ValueError(f"--tasks {' '.join(suite.names)} cannot be run: {type(error).__name__}: {error}") from error
    chance = {task: _chance(rows) for task, rows in found["samples"].items()}
    results = {}
    for task, measures in found["results"].items():
        parts = found.get("group_subtasks", {}).get(task) or [task]
        levels = [level for part in _leaves(parts, found) for level in chance.get(part, ())]
        results[task] = {
            **{
                key.replace(",none", ""): float(value) if isinstance(value, float) else value  # numpy's own is one
                for key, value in measures.items()
                if key not in ("alias", "name")
            },
            "rows": sum(len(found["samples"].get(part, ())) for part in _leaves(parts, found)),
            **({"chance": sum(levels) / len(levels)} if levels else {}),
        }
    return results


def _leaves(names: Sequence[str], found: Mapping[str, Any]) -> list[str]:
    """The tasks among `names` and in the groups among them."""
    groups = found.get("group_subtasks", {})
    return [leaf for name in names for leaf in (_leaves(groups[name], found) if groups.get(name) else [name])]


def _chance(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """How often guessing is right, row by row; empty for tasks without answers to choose from."""
    counts = [len(row["arguments"]) for row in rows]
    return [1 / count for count in counts] if counts and min(counts) > 1 else []


def with_random_weights(model: Any, seed: int, *, trust_remote_code: bool = False) -> Any:
    """A model of the same config and type with new weights: what the tasks give away by themselves."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        new = AutoModelForCausalLM.from_config(
            copy.deepcopy(model.config), dtype=model.dtype, trust_remote_code=trust_remote_code
        )
    return new.to(model.device).eval()


def counted_measure(measures: Mapping[str, Any], wanted: str | None = None) -> str:
    """The measure of a task that counts: `wanted`, or the first that it has in the order of `MEASURES`.

    lm_eval appends the name of a filter to a measure: `exact_match,strict-match`.
    """
    numbers = [
        key
        for key, value in measures.items()
        if isinstance(value, float | int) and "_stderr" not in key and key not in ("rows", "chance", "sample_len")
    ]
    for name in (wanted, *MEASURES):
        if found := [key for key in numbers if key == name or key.partition(",")[0] == name]:
            return found[0]
    return numbers[0] if numbers else ""
