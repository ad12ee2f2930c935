"""Ends a training within a time limit, and logs throughput, utilisation and the wait for data."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SchedulerType

from hf_decoder.costs.accounting import flops_per_token, mfu
from hf_decoder.engine.precision import fast_dtype
from hf_decoder.engine.single_precision import multiply_rows
from hf_decoder.training.optimizers import DECAY_SHARE

STEPS_TO_TRUST = 5  # that a time per step is taken from: the first one compiles, and others may be disturbed
_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


def parse_duration(text: str) -> float:
    """Seconds of `30m`, `1h30m`, `90s`, `1.5h`.

    Raises:
        ValueError: for any other text, and for zero.
    """
    if not re.fullmatch(r"(\d+(\.\d+)?[hms])+", text.strip()):
        raise ValueError(f"{text!r} is no duration; write it as 30m, 1h30m or 90s")
    seconds = sum(float(number) * _UNITS[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)([hms])", text))
    if seconds <= 0:
        raise ValueError(f"{text!r} is no time at all; write 30m, say")
    return seconds


class TimeLimit(TrainerCallback, ExportableState):
    """Ends the training within `seconds`, with the learning rate decayed to zero.

    The decay starts when the steps that still fit are `DECAY_SHARE` of all steps. It is linear, and gets steeper if
    steps become slower. A schedule that fits into the time is not changed. Earlier parts of a resumed run count.

    Args:
        seconds: the limit, counted from `started`.
        started: a reading of `clock`; None: now.
        clock: a monotonic clock in seconds.
    """

    def __init__(self, seconds: float, started: float | None = None, clock: Callable[[], float] = time.monotonic):
        self.seconds = seconds
        self._clock = clock
        self._started = clock() if started is None else started
        self._earlier = 0.0
        self.decay: tuple[int, float, int] | None = None  # first step, factor of the rate there, last step
        self._first: tuple[int, float] | None = None  # the first step of this run, and the time when it ended

    def elapsed(self) -> float:
        return self._earlier + self._clock() - self._started

    def state(self) -> dict:
        """The state that a checkpoint saves."""
        return {"args": {"seconds": self.seconds}, "attributes": {"elapsed": self.elapsed(), "decay": self.decay}}

    def on_train_begin(self, args, state, control, lr_scheduler=None, **kwargs):
        if not hasattr(lr_scheduler, "lr_lambdas"):
            schedule = SchedulerType(args.lr_scheduler_type).value
            raise ValueError(
                f"--time_limit cannot bring down the rate of lr_scheduler_type {schedule}; take one that is a "
                "function of the step, such as warmup_stable_decay"
            )
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step:
            self._earlier = saved["attributes"]["elapsed"]
            decay = saved["attributes"]["decay"]
            if decay is not None:
                self._fall(state, lr_scheduler, *decay)
        self._first = None

    def on_step_end(self, args, state, control, lr_scheduler=None, **kwargs):
        step, now = state.global_step, self.elapsed()
        if self._first is None:
            self._first = step, now
        measured = step - self._first[0]
        per_step = (now - self._first[1]) / max(measured, 1)
        fit = max(0, math.floor((self.seconds - now) / max(per_step, 1e-9)))
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            agreed = torch.tensor(fit, device=args.device)
            torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MIN)
            fit = int(agreed)
        if self.decay is not None and step >= state.max_steps:
            control.should_log = True  # the trainer ends here by itself, and would not log the last loss
        if step + fit >= state.max_steps or (measured < STEPS_TO_TRUST <= fit):
            return
        if self.decay is None and fit > DECAY_SHARE * (step + fit):
            return
        if self.decay is None and state.is_world_process_zero:
            tqdm.write(
                f"time limit: the learning rate falls from step {step:,} on, and the training ends at about step "
                f"{step + fit:,} of {state.max_steps:,}"
            )
        factor = lr_scheduler.lr_lambdas[0](step)
        self._fall(state, lr_scheduler, step, factor, step + fit)
        if fit == 0:
            control.should_training_stop = control.should_save = control.should_log = True

    def _fall(self, state: Any, lr_scheduler: Any, first: int, factor: float, last: int) -> None:
        """Makes the rate fall linearly from the peak times `factor` at step `first` to 0 at step `last`."""
        self.decay = first, factor, last
        state.max_steps = last

        def falling(step: int) -> float:
            return factor * max(0, last - step) / max(1, last - first)

        lr_scheduler.lr_lambdas = [falling] * len(lr_scheduler.lr_lambdas)


def steps_planned(callbacks: dict[str, Any], steps: int) -> int:
    """The last step of a run by the callbacks' state in a checkpoint: `steps`, or where a time limit ends it."""
    decay = callbacks.get(TimeLimit.__name__, {}).get("attributes", {}).get("decay")
    return min(steps, decay[2]) if decay else steps


class MeasuringTrainer(Trainer):
    """A Trainer that counts the seconds that its steps wait for data, in `data_seconds`."""

    data_seconds = 0.0

    def get_batch_samples(self, *args, **kwargs):
        start = time.perf_counter()
        batches = super().get_batch_samples(*args, **kwargs)
        self.data_seconds += time.perf_counter() - start
        return batches


class TokenClock:
    """Measures the throughput of a training between two moments."""

    def __init__(self) -> None:
        self._start, self._tokens = time.perf_counter(), 0

    def restart(self, state: Any) -> None:
        self._start, self._tokens = time.perf_counter(), state.num_input_tokens_seen

    def read(self, state: Any) -> tuple[float, float]:
        """Seconds since the last restart, and tokens per second in them."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        return seconds, (state.num_input_tokens_seen - self._tokens) / seconds


class StepMetrics(TrainerCallback):
    """Adds tokens per second, MFU and the share of time spent waiting for data to every log of the loss.

    MFU is relative to `peak`, the FLOP/s of one device, or to the measured `matmul_peak` if that is None. Evaluation
    and saving do not count. Add this callback first, so that all reporters see the figures.
    """

    def __init__(self, trainer: MeasuringTrainer, block_size: int, peak: float | None = None):
        self._trainer = trainer
        model: Any = trainer.model
        self._flops = flops_per_token(model.config, block_size)
        self._peak = peak
        self._clock, self._waited = TokenClock(), 0.0

    def _restart(self, state: Any) -> None:
        self._clock.restart(state)
        self._waited = self._trainer.data_seconds

    def on_train_begin(self, args, state, control, **kwargs):
        if self._peak is None:
            self._peak = matmul_peak(args.device, torch.bfloat16 if args.bf16 else torch.float32)
        self._restart(state)

    def on_evaluate(self, args, state, control, **kwargs):
        self._restart(state)

    def on_save(self, args, state, control, **kwargs):
        self._restart(state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs:
            return
        seconds, speed = self._clock.read(state)
        measured = {
            "tokens_per_second": round(speed, 1),
            "mfu": round(mfu(speed / args.world_size, self._flops, self._peak or 1.0), 4),
            "data_wait": round((self._trainer.data_seconds - self._waited) / seconds, 5),
        }
        logs.update(measured)
        if state.log_history:
            state.log_history[-1].update(measured)
        self._restart(state)


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a large square matrix product on `device`, the best of four."""
    size = size or (1024 if device.type == "cpu" else 8192)
    a = torch.ones(size, size, device=device, dtype=fast_dtype(device, dtype))
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        multiply_rows(a, a)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
