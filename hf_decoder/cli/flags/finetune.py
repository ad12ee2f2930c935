"""The flags of `hf-decoder finetune`, as far as they are our own; the others are those of TRL and transformers."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli import MUON_ADAMW
from hf_decoder.cli.flags import flag, needed
from hf_decoder.tuning.tasks import TASKS

OUTPUT_DIR = "runs/finetune"
DESCRIPTION = (
    "Fine-tunes a model with TRL and PEFT. --task sft: rows of text, of prompt and completion (the loss is on the "
    "completion), or of messages (on the assistant's turns). preference: prompt, chosen and rejected, by DPO. kto: "
    "prompt, completion and label. reward: a reward model, from rows of preference. grpo and rloo: prompts, and "
    "--reward_funcs of what the model writes. distillation: rows of sft, and a --teacher. classification: text and "
    "label. The flags of TRL's ModelConfig and of the task's own config (SFTConfig, DPOConfig, GRPOConfig, ...) go."
)


@dataclass(kw_only=True)
class TaskArguments:
    """What is learned, and from which rows."""

    task: str = flag("sft", "What is learned.", choices=tuple(TASKS))
    train_file: str = needed("Rows to learn from: .jsonl, .json, .csv, .tsv, .parquet; or text, a row a line.")
    validation_file: str | None = flag(None, "Rows to measure on, of the same kind.")
    train_completion_file: str | None = flag(
        None, "Completions, one a line, of a --train_file that holds a prompt a line.", rare=True
    )
    validation_completion_file: str | None = flag(None, "The same of --validation_file.", rare=True)
    validation_split_percentage: float = flag(5.0, "Share of the rows to hold out when there is no --validation_file.")
    text_column: str | None = flag(None, "The column that holds the text.", rare=True)
    prompt_column: str | None = flag(None, "The column that holds the prompt.", rare=True)
    completion_column: str | None = flag(None, "The column that holds the completion.", rare=True)
    messages_column: str | None = flag(None, "The column that holds the messages.", rare=True)
    label_column: str | None = flag(None, "The column that holds the label.", rare=True)
    chosen_column: str | None = flag(None, "The column that holds the better answer.", rare=True)
    rejected_column: str | None = flag(None, "The column that holds the worse answer.", rare=True)
    reference_column: str | None = flag(None, "The column that holds what exact_match compares with.", rare=True)
    class_names: list[str] | None = flag(
        None, "The classes, in the order of their ids; those of the rows if unset.", rare=True
    )
    reward_funcs: list[str] | None = flag(
        None,
        "What grpo and rloo reward: python_parses, exact_match, regex:PATTERN, length:TOKENS, reward_model:FOLDER, "
        "package.module:function; --reward_weights weighs them.",
    )
    reward_timeout: float = flag(60.0, "Seconds that a call of a reward may take.", rare=True)
    teacher: str | None = flag(None, "The model that distillation learns from, of the same tokenizer.")
    alpha: float = flag(0.5, "Share of the teacher in the loss of distillation; the rest is the text's.", rare=True)
    preset: str | None = flag(None, "Train a new model of this shape, from random weights, in place of a model.")
    config_overrides: str | None = flag(
        None, "Changes to the preset's config: hidden_size=256,num_hidden_layers=4,...", rare=True
    )
    tokenizer_name: str | None = flag(None, "Tokenizer of the new model.")
    dropout: float = flag(
        0.0, "Dropout of what embedding, attention and MLP add, while training; not saved.", rare=True
    )
    time_limit: str | None = flag(None, "End in this time, the learning rate brought down: 30m, 1h30m.")
    prompt_template: str | None = flag(
        None,
        r"What the model reads; {prompt} is the prompt and \n a new line. If unset, the prompt, and a blank line "
        "where it meets its answer in no space, unless the two are named prompt and completion.",
        rare=True,
    )
    adapter_name_or_path: str | None = flag(
        None, "Adapter of this base to go on training, in place of a new one.", rare=True
    )
    merge: bool = flag(False, "Save the base with the adapter merged, not the adapter.")
    license: str | None = flag(None, "Licence id for the model card, e.g. apache-2.0.", rare=True)


@dataclass
class Adapter:
    """Which model is trained, and whether all of it.

    Help tells these flags of TRL's `ModelConfig` before that is imported; the run has them from there.
    """

    model_name_or_path: str | None = flag(
        None, "Folder or Hub name of the model to fine-tune.", positional=True, metavar="MODEL"
    )
    use_peft: bool = flag(False, "Train a LoRA adapter in place of the whole model.")
    lora_r: int = flag(16, "Rank of the adapter.")
    lora_alpha: int = flag(32, "The adapter's scale, times its rank.")
    lora_target_modules: list[str] | None = flag(None, "Modules that get an adapter; all-linear is all.")
    load_in_4bit: bool = flag(False, "Quantize the base to 4 bits under the adapter (QLoRA).")


@dataclass
class Common:
    """How it is trained.

    As `Adapter`, of the arguments of the task's trainer.
    """

    output_dir: str = flag(OUTPUT_DIR, "Folder for everything that is written.")
    overwrite_output_dir: bool = flag(False, "Replace the run that --output_dir holds.")
    num_train_epochs: float | None = flag(None, "Passes over the rows.")
    per_device_train_batch_size: int | None = flag(None, "Rows of a pass, per device.")
    learning_rate: float | None = flag(None, "Peak learning rate; if unset, by task, width and method.")
    optim: str | None = flag(None, f"{MUON_ADAMW}, the recipe of pretraining, or any name of transformers.")
    max_length: int | None = flag(None, "Longest row, in tokens.")
    seed: int | None = flag(None, "Seed of weights, split and order; --data_seed sets the order's apart.")
    resume_from_checkpoint: str | None = flag(
        None, "Go on from this checkpoint; without a value, the last of the folder.", nargs="?", const="true"
    )


ARGUMENTS = (Adapter, TaskArguments, Common)
PARTIAL = True
