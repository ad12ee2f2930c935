"""Lists what `hf-decoder finetune --task` can train for, and how each task is measured and drawn. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

COMPLETIONS = {"eval_kl": "KL to the start", "eval_completions/mean_length": "tokens of a completion"}
MARGINS = {"eval_rewards/margins": "reward margin", "eval_rewards/accuracies": "chosen answer ahead"}


@dataclass(frozen=True, kw_only=True)
class Task:
    """A way to train."""

    config: str  # TRL's class of arguments, or transformers'
    trainer: str  # TRL's class of trainer, or transformers'
    unit: str  # of the loss
    measures: Mapping[str, str]  # metric -> its name; the first says what was reached
    rate: float = 1.0  # the learning rate, where that of SFT is 1
    has_reference: bool = False  # is compared with the model that it starts from, so that needs to be a trained one
    writes: bool = True  # the model writes text
    samples: bool = False  # the model is trained on what it writes


TASKS = {
    "sft": Task(
        config="SFTConfig", trainer="SFTTrainer", unit="nats per token", measures={"eval_loss": "loss"}
    ),
    "preference": Task(
        config="DPOConfig", trainer="DPOTrainer", unit="DPO, nats per pair", measures=MARGINS, rate=0.1,
        has_reference=True,
    ),
    "kto": Task(
        config="KTOConfig", trainer="KTOTrainer", unit="KTO, per row", rate=0.1, has_reference=True,
        measures={"eval_rewards/margins": "reward margin", "eval_kl": "KL to the start"},
    ),
    "reward": Task(
        config="RewardConfig", trainer="RewardTrainer", unit="nats per pair", writes=False,
        measures={"eval_accuracy": "chosen answer ahead", "eval_margin": "margin"},
    ),
    "grpo": Task(
        config="GRPOConfig", trainer="GRPOTrainer", unit="policy gradient", rate=0.25,
        has_reference=True, samples=True, measures={"eval_reward": "reward", **COMPLETIONS},
    ),
    "rloo": Task(
        config="RLOOConfig", trainer="RLOOTrainer", unit="policy gradient", rate=0.25,
        has_reference=True, samples=True, measures={"eval_reward": "reward", **COMPLETIONS},
    ),
    "distillation": Task(
        config="SFTConfig", trainer="SFTTrainer", unit="nats per token", measures={"eval_loss": "loss"}
    ),
    "classification": Task(
        config="TrainingArguments", trainer="Trainer", unit="cross-entropy, nats per row", writes=False,
        measures={"eval_accuracy": "accuracy", "eval_f1": "F1"},
    ),
}  # fmt: skip
