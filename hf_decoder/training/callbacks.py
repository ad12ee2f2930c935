"""Callbacks and helpers for `transformers.Trainer`: progress bar with throughput, loss curve, sample text."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    PreTrainedTokenizerBase,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)
from transformers.trainer import TRAINER_STATE_NAME

from hf_decoder.engine.precision import cpu_has
from hf_decoder.reporting.markup import fenced
from hf_decoder.training.checkpoint_formats import is_sharded, resumable
from hf_decoder.training.checkpoints import checkpoints
from hf_decoder.training.throughput import TokenClock, steps_planned

# Steps between two points of the loss curve. A shorter run still gets `LEAST_POINTS` points.
LOGGING_STEPS = 10
LEAST_POINTS = 20


def bf16_supported() -> bool:
    """Whether this machine multiplies bf16 in hardware, so that autocast is faster than fp32."""
    if torch.accelerator.is_available():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_has("avx512_bf16", "amx_bf16")


def choose_bf16(args: TrainingArguments) -> None:
    """Turns on bf16 autocast where the hardware supports it, unless the flags set bf16 or fp16."""
    if args.bf16 is None:
        args.bf16 = bf16_supported() and not args.fp16


def logging_steps(steps: int) -> int:
    """Steps between two points of the loss curve of a run of `steps`."""
    return max(1, min(LOGGING_STEPS, steps // LEAST_POINTS))


def keep_freed_memory() -> None:
    """Makes glibc keep large freed blocks for the next step.

    A training step on a CPU allocates the same large tensors again and again. Fresh pages from the system took a
    fifth of each step (two cores). Without glibc this does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_threshold, 2**31 - 1)


class TrimMemory(TrainerCallback):
    """Returns unused pages to the system every `STEPS` steps of a run with `keep_freed_memory`.

    Where tensor sizes change from step to step, the kept blocks do not fit and the process would grow without end.
    """

    STEPS = 50

    def __init__(self) -> None:
        self.trim = ctypes.CDLL(None).malloc_trim if platform.libc_ver()[0] == "glibc" else None

    def on_step_end(self, args, state, control, **kwargs):
        if self.trim is not None and state.global_step % self.STEPS == 0:
            self.trim(0)


def add_callbacks(trainer: Trainer, *callbacks: TrainerCallback) -> None:
    """Adds `callbacks`, our progress bar, and on a CPU the memory settings."""
    for callback in callbacks:
        trainer.add_callback(callback)
    if trainer.args.use_cpu:
        keep_freed_memory()
        trainer.add_callback(TrimMemory())
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(SpeedBar())


def collate_rows(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Collates packed rows into a batch that asks only for the loss, so that no logits are held."""
    return {**default_data_collator(rows), "skip_logits": True}


class SpeedBar(ProgressCallback):
    """Trainer's progress bar, with the loss and tokens per second beside the time left.

    Tokens are counted by Trainer itself (`include_num_input_tokens_seen="all"`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._clock = TokenClock()

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._clock.restart(state)
        if self.training_bar is not None:
            # A resumed run starts where it stopped, so that the time left is right.
            self.current_step = state.global_step
            self.training_bar.update(state.global_step)
            self.training_bar.initial = state.global_step
            self.training_bar.set_description("train")

    def close(self) -> None:
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()

    def on_evaluate(self, args, state, control, **kwargs):
        super().on_evaluate(args, state, control, **kwargs)
        self._clock.restart(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs:
            return
        if "eval_loss" in logs:
            self.training_bar.write(f"step {state.global_step}: held-out loss {logs['eval_loss']:.3f}")
        elif "loss" in logs:
            _, speed = self._clock.read(state)
            self._clock.restart(state)
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}, {speed:,.0f} tokens/s")


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Times the block, says how long it took, and records it as `seconds["{name}_runtime"]`."""
    start = time.perf_counter()
    yield
    seconds[f"{name}_runtime"] = round(time.perf_counter() - start, 3)
    print(f"{name}: {seconds[f'{name}_runtime']:.1f} s", flush=True)


@contextmanager
def quiet_but_for_main_process(args: TrainingArguments) -> Iterator[None]:
    """Lets only the main process print and draw progress bars."""
    if args.process_index == 0:
        yield
        return
    from datasets import disable_progress_bars

    disable_progress_bars()
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def is_checkpoint(folder: str | Path) -> bool:
    """Whether `folder` is a checkpoint of Trainer."""
    return (Path(folder) / TRAINER_STATE_NAME).is_file()


def is_finished(checkpoint: str | Path, steps: int) -> bool:
    """Whether a checkpoint was written at the last step: `steps`, or the one at which its time limit ends."""
    state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
    return state.global_step >= steps_planned(state.stateful_callbacks, steps)


def check_steps_left(checkpoint: str | Path, steps: int, flag: str) -> None:
    """Refuses a checkpoint that has taken more than the `steps` that `flag` asks for.

    Raises:
        ValueError: with both numbers.
    """
    taken = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME)).global_step
    if taken > steps:
        raise ValueError(
            f"{flag} ends the training after step {steps}, and {checkpoint} has taken {taken} steps; give more, or "
            "resume from an earlier checkpoint"
        )


def train(trainer: Trainer, checkpoint: str | None, steps: int, *, finished: bool = False) -> dict[str, Any]:
    """Trains, from `checkpoint` if there is one, and returns Trainer's metrics plus tokens and steps.

    `steps` is the length of the whole schedule; a time limit may cut it. `finished` says that `checkpoint` is of the
    last step. Nothing is trained then, because Trainer would take one more step.
    """
    before = 0
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        before = state.num_input_tokens_seen
        if finished:
            trainer.state = state
            taken = {"train_steps": state.global_step, "planned_steps": steps}
            return {"epoch": state.epoch, "num_input_tokens_seen": before, **taken}
    try:
        with resumable(checkpoint, trainer) if checkpoint else contextlib.nullcontext() as folder:
            metrics = trainer.train(resume_from_checkpoint=folder).metrics
    except BaseException:
        for bar in trainer.callback_handler.callbacks:
            if isinstance(bar, SpeedBar):
                bar.close()  # so that the error message starts on a line of its own
        raise
    seen = trainer.state.num_input_tokens_seen
    metrics["num_input_tokens_seen"] = seen
    metrics["train_tokens_per_second"] = (seen - before) / metrics["train_runtime"]
    return {**metrics, "train_steps": trainer.state.global_step, "planned_steps": steps}


def clear_earlier_run(output_dir: str | Path) -> None:
    """Deletes the checkpoints and metrics of an earlier run. The new run overwrites all other files."""
    for checkpoint in checkpoints(output_dir):
        shutil.rmtree(checkpoint)
    (Path(output_dir) / "all_results.json").unlink(missing_ok=True)


def check_output_dir(output_dir: str | Path, *, overwrite: bool, resume: bool | None = None) -> None:
    """Refuses an output folder that is not empty, unless the user asks to overwrite it or to resume in it.

    `resume` is None for commands that cannot resume.

    Raises:
        ValueError: naming the folder and the way out; also for a folder that cannot be made or written to.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file; name a folder")
    if folder.is_dir():
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ValueError(f"--output_dir {folder} cannot be written to; name another folder")
    else:
        above = next(path for path in folder.absolute().parents if path.exists())
        try:
            tempfile.TemporaryDirectory(dir=above).cleanup()
        except OSError as error:
            raise ValueError(
                f"--output_dir {folder} cannot be made in {above}: {error.strerror}; name another folder"
            ) from None
    if overwrite or resume or not folder.is_dir() or not any(folder.iterdir()):
        return
    go_on = "" if resume is None else " --resume_from_checkpoint to go on with it,"
    raise ValueError(
        f"--output_dir {folder} already holds another run; give --overwrite_output_dir to replace it,{go_on} or "
        "another --output_dir"
    )


def plot_loss_curve(
    log_history: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    title: str,
    unit: str = "nats per token",
    bytes_per_token: float | None = None,
    xz_bits_per_byte: float | None = None,
    curves: Mapping[str, str] | None = None,
) -> None:
    """Draws training and held-out loss, in `unit`, over steps into a PNG file.

    `curves` names further measures of the held-out rows; each is drawn below, with that of the training. With
    `bytes_per_token` of the held-out text, a second axis shows bits per byte. `xz_bits_per_byte` is drawn there as a
    dashed line.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    more = {
        key: name
        for key, name in (curves or {}).items()
        if key != "eval_loss" and _points(log_history, key) + _points(log_history, key.removeprefix("eval_"))
    }
    figure = Figure(figsize=(8, 5 + 2.5 * len(more)), layout="constrained")
    FigureCanvasAgg(figure)
    ratios = [2.0, *(1.0 for _ in more)]
    axes, *below = figure.subplots(1 + len(more), sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    _draw(axes, log_history, "eval_loss")
    for place, (key, name) in zip(below, more.items(), strict=True):
        _draw(place, log_history, key)
        place.set_ylabel(name)
        place.grid(alpha=0.3)
    if bytes_per_token:
        nats = bytes_per_token * math.log(2)  # per token, at one bit per byte
        if xz_bits_per_byte:
            label = f"xz -9e: {xz_bits_per_byte:.2f} bits per byte"
            axes.axhline(xz_bits_per_byte * nats, color="tab:gray", linestyle="--", label=label)
        second = axes.secondary_yaxis(
            "right", functions=(lambda y: np.divide(y, nats), lambda y: np.multiply(y, nats))
        )
        second.set_ylabel("bits per byte")
    axes.set_title(title, parse_math=False)  # the name of a file may hold dollar signs
    [axes, *below][-1].set_xlabel("optimizer steps")
    axes.set_ylabel(f"loss ({unit})")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.savefig(path, dpi=120)


def _points(log_history: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Steps and figures, of each step the last one: the end of a run may be measured once more."""
    return [*{entry["step"]: entry[key] for entry in log_history if entry.get(key) is not None}.items()]


def _draw(axes: Any, log_history: Sequence[Mapping[str, Any]], key: str) -> None:
    """The measure `key` of the held-out rows, and that of the training."""
    if train := _points(log_history, key.removeprefix("eval_")):
        axes.plot(*zip(*train, strict=True), color="tab:blue", linewidth=1.2, marker=".", label="training")
    if held_out := _points(log_history, key):
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="o", markersize=4, label="held out")


def held_out_prompts(texts: Sequence[str], count: int = 4, max_chars: int = 240) -> list[str]:
    """The beginnings of up to `count` texts spread over all of them, cut at the end of a line where possible."""
    texts = [text for text in texts if text.strip()]
    chosen = [texts[i * len(texts) // count] for i in range(min(count, len(texts)))] if texts else []
    return [_beginning(text, max_chars) for text in chosen]


def _beginning(text: str, max_chars: int) -> str:
    # At most half of a short text, so that the model has something left to write.
    head = text.lstrip()[: min(max_chars, max(1, len(text) // 2))]
    cut = head.rfind("\n")
    return head[:cut] if cut > len(head) // 2 else head


@torch.no_grad()
def draw_samples(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 100,
    seed: int = 0,
) -> list[tuple[str, str]]:
    """Continues each prompt with the model's own generation settings; returns (prompt, completion) pairs.

    A prompt is cut from the left so that it and its completion fit into `max_position_embeddings`.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or 2**31
    max_new_tokens = min(max_new_tokens, max(1, limit // 2))
    was_training = model.training
    model.eval()
    samples = []
    with torch.random.fork_rng(enabled=True):
        torch.manual_seed(seed)
        for prompt in prompts:
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
            ids = ids[:, max_new_tokens - limit :].to(model.device)
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
                use_cache=True,
            )
            samples.append((prompt, str(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))))
    model.train(was_training)
    return samples


class SampleText(TrainerCallback):
    """Every `steps` steps, appends completions of `prompts` to `samples_in_training.md` of the output folder."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], steps: int, seed: int = 0):
        self._tokenizer, self._prompts, self._steps, self._seed = tokenizer, prompts, steps, seed

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self._steps or not (state.is_world_process_zero or is_sharded(model)):
            return
        completions = draw_samples(model, self._tokenizer, self._prompts, seed=self._seed)
        if not state.is_world_process_zero:
            return
        lines = [f"# Step {state.global_step}", ""]
        for prompt, completion in completions:
            lines += ["Prompt:", "", fenced(prompt), "", "Completion:", "", fenced(completion), ""]
        path = Path(args.output_dir) / "samples_in_training.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("\n".join([*lines, ""]))


class CurveAtSave(TrainerCallback):
    """Draws the loss curve so far at every save, with the options of `plot_loss_curve`."""

    def __init__(self, **drawing: Any):
        self._drawing = drawing

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            plot_loss_curve(state.log_history, Path(args.output_dir) / "loss_curve.png", **self._drawing)


def write_samples(path: str | Path, samples: Sequence[tuple[str, str]]) -> None:
    """Writes prompts and completions as Markdown, each in a fenced block of its own."""
    lines = ["# Completions of held-out prompts", "", "One draw each, not chosen by hand.", ""]
    for number, (prompt, completion) in enumerate(samples, 1):
        lines += [f"## {number}", "", "Prompt:", "", fenced(prompt), "", "Completion:", "", fenced(completion), ""]
    Path(path).write_text("\n".join(lines), encoding="utf-8")
