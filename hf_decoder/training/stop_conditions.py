"""Ends a training on a signal or on a loss that is not finite, and warns of spikes."""

from __future__ import annotations

import contextlib
import signal
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TrainerCallback, integrations

from hf_decoder.safety.interrupts import Interrupted, on_signal


def check_reporters(names: Sequence[str]) -> None:
    """Raises ValueError for a `--report_to` that transformers does not know, or whose package is not installed."""
    try:
        integrations.get_reporting_integration_callbacks(list(names))
    except ValueError as error:
        raise ValueError(f"--report_to {' '.join(names)}: {error}") from None
    for name in names:
        is_available = getattr(integrations, f"is_{name}_available", None)
        if is_available is not None and not is_available():
            raise ValueError(f"--report_to {name} needs a package that is not installed: pip install {name}")


class StopOnSignal(TrainerCallback):
    """Ends the training after the current step on Ctrl-C or SIGTERM, with a checkpoint to resume from.

    Use it as a context manager around `trainer.train`. `received` is the signal, or None. A second signal goes to the
    previous handler.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._handler = contextlib.ExitStack()

    def __enter__(self) -> StopOnSignal:
        self._handler.enter_context(on_signal(self._receive))
        return self

    def __exit__(self, *error: object) -> None:
        self._handler.close()

    def _receive(self, number: signal.Signals) -> None:
        self.received = number
        self._handler.close()

    def check(self) -> None:
        """Raises `Interrupted` if a signal came."""
        if self.received is not None:
            raise Interrupted(self.received)

    def on_step_end(self, args, state, control, **kwargs):
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            # All processes must stop at the same step, whichever of them was told.
            number = torch.tensor(int(self.received or 0), device=args.device)
            torch.distributed.all_reduce(number, op=torch.distributed.ReduceOp.MAX)
            self.received = signal.Signals(int(number)) if int(number) else None
        if self.received is not None:
            args.save_only_model = False  # nothing resumes from weights alone
            control.should_log = control.should_save = control.should_training_stop = True


class StopOnNan(TrainerCallback):
    """Ends the training before a loss or gradient that is not finite changes the weights.

    A loss that the trainer forms itself, and not the model, shows in its gradient.

    Args:
        tokenizer: tells how the text of the batch begins.
        watch_loss: put a hook on the model, which sees its loss and the text. Without it, gradients are watched alone,
            and `generate` keeps its fast way between the steps.

    Raises:
        ValueError: from the training loop, naming the step, and where they are known, the batch in it and its text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None = None, *, watch_loss: bool = True):
        self._tokenizer = tokenizer
        self._watches_loss = watch_loss
        self._batches: list[tuple[torch.Tensor | None, torch.Tensor | None]] = []
        self._hook: Any = None
        self._smallest: torch.nn.Parameter | None = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self._watches_loss:
            self._hook = model.register_forward_hook(self._look, with_kwargs=True)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._smallest = min(trained, key=torch.Tensor.numel)

    def on_train_end(self, args, state, control, **kwargs):
        if self._hook is not None:
            self._hook.remove()

    def _look(self, model: torch.nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        if model.training and torch.is_grad_enabled():
            loss = getattr(output, "loss", None)
            self._batches.append((None if loss is None else loss.detach(), kwargs.get("input_ids")))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        batches, self._batches = self._batches, []
        step = state.global_step + 1
        for number, (loss, ids) in enumerate(batches, 1):
            if loss is not None and not torch.isfinite(loss):
                self._stop(f"the loss is {float(loss)} at step {step}, batch {number} of {len(batches)}", ids)
        # Clipping spreads a NaN to all gradients, so the smallest one shows it; with fp16 the loss scale handles it.
        gradient = self._smallest.grad if self._smallest is not None else None
        if gradient is not None and not args.fp16 and not torch.isfinite(gradient).all():
            self._stop(f"the gradient is not finite at step {step}", batches[0][1] if len(batches) == 1 else None)

    def _stop(self, what: str, ids: torch.Tensor | None) -> None:
        if self._hook is not None:
            self._hook.remove()
        if ids is not None and self._tokenizer is not None:
            what += f", which begins {self._tokenizer.decode(ids[0, :12])!r}"
        raise ValueError(
            f"{what}; it did not change the weights, so the last checkpoint is good: lower --learning_rate or "
            "look at the text, and start a new run from its weights with --model_name_or_path"
        )


class WarnOfSpikes(TrainerCallback):
    """Warns when the logged loss or gradient norm is far above the last ones.

    A loss is a spike if it exceeds their median by 10% and by 6 median absolute deviations (about 4 standard
    deviations). A gradient norm is a spike at 10 times their median.
    """

    def __init__(self, window: int = 20, least: int = 8):
        self._losses: deque[float] = deque(maxlen=window)
        self._norms: deque[float] = deque(maxlen=window)
        self._least = least

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        if len(self._losses) >= self._least:
            middle = statistics.median(self._losses)
            spread = statistics.median(abs(value - middle) for value in self._losses)
            if loss > middle + max(6 * spread, 0.1 * abs(middle)):
                _warn(f"step {state.global_step}: the loss jumped to {loss:.3f}, from about {middle:.3f} before")
            middle = statistics.median(self._norms)
            if norm > 10 * middle > 0:
                _warn(f"step {state.global_step}: the gradient norm is {norm:.3g}, from about {middle:.3g} before")
        self._losses.append(loss)
        self._norms.append(norm)


def _warn(text: str) -> None:
    tqdm.write(f"warning: {text}", file=sys.stderr)
