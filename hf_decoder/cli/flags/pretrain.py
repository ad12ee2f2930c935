"""The flags of `hf-decoder pretrain` besides those of `TrainingArguments`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli import MUON_ADAMW
from hf_decoder.cli.flags import flag
from hf_decoder.cli.flags.tokenizer import TOKENIZER_TYPES
from hf_decoder.data.sources import TextArguments

QUICKSTART = "runs/quickstart"
DEFAULT_PRESET = "nano"
# Without arguments the job ends within five minutes, even on a machine too slow for all its steps.
QUICKSTART_TIME_LIMIT = "4m"
DESCRIPTION = (
    "Trains a language model from raw text. With no arguments: the Python standard library as text, a vocabulary of "
    f"4096, the nano preset, at most {QUICKSTART_TIME_LIMIT} of training, everything written to {QUICKSTART}."
)


@dataclass
class ModelArguments:
    """Which model is trained."""

    preset: str | None = flag(None, f"Named model shape, {DEFAULT_PRESET} if unset; `hf-decoder presets` lists them.")
    config_overrides: str | None = flag(
        None, "Changes to the preset's config: hidden_size=256,qk_norm=true,... (values as in JSON)."
    )
    model_name_or_path: str | None = flag(None, "Folder or Hub name of a model to train further, with its tokenizer.")
    tokenizer_name: str | None = flag(None, "Folder or Hub name of a tokenizer; if unset, one is trained on the text.")
    tokenizer_type: str = flag("bpe", "Tokenizer to train.", choices=TOKENIZER_TYPES)
    vocab_size: int = flag(4096, "Vocabulary of the tokenizer to train, specials included.")
    license: str | None = flag(None, "Licence id for the model card, e.g. apache-2.0.", rare=True)


@dataclass
class DataArguments(TextArguments):
    """Which text it is trained and measured on."""

    block_size: int = flag(256, "Tokens of a training row.")
    max_eval_samples: int | None = flag(
        64, "Held-out rows to measure during training; the last measurement takes all.", rare=True
    )
    preprocessing_num_workers: int | None = flag(None, "Processes that tokenise.", rare=True)
    shuffle_buffer_size: int = flag(
        4096, "Rows that --streaming shuffles at a time; 0 keeps the text's order.", rare=True
    )


@dataclass
class PretrainingDefaults:
    """How it is trained."""

    output_dir: str = flag(QUICKSTART, "Folder for all that the run writes.")
    overwrite_output_dir: bool = flag(False, "Replace the run that --output_dir holds; its checkpoints are deleted.")
    max_steps: int = flag(1200, "Optimizer steps; -1 follows --num_train_epochs instead.")
    time_limit: str | None = flag(
        None, "Time for training, such as 30m or 1h30m. The learning rate comes down in time, and measuring follows."
    )
    per_device_train_batch_size: int = flag(8, "Rows of a training step, per device.")
    learning_rate: float = flag(6e-3, "Peak learning rate.")
    optim: str = flag(
        MUON_ADAMW, f"{MUON_ADAMW}: Muon for hidden matrices, AdamW for the rest. Or any name of transformers."
    )
    bf16: bool = flag(  # if unset, `choose_bf16` looks at the hardware
        None, "bf16 autocast; if unset, on where the hardware multiplies bf16 and --fp16 is off."
    )
    resume_from_checkpoint: str | None = flag(
        None, "Resume from this checkpoint; without a value, from the last of the folder.", nargs="?", const="true"
    )
    per_device_eval_batch_size: int = flag(16, "Rows of an evaluation step, per device.", rare=True)
    lr_scheduler_type: str = flag("warmup_stable_decay", "Learning rate schedule.", rare=True)
    warmup_steps: float = flag(0.05, "Warm-up steps, or their share of all steps if below 1.", rare=True)
    weight_decay: float = flag(0.1, "Weight decay, of matrices only.", rare=True)
    adam_beta2: float = flag(0.95, "AdamW's second beta.", rare=True)
    logging_steps: float = flag(  # if unset, it follows from the length of the run
        None, "Steps between two points of the loss curve; if unset 10, or fewer in a short run.", rare=True
    )
    logging_first_step: bool = flag(True, "Begin the training curve at step 1.", rare=True)
    eval_strategy: str = flag("steps", "When the held-out loss is measured in training.", rare=True)
    eval_steps: float | None = flag(0.2, "Steps between two measurements, or their share of all steps.", rare=True)
    save_steps: float = flag(0.2, "Steps between two checkpoints, or their share of all steps.", rare=True)
    save_total_limit: int | None = flag(1, "Checkpoints kept.", rare=True)
    sample_steps: int | None = flag(
        None, "Steps between samples of text, which are appended to samples_in_training.md.", rare=True
    )
    prediction_loss_only: bool = flag(True, "Evaluation keeps no logits.", rare=True)
    include_num_input_tokens_seen: bool = flag(True, "Count tokens, to show the speed.", rare=True)
    ddp_find_unused_parameters: bool | None = flag(
        False, "Look for parameters without a gradient; there are none.", rare=True
    )


@dataclass
class Common(PretrainingDefaults):
    """How it is trained.

    Help shows these flags of `TrainingArguments` without importing it.
    """

    num_train_epochs: float | None = flag(None, "Passes over the text, with --max_steps -1.")
    gradient_accumulation_steps: int | None = flag(None, "Passes of an optimizer step.")
    seed: int | None = flag(None, "Seed of weights, order and samples; --data_seed sets that of the order.")


ARGUMENTS = (ModelArguments, DataArguments, Common)
PARTIAL = True
WITHOUT_ARGUMENTS = ("--time_limit", QUICKSTART_TIME_LIMIT)
