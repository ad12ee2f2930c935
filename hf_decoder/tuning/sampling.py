"""Trains a model on rewards of what it writes, by TRL's GRPO and RLOO, which sample through the fast `generate`."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

from hf_decoder.tuning.rewards import MODEL, Reward, columns_read, find_reward, guarded

MOST_NEW_TOKENS = 128  # of a completion, where no flag says
SPEED = "sampling_tokens_per_second"


@functools.cache
def sampling_trainer(name: str) -> type:
    """TRL's trainer of this name, which samples in evaluation mode and logs how fast.

    TRL samples in training mode, in which a model of ours goes by its modules alone.
    """
    import trl

    class SamplingTrainer(getattr(trl, name)):  # type: ignore[misc]
        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            training = self.model.training
            self.model.eval()
            start = time.perf_counter()
            try:
                sampled = super()._generate_single_turn(prompt_ids, *args, **kwargs)
            finally:
                self.model.train(training)
            seconds = time.perf_counter() - start
            completions = sampled[0] if isinstance(sampled, tuple) else sampled
            speed = sum(map(len, completions)) / max(seconds, 1e-9)
            self._metrics["train" if training else "eval"][SPEED].append(speed)
            return sampled

    SamplingTrainer.__name__ = f"Fast{name}"
    return SamplingTrainer


class Rewards:
    """The rewards of a run, by their names; those that are models are loaded by `load`.

    Raises:
        ValueError: as `find_reward`; without a name, or with one twice.
    """

    def __init__(self, names: Sequence[str] | None, seconds: float):
        if not names:
            raise ValueError("name what is rewarded: --reward_funcs python_parses")
        if len(set(names)) < len(names):
            raise ValueError(
                f"--reward_funcs names {max(names, key=list(names).count)!r} twice; --reward_weights weighs"
            )
        if seconds <= 0:
            raise ValueError(f"--reward_timeout {seconds:g} must be more than 0 seconds")
        self.names, self.seconds = list(names), seconds
        self._found: dict[str, Reward] = {
            name: find_reward(name) for name in names if not name.startswith(f"{MODEL}:")
        }

    @property
    def columns(self) -> list[str]:
        """The columns that the rewards read beside the prompt."""
        return sorted({column for reward in self._found.values() for column in columns_read(reward)})

    def load(self, load_classifier: Any, load_tokenizer: Any) -> dict[str, list[Any]]:
        """Arguments of TRL's trainers: functions and models, and a tokenizer for each model."""
        functions: list[Any] = []
        tokenizers: list[Any] = []
        for name in self.names:
            if name in self._found:
                functions.append(guarded(name, self._found[name], self.seconds))
                tokenizers.append(None)
                continue
            folder = name.partition(":")[2]
            model = load_classifier(folder, dtype="float32")
            if model.config.num_labels != 1:
                raise ValueError(
                    f"{folder} tells {model.config.num_labels} classes apart; a reward model gives one number: train "
                    "one with --task reward"
                )
            functions.append(model.eval())
            tokenizers.append(load_tokenizer(folder))
        return {"reward_funcs": functions, "reward_processing_classes": tokenizers}
