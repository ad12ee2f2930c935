"""Makes the trainer of a task, with its model, adapter and rows, and saves what it trained."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DataCollatorWithPadding, Trainer

from hf_decoder.data.label_names import label_map, read_label_names, save_label_names
from hf_decoder.engine.bitsandbytes import settle_layers
from hf_decoder.evaluation.classification import KeepLabelNames, class_loss, share_padding
from hf_decoder.interop.adapters import ADAPTER_CONFIG, CLASSIFIER, LANGUAGE_MODEL, load_adapter, merge
from hf_decoder.training.checkpoint_formats import save_in_full
from hf_decoder.training.optimizers import muon_adamw
from hf_decoder.tuning import finetuning
from hf_decoder.tuning.distillation import check_teacher, distillation_trainer
from hf_decoder.tuning.rows import TaskData, class_rows, is_conversational, trainer_rows
from hf_decoder.tuning.sampling import Rewards, sampling_trainer
from hf_decoder.tuning.tasks import TASKS, Task

REWARD_NAMES = {0: "reward"}  # the one class of a reward model


@dataclass(kw_only=True)
class Job:
    """What is to be trained, and how: the flags, the config, the rows, and what loads a model with clear errors."""

    task_args: Any
    model_args: Any
    args: Any
    config: Any
    tokenizer: Any
    data: TaskData
    rewards: Rewards | None = None
    load_model: Callable[..., Any]
    load_classifier: Callable[..., Any]
    load_tokenizer: Callable[..., Any]

    def __post_init__(self) -> None:
        """Settles what the flags leave to the rows: how they are packed, and whether all turns are learned."""
        args, roles = self.args, self.data.roles
        if self.task.config != "SFTConfig":
            return
        is_text = roles == ("text",)
        if args.packing_was is None:
            args.packing = is_text
        if args.packing_strategy is None:
            args.packing_strategy = "bfd_split" if is_text else "bfd"
        if args.assistant_only_loss is None:
            args.assistant_only_loss = roles == ("messages",)

    @property
    def task(self) -> Task:
        return TASKS[self.task_args.task]

    @property
    def template(self) -> str | None:
        """What --prompt_template says, with its new lines."""
        return prompt_template(self.task_args)

    @functools.cached_property
    def label2id(self) -> dict[str, int]:
        """Class name -> id: those of --class_names, of the adapter to go on with, or of the rows.

        Rows that were held out of the training file may have classes that no other row has.
        """
        adapter = self.task_args.adapter_name_or_path
        known = read_label_names(adapter) if adapter else None
        names = self.task_args.class_names or (list(known.values()) if known else None)
        labels, held_out = ([row["label"] for row in part] for part in (self.data.train, self.data.validation))
        if self.task_args.validation_file is None:
            return label_map(labels + held_out, names)
        label2id = label_map(labels, names)
        label_map(held_out, list(label2id))
        return label2id

    def trainer(self) -> Any:
        """The trainer of the task."""
        name = self.task_args.task
        return _classification_trainer(self) if name == "classification" else _trl_trainer(self)


def prompt_template(task_args: Any) -> str | None:
    """What --prompt_template says, with its new lines."""
    return None if task_args.prompt_template is None else task_args.prompt_template.replace("\\n", "\n")


def _trl_trainer(job: Job) -> Any:
    """TRL's trainer of the task, or ours above it."""
    import trl

    args, data = job.args, job.data
    model = _language_model(job) if job.task.writes else _classifier(job, REWARD_NAMES)
    train, validation = trainer_rows(data, job.tokenizer, args, job.template)
    peft_config = _peft_config(job)
    # what is trained on its own answers knows how to end them
    if peft_config is not None and not job.task.samples and is_conversational(data.train):
        tokens = finetuning.train_template_tokens(peft_config, data.train, job.tokenizer, model)
        if tokens:
            print(f"the embeddings of the chat template's special tokens are trained too: {', '.join(tokens)}")
    kwargs: dict[str, Any] = {
        "model": model,
        "args": args,
        "train_dataset": train,
        "eval_dataset": validation,
        "processing_class": job.tokenizer,
        "peft_config": peft_config,
    }
    if job.rewards is not None:
        return sampling_trainer(job.task.trainer)(
            **kwargs, **job.rewards.load(job.load_classifier, job.load_tokenizer)
        )
    if job.task.trainer == "RewardTrainer":
        callbacks: list[Any] | None = [KeepLabelNames(REWARD_NAMES)] if peft_config is not None else None
        return trl.RewardTrainer(**kwargs, callbacks=callbacks, optimizer_cls_and_kwargs=_optimizer(args))
    if job.task.trainer != "SFTTrainer":
        return getattr(trl, job.task.trainer)(**kwargs)
    kind: Callable[..., Any] = finetuning.sft_trainer()
    if job.task_args.task == "distillation":
        kind = functools.partial(distillation_trainer(kind), teacher=_teacher(job), alpha=job.task_args.alpha)
    return kind(**kwargs, optimizer_cls_and_kwargs=_optimizer(args))


def _teacher(job: Job) -> Any:
    """The teacher of a distillation, whose tokens are the student's."""
    name = job.task_args.teacher
    teacher = job.load_model(name, dtype=job.model_args.dtype or "float32")
    texts = [value for row in job.data.train[:20] for value in row.values() if isinstance(value, str)]
    check_teacher(teacher, job.tokenizer, job.load_tokenizer(name), texts, name)
    return teacher


def _optimizer(args: Any) -> Any:
    return muon_adamw(args) if args.uses_muon else None


def _classification_trainer(job: Job) -> Trainer:
    args, data, label2id = job.args, job.data, job.label2id
    id2label = {index: name for name, index in label2id.items()}
    model = _classifier(job, id2label)
    peft_config = _peft_config(job)
    if peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    encode = functools.partial(class_rows, tokenizer=job.tokenizer, label2id=label2id, max_length=args.max_length)
    return Trainer(
        model=model,
        args=args,
        train_dataset=encode(data.train),
        eval_dataset=encode(data.validation) if data.validation else None,
        processing_class=job.tokenizer,
        data_collator=DataCollatorWithPadding(job.tokenizer),
        compute_metrics=finetuning.ClassMetrics(list(label2id)),
        compute_loss_func=functools.partial(class_loss, smoothing=args.label_smoothing_factor),
        callbacks=[KeepLabelNames(id2label)] if hasattr(model, "peft_config") else None,
        optimizer_cls_and_kwargs=_optimizer(args),
    )


def _language_model(job: Job) -> Any:
    return _load(job, AutoModelForCausalLM, job.load_model)


def _classifier(job: Job, id2label: dict[int, str]) -> Any:
    label2id = {name: index for index, name in id2label.items()}
    model = _load(job, AutoModelForSequenceClassification, job.load_classifier, id2label=id2label, label2id=label2id)
    share_padding(model, job.tokenizer)
    return model


def _load(job: Job, auto_class: Any, load: Any, **kwargs: Any) -> Any:
    """The base model, quantized if asked, with the adapter to go on with if there is one; or a new model."""
    from trl import get_quantization_config

    task_args, model_args = job.task_args, job.model_args
    if task_args.preset is not None:
        for name, value in kwargs.items():
            setattr(job.config, name, value)
        model = auto_class.from_config(job.config, dtype=torch.float32)
        finetuning.add_dropout(model, task_args.dropout)
        return model
    if model_args.attn_implementation:
        kwargs["attn_implementation"] = model_args.attn_implementation
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    model = load(model_args.model_name_or_path, dtype=model_args.dtype or "float32", **kwargs)
    settle_layers(model, training=True)  # of a stock class too
    finetuning.add_dropout(model, task_args.dropout)
    if task_args.adapter_name_or_path:
        model = load_adapter(model, task_args.adapter_name_or_path, is_trainable=True)
    return model


def _peft_config(job: Job) -> Any:
    """The LoRA that the flags describe, or None: no adapter, or one that is there already."""
    from trl import get_peft_config

    if job.task_args.adapter_name_or_path:
        return None
    job.model_args.lora_task_type = LANGUAGE_MODEL if job.task.writes else CLASSIFIER
    return get_peft_config(job.model_args)


def save(job: Job, trainer: Any) -> None:
    """Model or adapter into the output folder, ready to load."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    task_args, model_args = job.task_args, job.model_args
    if job.task.writes and is_conversational(job.data.train):
        finetuning.end_turns(model, job.tokenizer)
    # Of a quantized base the adapter goes into the weights as they were before: nothing is rounded twice.
    reloads = task_args.merge and (model_args.load_in_4bit or model_args.load_in_8bit)
    folder = Path(trainer.args.output_dir) / ("adapter" if reloads else "")
    if reloads or not task_args.merge:
        save_in_full(trainer, folder)
    if not trainer.is_world_process_zero():
        return
    if not job.task.writes and (folder / ADAPTER_CONFIG).is_file():
        save_label_names(folder, model.config.id2label)
    if not task_args.merge:
        return
    if reloads:
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        load = job.load_model if job.task.writes else job.load_classifier
        model = load(model_args.model_name_or_path, adapter=str(folder), dtype=model_args.dtype)
        if not job.task.writes:
            share_padding(model, job.tokenizer)
        elif ends is not None:
            model.generation_config.eos_token_id = ends
    merge(model).save_pretrained(trainer.args.output_dir)
    job.tokenizer.save_pretrained(trainer.args.output_dir)
