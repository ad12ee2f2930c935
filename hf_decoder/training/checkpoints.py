"""Marks checkpoints that are whole, checks which run they belong to, and deletes those that are superseded.

`CheckpointKeeper` marks a checkpoint once all its files are on the disk. The mark lists their sizes and digests and
describes the run. A checkpoint without a mark, or with a file of another size, is never resumed from. Older
checkpoints are deleted only after the newer one is marked.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import PretrainedConfig, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from hf_decoder.data.tokenization import digest_of
from hf_decoder.safety.interrupts import going_on

if TYPE_CHECKING:
    from datasets import Dataset

CHECKPOINT_FOLDER = re.compile(r"checkpoint-(\d+)")
MARK = "complete.json"

# Fields of a config that do not change what the model computes.
_UNCOUNTED_FIELDS = ("transformers_version", "dtype", "_name_or_path", "architectures", "auto_map", "use_cache")
# Parts of a run's description that older checkpoints lack.
_LATER_PARTS = ("training", "recipe", "task")


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The checkpoint folders of a run, whole or not, in order of their steps."""
    found = [path for path in Path(output_dir).glob("checkpoint-*") if CHECKPOINT_FOLDER.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def is_complete(checkpoint: str | Path) -> bool:
    """Whether the checkpoint is marked as whole and every file has the size that the mark lists."""
    files = _mark(checkpoint).get("files", {})
    folder = Path(checkpoint)
    try:
        return bool(files) and all((folder / name).stat().st_size == size for name, size in files.items())
    except OSError:
        return False


def last_complete(output_dir: str | Path) -> Path | None:
    """The latest whole checkpoint of a run, or None."""
    return next((path for path in reversed(checkpoints(output_dir)) if is_complete(path)), None)


def check_content(checkpoint: str | Path) -> None:
    """Reads every file that the mark lists and compares its digest.

    A safetensors file has no checksum, so nothing else would notice a flipped bit. A folder without digests passes.
    Reads about 2 GB/s from memory.

    Raises:
        ValueError: naming the first file that is not what was written.
    """
    folder = Path(checkpoint)
    for name, digest in _mark(folder).get("sha256", {}).items():
        try:
            same = file_digest(folder / name) == digest
        except OSError:
            same = False
        if not same:
            raise ValueError(
                f"{folder / name} is not what was written there: the disk lost some of it, or it was changed; go on "
                f"from another checkpoint; where the change was meant, delete {MARK} to load it as it is"
            )


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def checkpoint_to_resume(wanted: str | None, output_dir: str | Path) -> str | None:
    """The checkpoint folder that `--resume_from_checkpoint` asks for: a path, or `true` for the last whole one.

    Raises:
        ValueError: if there is none, or if it is not whole or was changed.
    """
    if wanted is None or wanted.lower() == "false":
        return None
    if wanted.lower() == "true":
        last = last_complete(output_dir)
        if last is None:
            found = ", ".join(f"{path.name} is not whole" for path in checkpoints(output_dir))
            raise ValueError(
                f"there is no checkpoint to resume in --output_dir {output_dir}" + (f": {found}" if found else "")
            )
        check_content(last)
        return str(last)
    if not (Path(wanted) / "trainer_state.json").is_file():
        raise ValueError(f"--resume_from_checkpoint {wanted} is not a checkpoint: it holds no trainer_state.json")
    if not is_complete(wanted):
        raise ValueError(
            f"--resume_from_checkpoint {wanted} is not whole: its saving was cut short or a file was changed; "
            "--resume_from_checkpoint without a name takes the last whole one"
        )
    check_content(wanted)
    return wanted


def _mark(checkpoint: str | Path) -> dict[str, Any]:
    try:
        mark = json.loads((Path(checkpoint) / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return mark if isinstance(mark, dict) else {}


# ---------------------------------------------------------------------------------------------- which run it is


def describe_run(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: dict[str, Any],
    *,
    trained_tokenizer: dict[str, Any] | None = None,
    args: TrainingArguments | None = None,
    recipe: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """Describes what has to stay the same for a run to resume: model, tokenizer, data, their order, recipe.

    Args:
        data: from `describe_data`, or a description of your own.
        trained_tokenizer: settings of a tokenizer trained for the run.
        args: say which rows make a step.
        recipe: from `optimizers.describe_recipe`.
    """
    model = {name: value for name, value in config.to_dict().items() if name not in _UNCOUNTED_FIELDS}
    described = {
        "model": model,
        "tokenizer": {
            **(trained_tokenizer or {}),
            "tokens": len(tokenizer),
            "content": digest_of(tokenizer),
        },
        "data": data,
    }
    if args is not None:
        described["training"] = {
            # a step has the same rows however many processes and accumulation steps share them
            "rows_per_step": args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "seed": args.seed,
            "data_seed": args.data_seed,
        }
    if recipe is not None:
        described["recipe"] = recipe
    return json.loads(json.dumps(described, default=str))


def describe_data(tokenized: Dataset, block_size: int) -> dict[str, Any]:
    """Sizes of a tokenised text, and a hash of all its tokens in order."""
    digest = hashlib.sha256()
    tokens = 0
    for batch in tokenized.select_columns("input_ids").with_format("arrow").iter(1000):
        for chunk in batch["input_ids"].chunks:
            values = chunk.flatten().to_numpy(zero_copy_only=False)
            tokens += len(values)
            digest.update(chunk.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            digest.update(values.tobytes())
    return {
        "block_size": block_size,
        "documents": len(tokenized),
        "tokens": tokens,
        "content": digest.hexdigest()[:16],
    }


def check_same_run(checkpoint: str | Path, run: dict[str, dict[str, Any]]) -> None:
    """Refuses to resume with another model, tokenizer, text, order of rows or recipe than the checkpoint's.

    Raises:
        ValueError: naming what differs, with both values.
    """
    before = _mark(checkpoint).get("run", {})
    for part, now in run.items():
        then = before.get(part, now if part in _LATER_PARTS else {})
        for name in [*now, *(name for name in then if name not in now)]:
            if part == "tokenizer" and (name not in then or name not in now):
                continue  # how a tokenizer was trained counts only where both were trained
            if then.get(name) != now.get(name):
                raise ValueError(
                    f"{checkpoint} belongs to another run: the {part} differs, {name} was {then.get(name)!r} and is "
                    f"{now.get(name)!r} now; resume with the flags and files it was started with"
                )


# ---------------------------------------------------------------------------------------------- keeping


class CheckpointKeeper(TrainerCallback):
    """Marks checkpoints as whole, deletes the superseded ones, and explains a save that failed.

    Args:
        run: from `describe_run`; written into every mark.
        save_total_limit: how many whole checkpoints to keep besides the best one; None keeps all. Trainer's own limit
            must be off (`args.save_total_limit = None`), because it counts half-written ones too.
        last: the checkpoint that the run resumes from.
    """

    def __init__(
        self, run: dict[str, dict[str, Any]], save_total_limit: int | None = None, last: str | Path | None = None
    ):
        self.run = run
        self.save_total_limit = save_total_limit
        self._last = None if last is None else Path(last)
        self._saving: Path | None = None

    def on_step_end(self, args, state, control, **kwargs):
        self._saving = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and self._saving.exists():
            shutil.rmtree(self._saving)  # left by a run that was cut short or continued differently

    def on_save(self, args, state, control, **kwargs):
        self._last = checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # every process writes its own random state
        if not state.is_world_process_zero:
            return
        mark_complete(checkpoint, self.run)
        self._delete_superseded(checkpoint, state.best_model_checkpoint)

    def _delete_superseded(self, newest: Path, best: str | None) -> None:
        others = [path for path in checkpoints(newest.parent) if path != newest]
        spare = {Path(best).resolve()} if best else set()
        whole = [path for path in others if step_of(path) < step_of(newest) and is_complete(path)]
        if self.save_total_limit is not None and self.save_total_limit > 0:
            whole = whole[len(whole) - min(len(whole), self.save_total_limit - 1) :]
        for path in others:
            if path not in whole and path.resolve() not in spare:
                (path / MARK).unlink(missing_ok=True)
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def explain_failed_save(self, output_dir: str | Path) -> Iterator[None]:
        """Turns an error of writing a checkpoint into an OSError of one line, and removes the half-written files."""
        try:
            yield
        except (OSError, SafetensorError, RuntimeError) as error:
            broken = self._saving
            if broken is None or not broken.exists() or is_complete(broken):
                raise
            free = shutil.disk_usage(output_dir).free
            shutil.rmtree(broken, ignore_errors=True)
            last = last_complete(output_dir)
            kept = (
                f"{last} is whole: make room and go on with --resume_from_checkpoint" if last else "there is no other"
            )
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise OSError(f"{broken} could not be written ({reason}; {free / 1e6:,.1f} MB free); {kept}") from error

    def explain_stop(self, args: TrainingArguments) -> contextlib.AbstractContextManager[None]:
        """Makes an interrupt name the checkpoint to resume from."""

        def words() -> str | None:
            if args.process_index:
                return None
            if self._last is None:
                return " before the first checkpoint, nothing was kept; the same command starts from the beginning"
            return (
                f" after step {step_of(self._last)}, saved as {self._last}; the same command with "
                "--resume_from_checkpoint goes on"
            )

        return going_on(words, args.output_dir)


def mark_complete(checkpoint: Path, run: dict[str, Any]) -> None:
    """Writes the mark of a checkpoint atomically, after its files are on the disk."""
    files, digests = {}, {}
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.name != MARK):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        name = path.relative_to(checkpoint).as_posix()
        files[name], digests[name] = path.stat().st_size, file_digest(path)
    part = checkpoint / f"{MARK}.part"
    with part.open("w", encoding="utf-8") as file:
        json.dump({"files": files, "sha256": digests, "run": run}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    part.replace(checkpoint / MARK)
