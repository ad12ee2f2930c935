"""Runs the stages from raw text to an assistant one after another, each in a process of its own, and records them.

A stage is a verb of the command line with its flags. It writes a plain model folder beside the others. One record says
what each was made with. By it the next run skips what is done, goes on with what was cut short, and refuses to replace
what was made with other settings.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hf_decoder.reporting.runs import RECORD, TESTS
from hf_decoder.safety.interrupts import Interrupted
from hf_decoder.training.checkpoints import file_digest, last_complete
from hf_decoder.training.launch import configuration_file

DATA = "data"
# A stage of training, in the order in which they are run -> the verb and its first flags.
TRAINING = {
    "pretrain": ("pretrain",),
    "sft": ("finetune", "--task", "sft"),
    "preference": ("finetune", "--task", "preference"),
    "kto": ("finetune", "--task", "kto"),
    "grpo": ("finetune", "--task", "grpo"),
    "rloo": ("finetune", "--task", "rloo"),
}
# The file that a verb writes last.
LAST_FILE = {
    "tokenizer": "tokenizer_report.json",
    "pretrain": "README.md",
    "finetune": "README.md",
    "eval": "eval_results.json",
}
OWN = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "task")
MODEL = "model_name_or_path"


@dataclass
class Stage:
    """A verb with its flags, and what its result depends on."""

    name: str
    verb: tuple[str, ...]
    flags: dict[str, Any]
    folder: Path
    key: str = ""
    inputs: dict[str, str] = field(default_factory=dict)

    def argv(self) -> list[str]:
        """The words of the command line."""
        words = [*self.verb]
        for name, value in {**self.flags, "output_dir": str(self.folder)}.items():
            if isinstance(value, dict):
                value = json.dumps(value)
            values = value if isinstance(value, list) else [value]
            said = [str(one).lower() if isinstance(one, bool) else str(one) for one in values]
            words += [f"--{name}={said[0]}"] if len(said) == 1 else [f"--{name}", *said]
        return words

    @property
    def trains(self) -> bool:
        return self.verb[0] in ("pretrain", "finetune")

    def is_there(self) -> bool:
        """Whether the folder holds what the verb writes last."""
        return (self.folder / LAST_FILE[self.verb[0]]).is_file()


def lay_out(recipe: Mapping[str, Mapping[str, Any]], output_dir: Path) -> list[Stage]:
    """The stages of a recipe in order: tokenizer, trainings, and each test of `eval` after each training.

    A training starts from the one before it, and pretraining takes the tokenizer's stage, unless they name others.
    `{data}` and `{sft}`, `{pretrain}`, ... in a value stand for the folder of that name.

    Raises:
        ValueError: for a flag that a stage may not have, or a first training without a model to start from.
    """
    for name in ("tokenizer", *TRAINING):
        if own := set(OWN) & set(recipe.get(name) or ()):
            raise ValueError(f"{name}: {sorted(own)[0]} is not for a recipe to say; every stage has its own")
    stages = [_stage("tokenizer", ("tokenizer",), recipe, output_dir)] if "tokenizer" in recipe else []
    before: Stage | None = None
    for name, verb in TRAINING.items():
        if name not in recipe:
            continue
        stage = _stage(name, verb, recipe, output_dir)
        if name == "pretrain":
            if stages and MODEL not in stage.flags:
                stage.flags.setdefault("tokenizer_name", str(stages[0].folder))
        elif before is not None:
            if before.flags.get("use_peft") and not before.flags.get("merge") and MODEL not in stage.flags:
                raise ValueError(
                    f"{before.name}: use_peft without merge leaves an adapter, from which {name} cannot start"
                )
            stage.flags = {MODEL: str(before.folder), **stage.flags}
        elif MODEL not in stage.flags and "preset" not in stage.flags:
            raise ValueError(f"{name}: nothing is trained before it, so it needs {MODEL}")
        before = stage
        stages.append(stage)
        for test in recipe.get("eval") or {}:
            stages.append(_test(test, stage, recipe, output_dir))
    if not stages:
        raise ValueError(f"the recipe has no stage; name one of: tokenizer, {', '.join(TRAINING)}")
    return stages


def _stage(name: str, verb: tuple[str, ...], recipe: Mapping[str, Any], output_dir: Path) -> Stage:
    flags = {key: value for key, value in (recipe[name] or {}).items() if value is not None}
    return Stage(name, verb, _placed(flags, output_dir), output_dir / name)


def _test(test: str, stage: Stage, recipe: Mapping[str, Any], output_dir: Path) -> Stage:
    flags = recipe["eval"][test]
    if not isinstance(flags, Mapping):
        raise ValueError(f"eval holds tests by name, each with its flags: eval: {{my_test: {{{test}: {flags!r}}}}}")
    if own := {*OWN, MODEL} & set(flags):
        raise ValueError(f"eval, {test}: {sorted(own)[0]} is not for a recipe to say; each training is measured")
    flags = {MODEL: str(stage.folder), **_placed(flags, output_dir)}
    return Stage(f"{test} of {stage.name}", ("eval",), flags, output_dir / TESTS / test / stage.name)


def _placed(value: Any, output_dir: Path) -> Any:
    """A value with the folders in place of their names in braces."""
    if isinstance(value, Mapping):
        return {key: _placed(one, output_dir) for key, one in value.items()}
    if isinstance(value, list):
        return [_placed(one, output_dir) for one in value]
    if isinstance(value, str):
        for name in (DATA, "tokenizer", *TRAINING):
            value = value.replace(f"{{{name}}}", str(output_dir / name))
    return value


def describe(stages: Sequence[Stage], output_dir: Path, data: Any) -> None:
    """Gives each stage the key of all that its result depends on: flags, files, and the stages that it reads.

    Raises:
        ValueError: for a file that is not there.
    """
    made = {} if data is None else {str(output_dir / DATA): (DATA, data_key(data))}
    for stage in stages:
        settings: dict[str, Any] = {}
        stage.inputs = {}
        for name, value in stage.flags.items():
            others = []
            for one in value if isinstance(value, list) else [value]:
                folder = next((folder for folder in made if f"{one}/".startswith(f"{folder}/")), None)
                if folder is not None:  # wherever the output folder lies
                    maker, key = made[folder]
                    stage.inputs[f"{name} {maker}{str(one)[len(folder) :]}"] = key
                    continue
                others.append(one)
                if isinstance(one, str) and (name.endswith("_file") or os.path.exists(one)):
                    stage.inputs[f"{name} {one}"] = _content(stage, name, one)
            settings[name] = others if isinstance(value, list) else next(iter(others), None)
        stage.key = _digest([stage.verb, settings, stage.inputs])
        made[str(stage.folder)] = stage.name, stage.key


def data_key(data: Any) -> str:
    """What tells the rows of one recipe from another's; the standard library is that of the running Python."""
    return _digest(["data", data, sys.version_info[:2]])


def _content(stage: Stage, name: str, path: str) -> str:
    """A digest of a file, or of the names and sizes of what a folder holds."""
    from hf_decoder.data.sources import weighted_files

    (found, _), *_ = weighted_files(path)
    file = Path(found).expanduser()
    if file.is_file():
        return file_digest(file)
    if not file.is_dir():
        raise ValueError(f"{stage.name}: --{name} {path} does not exist")
    inside = sorted(one for one in file.rglob("*") if one.is_file())
    return _digest([(str(one.relative_to(file)), one.stat().st_size) for one in inside])


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


class Record:
    """What was run in an output folder, stage by stage, on the disk before and after each."""

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / RECORD
        try:
            self.stages: dict[str, dict[str, Any]] = json.loads(self.path.read_text(encoding="utf-8"))["stages"]
        except FileNotFoundError:
            self.stages = {}
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{self.path} is damaged; delete it and what is to be run again") from None

    def write(self, stage: Stage, **more: Any) -> None:
        self.stages[stage.name] = {**asdict(stage), "folder": stage.folder.name, **more}
        self._save()

    def note(self, name: str, **facts: Any) -> None:
        self.stages[name] = facts
        self._save()

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        half = self.path.with_suffix(".tmp")
        half.write_text(json.dumps({"stages": self.stages}, indent=2, default=str) + "\n", encoding="utf-8")
        half.replace(self.path)

    def is_done(self, stage: Stage) -> bool:
        entry = self.stages.get(stage.name, {})
        return entry.get("key") == stage.key and bool(entry.get("done")) and stage.is_there()

    def change(self, stage: Stage) -> str | None:
        """What is different from the run that the folder holds, or None."""
        entry = self.stages.get(stage.name)
        if entry is None or entry.get("key") == stage.key:
            return None
        if stage.verb[0] == "eval" or (not entry.get("done") and last_complete(stage.folder) is None):
            return None  # nothing would be lost that took long
        said = []
        for kind, now in (("flags", stage.flags), ("inputs", stage.inputs)):
            before = entry.get(kind) or {}
            names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
            if kind == "flags":
                said += [f"{name} {before.get(name, 'unset')} -> {now.get(name, 'unset')}" for name in names]
            else:
                said += [f"the content of {name} changed" for name in names]
        return ", ".join(said[:3]) or "its order in the recipe"


def check_unchanged(stages: Sequence[Stage], record: Record) -> None:
    """Refuses to replace what was made with other settings.

    Raises:
        ValueError: naming the stage and what is different.
    """
    for stage in stages:
        if (change := record.change(stage)) is not None:
            raise ValueError(
                f"{stage.name} in {record.path.parent} was run with other settings ({change}); "
                "--overwrite_output_dir runs it and what follows from it again, another --output_dir keeps both"
            )


def run_stage(stage: Stage, record: Record, lock: tuple[int, ...], *, num_processes: int = 1) -> float:
    """Runs a stage to its end, from its last checkpoint where there is one; returns its seconds. `lock` is `alone`'s.

    Raises:
        ValueError: if it fails; what is wrong it has said itself.
        Interrupted: after Ctrl-C or SIGTERM, which the stage gets, too, and ends by saving what it has.
    """
    entry = record.stages.get(stage.name, {})
    words, seconds = stage.argv(), 0.0
    if stage.verb[0] != "eval" and stage.folder.is_dir() and stage.name in record.stages:
        if stage.trains and entry.get("key") == stage.key and last_complete(stage.folder) is not None:
            words.append("--resume_from_checkpoint=true")
            seconds = float(entry.get("seconds") or 0)
        else:
            words.append("--overwrite_output_dir=true")
    command = [sys.executable, "-m", "hf_decoder.cli.main", *words]
    if num_processes > 1 and stage.trains:
        launch = ["--config_file", str(configuration_file("ddp")), "--num_processes", str(num_processes), "-m"]
        command = [sys.executable, "-m", "accelerate.commands.launch", *launch, *command[2:]]
    said = shlex.join(["hf-decoder", *stage.argv()])
    record.write(stage, done=False, seconds=seconds, command=said)
    started, code = time.monotonic(), None
    try:
        code = _wait(command, lock)
    finally:
        seconds += time.monotonic() - started
        record.write(stage, done=code == 0 and stage.is_there(), seconds=round(seconds, 1), command=said)
    if not record.is_done(stage):
        reason = f"ended with exit code {code}" if code else f"left no {LAST_FILE[stage.verb[0]]}"
        raise ValueError(f"{stage.name} {reason}; the same command goes on from there")
    return seconds


def _wait(command: Sequence[str], lock: tuple[int, ...]) -> int:
    """Runs a process to its end and hands on what asks this one to end."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [_root(), os.environ.get("PYTHONPATH")]))}
    # In a session of its own: Ctrl-C on a terminal would else reach it a second time, which ends it unsaved.
    process = subprocess.Popen(command, env=environment, start_new_session=True, pass_fds=lock)
    try:
        return process.wait()
    except Interrupted as stop:
        process.send_signal(stop.number)
        process.wait()
        raise
    finally:
        if process.poll() is None:  # a second signal while it saved
            process.kill()


def _root() -> str:
    """Where this package is found, for a process that may start elsewhere."""
    return str(Path(__file__).resolve().parents[2])


@contextlib.contextmanager
def alone(output_dir: Path) -> Iterator[tuple[int, ...]]:
    """Holds the output folder for this run; its stages hold it, too, so it is free when the last of them has ended.

    Raises:
        ValueError: if another run works there, or a stage of one that was killed.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield ()
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    with (output_dir / f".{RECORD}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"another run is at work in {output_dir}, or a stage of one that was killed; wait for it or end it"
            ) from None
        yield (file.fileno(),)
