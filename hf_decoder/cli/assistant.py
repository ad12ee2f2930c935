"""`hf-decoder assistant`: every stage from raw text to an assistant, one after another, and a report."""

from __future__ import annotations

import json
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from hf_decoder.assistant import rows, stages
from hf_decoder.cli import check_at_least, check_package, did_you_mean
from hf_decoder.cli.arguments import check_verb, takes_argv
from hf_decoder.cli.flags.assistant import RECIPES, AssistantArguments
from hf_decoder.evaluation.harness import find_tasks
from hf_decoder.reporting.report import write_report
from hf_decoder.reporting.runs import read_run
from hf_decoder.safety.interrupts import going_on
from hf_decoder.tuning.sampling import Rewards

STAGES = ("data", "tokenizer", *stages.TRAINING, "eval")


@takes_argv
def main(args: AssistantArguments) -> int:
    """Runs what is not done yet, and writes the report.

    Raises:
        ValueError: for what the user can get wrong, before any stage is run; or for a stage that fails.
    """
    output_dir, recipe = Path(args.output_dir), read_recipe(args)
    num_processes = recipe.get("num_processes", 1) if args.num_processes is None else args.num_processes
    check_at_least("--num_processes", num_processes, 1)
    planned = stages.lay_out(recipe, output_dir)
    _check(planned, recipe)
    stages.describe(planned, output_dir, recipe.get("data"))
    record = stages.Record(output_dir)
    if not args.overwrite_output_dir:
        stages.check_unchanged(planned, record)
    started = time.monotonic()
    with stages.alone(output_dir) as lock, going_on(lambda: "; the same command goes on from there"):
        if "data" in recipe:
            for line in rows.write_data(recipe["data"], output_dir / stages.DATA, record):
                print(f"data: {line}", flush=True)
        for number, stage in enumerate(planned, 1):
            head = f"[{number}/{len(planned)}] {stage.name}"
            if record.is_done(stage):
                print(f"{head}: done before", flush=True)
                continue
            print(head, flush=True)
            seconds = stages.run_stage(stage, record, lock, num_processes=num_processes)
            print(f"{head}: {seconds:.0f} s", flush=True)
    print(f"\n{time.monotonic() - started:.0f} s in all")
    if trained := [stage for stage in planned if stage.trains]:
        print(f"{write_report([read_run(output_dir)], output_dir)} shows what each stage changed")
        print(f"talk to it: hf-decoder generate {trained[-1].folder} --chat")
    return 0


def read_recipe(args: AssistantArguments) -> dict[str, Any]:
    """The stages and their flags: of the package's recipe, with those that are given in place of its own."""
    given: dict[str, Any] = {}
    for field in fields(args):
        value = getattr(args, field.name)
        if field.name in STAGES and value is not None:
            given[field.name] = _mapping(field.name, value)
    name = args.recipe or (None if given else RECIPES[0])
    if name is None:
        return given
    text = (Path(stages.__file__).parent / f"{name}.yaml").read_text(encoding="utf-8")
    return {**yaml.safe_load(text), **given}


def _mapping(name: str, value: Any) -> Any:
    if name == "data" and value == rows.STANDARD_LIBRARY:
        return value
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            value = None
    if not isinstance(value, dict):
        raise ValueError(f"{name} must hold flags by name, as a mapping in --config or as JSON")
    return value


def _check(planned: list[stages.Stage], recipe: dict[str, Any]) -> None:
    """Complains about all that can be known to be wrong before hours are spent on the stages before it."""
    if "data" in recipe:
        rows.check_data(recipe["data"], did_you_mean)
    for stage in planned:
        try:
            check_verb(stage.verb[0], stage.argv()[1:])
            if {"bleu", "chrf"} & set(_words(stage.flags, "metrics")):
                check_package("sacrebleu", "eval")
            if stage.flags.get("load_in_4bit") or stage.flags.get("load_in_8bit"):
                check_package("bitsandbytes", "qlora")
            if rewards := _words(stage.flags, "reward_funcs"):
                Rewards(rewards, seconds=1)
            if tasks := _words(stage.flags, "tasks"):
                find_tasks(
                    tasks,
                    stage.flags.get("include_path"),
                    trusted=bool(stage.flags.get("trust_remote_code")),
                )
        except ValueError as error:
            raise ValueError(f"{stage.name}: {error}") from None


def _words(flags: dict[str, Any], name: str) -> list[str]:
    value = flags.get(name) or []
    return [str(one) for one in (value if isinstance(value, list) else [value])]
