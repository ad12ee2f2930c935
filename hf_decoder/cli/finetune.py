"""`hf-decoder finetune`: full, LoRA, DoRA or QLoRA training on text, prompts, chats, labels or preferences."""

from __future__ import annotations

import functools
import importlib.util
import time
from collections.abc import Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from hf_decoder import HfDecoderConfig
from hf_decoder.cli import (
    MUON_ADAMW,
    check_at_least,
    check_choice,
    find_value,
    load_classifier,
    load_config,
    load_model,
    load_tokenizer,
    optimizer_name,
    parse_overrides,
)
from hf_decoder.cli.arguments import takes_argv
from hf_decoder.cli.flags.finetune import OUTPUT_DIR, TaskArguments
from hf_decoder.costs import accounting
from hf_decoder.costs.presets import get_preset
from hf_decoder.data.label_names import label_map, read_label_names, save_label_names
from hf_decoder.data.tokenization import check_tokenizer_fits
from hf_decoder.engine.bitsandbytes import settle_layers
from hf_decoder.evaluation.classification import KeepLabelNames, class_loss, share_padding
from hf_decoder.interop.adapters import ADAPTER_CONFIG, CLASSIFIER, LANGUAGE_MODEL, is_adapter, load_adapter, merge
from hf_decoder.training import callbacks
from hf_decoder.training.checkpoint_formats import save_in_full
from hf_decoder.training.checkpoints import CheckpointKeeper, check_same_run, checkpoint_to_resume, describe_run
from hf_decoder.training.optimizers import check_schedule, describe_recipe, muon_adamw, wsd_kwargs
from hf_decoder.training.run_report import write_finetuning_outputs
from hf_decoder.training.stop_conditions import StopOnSignal
from hf_decoder.training.throughput import TimeLimit, parse_duration
from hf_decoder.tuning import finetuning, rows

COLUMNS = ("text", "prompt", "completion", "messages", "label", "chosen", "rejected")


# what `--preset` makes where these functions load
NEW_MODELS = {load_model: AutoModelForCausalLM, load_classifier: AutoModelForSequenceClassification}

# Trainer pickles its arguments beside every checkpoint, so their classes have names here; `__getattr__` makes them.
ARGUMENT_CLASSES = {
    "sft": "SftArguments",
    "classification": "ClassificationArguments",
    "preference": "PreferenceArguments",
}


def __getattr__(name: str) -> type:
    for task, class_name in ARGUMENT_CLASSES.items():
        if name == class_name:
            globals()[name] = training_arguments(task)
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _flag(name: str, kind: Any, default: Any, help: str, **more: Any) -> tuple[str, Any, Any]:
    """A field of `make_dataclass`."""
    return name, kind, field(default=default, metadata={"help": help, **more})


@functools.cache
def training_arguments(task: str) -> type:
    """The trainer's own arguments for `task`, with our defaults; made when asked for, because TRL is heavy."""
    trl = _trl()
    bases = {"sft": trl.SFTConfig, "classification": TrainingArguments, "preference": trl.DPOConfig}
    changed = [
        _flag("output_dir", str, OUTPUT_DIR, "Folder for everything that is written."),
        _flag("overwrite_output_dir", bool, False, "Replace the run that --output_dir holds."),
        _flag("bf16", bool, None, "bf16 autocast; if unset, on where the hardware multiplies bf16, unless --fp16 is."),
        _flag("gradient_checkpointing", bool | None, None, "Save memory by running the forward pass twice."),
        _flag(
            "resume_from_checkpoint",
            str | None,
            None,
            "Go on from this checkpoint; `true`: the last of the folder.",
            nargs="?",
            const="true",
        ),
        _flag("save_total_limit", int | None, 1, "Checkpoints kept."),
        _flag("logging_steps", float, None, "Steps between two points of the loss curve; if unset, a few."),
        _flag("logging_first_step", bool, True, "Begin the loss curve at step 1."),
        _flag("include_num_input_tokens_seen", str, "non_padding", "Count tokens, to tell the speed."),
        _flag("learning_rate", float | None, None, "Peak learning rate; if unset, by task, width and method."),
        _flag(
            "optim",
            str,
            OptimizerNames.ADAMW_TORCH_FUSED.value,
            f"{MUON_ADAMW}, the recipe of pretraining, or any name of transformers.",
        ),
    ]
    if task == "sft":
        packing = "bfd, bfd_split or wrapped; text is split, other rows are not."
        changed += [
            _flag("packing", bool | None, None, "Several rows in one; on for rows of text if unset."),
            _flag("packing_strategy", str | None, None, packing),
            _flag("assistant_only_loss", bool | None, None, "Loss on the assistant's turns of messages; on if unset."),
        ]
    if task == "classification":
        changed.append(_flag("max_length", int | None, None, "Tokens of a text; its last ones stay."))

    def prepare(self: Any) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True
        callbacks.choose_bf16(self)
        self.fits_logging_steps = self.logging_steps is None
        self.logging_steps = callbacks.LOGGING_STEPS if self.fits_logging_steps else self.logging_steps
        self.chooses_rate = self.learning_rate is None
        self.learning_rate = 1.0 if self.chooses_rate else self.learning_rate
        self.uses_muon = self.optim == MUON_ADAMW
        if self.uses_muon:  # transformers checks the name, which is not one of its own
            self.optim = OptimizerNames.ADAMW_TORCH
        if task == "sft":
            self.packing_was = self.packing
            self.packing = bool(self.packing)
        bases[task].__post_init__(self)
        check_schedule(self)

    namespace = {"__post_init__": prepare, "__module__": __name__, "__doc__": "How it is trained."}
    return make_dataclass(ARGUMENT_CLASSES[task], changed, bases=(bases[task],), namespace=namespace)


def _trl() -> Any:
    try:
        import trl
    except ModuleNotFoundError:
        raise ValueError("fine-tuning needs trl: pip install 'hf-decoder[finetune]'") from None
    return trl


def argument_types(argv: Sequence[str]) -> tuple[type, ...]:
    """Whose fields are the flags: the task decides."""
    task = find_value(argv, "task") or "sft"
    check_choice("--task", task, finetuning.TASKS)
    return TaskArguments, _model_arguments(), training_arguments(task)


@functools.cache
def _model_arguments() -> type:
    """TRL's own arguments of the model, whose name may come without its flag."""
    name = _flag("model_name_or_path", str | None, None, "The model to fine-tune.", positional=True, metavar="MODEL")
    namespace = {"__module__": __name__, "__doc__": "Which model is trained, and whether all of it."}
    return make_dataclass("ModelArguments", [name], bases=(_trl().ModelConfig,), namespace=namespace)


@takes_argv
def main(task_args: TaskArguments, model_args: Any, args: Any) -> int:
    """Runs `finetune`."""
    finetune(task_args, model_args, args)
    return 0


def finetune(task_args: TaskArguments, model_args: Any, args: Any) -> None:
    """The whole job: rows, model, training, measures, and a folder with model or adapter, curve and card.

    Raises:
        ValueError: for what the user can get wrong, before anything of an earlier run is touched.
    """
    started = time.monotonic()
    if not 0 <= task_args.dropout < 1:
        raise ValueError(f"--dropout {task_args.dropout} must be at least 0 and below 1")
    _check(task_args, model_args, args.max_length)
    if args.uses_muon and task_args.task == "preference":
        raise ValueError(f"--optim {MUON_ADAMW} does not go with TRL's DPOTrainer; leave it out")
    time_limit = parse_duration(task_args.time_limit) if task_args.time_limit else None
    checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    if checkpoint is not None and not args.deepspeed:
        finetuning.check_resumable(checkpoint)
    resumes_here = checkpoint is not None and Path(checkpoint).resolve().parent == Path(args.output_dir).resolve()
    callbacks.check_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, resume=resumes_here)
    tokenizer = load_tokenizer(str(model_args.model_name_or_path or task_args.tokenizer_name))
    config = _config(task_args, model_args, tokenizer)
    data = rows.load_task(
        task_args.task,
        str(task_args.train_file),
        task_args.validation_file,
        {role: getattr(task_args, f"{role}_column") for role in COLUMNS},
        completion_files=(task_args.train_completion_file, task_args.validation_completion_file),
        validation_fraction=task_args.validation_split_percentage / 100,
        seed=args.seed,
    )
    lines, template = data.warnings(), _template(task_args)
    if rows.is_conversational(data.train):
        lines += rows.skip_unrendered(data, tokenizer, template)
    for line in lines:
        print(f"warning: {line}")
    print(f"{len(data.train):,} rows to train on, {len(data.validation):,} held out")
    set_seed(args.seed)
    logging.disable_progress_bar()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None:
        args.max_length = min(args.max_length or limit, limit)
    if args.eval_strategy == "no" and data.validation:
        args.eval_strategy = "epoch"
    if not data.validation:
        args.eval_strategy = "no"

    adapts = bool(model_args.use_peft or task_args.adapter_name_or_path)
    if args.chooses_rate:
        new = task_args.preset is not None
        args.learning_rate = finetuning.learning_rate(task_args.task, config, new=new, adapts=adapts)
        print(f"learning rate {args.learning_rate:.2g}; --learning_rate sets another")
    recipe = describe_recipe(args, optimizer_name(args))
    run = describe_run(config, tokenizer, data.describe(), args=args, recipe=recipe)
    run["adapter"] = {"method": finetuning.describe_method(model_args, task_args.adapter_name_or_path)}
    if checkpoint is not None:
        check_same_run(checkpoint, run)
    keeper, stop = CheckpointKeeper(run, args.save_total_limit, checkpoint), StopOnSignal()
    args.save_total_limit = None  # the keeper's
    with keeper.explain_stop(args):
        trainer = _trainer(task_args, model_args, args, data, tokenizer)
        if task_args.task != "classification":
            for line in rows.skip_masked(trainer, data, template):
                print(f"warning: {line}")
        steps = finetuning.count_steps(trainer)
        callbacks.add_callbacks(trainer, keeper, stop)
        if args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY and not args.lr_scheduler_kwargs:
            args.lr_scheduler_kwargs = wsd_kwargs(steps)
        if args.fits_logging_steps:
            args.logging_steps = callbacks.logging_steps(steps)
        if time_limit is not None:
            trainer.add_callback(TimeLimit(time_limit, started))
        sizes = finetuning.count_parameters(trainer.model)
        print(f"{sizes['trainable_parameters']:,} of {sizes['parameters']:,} parameters are trained")
        if checkpoint is not None:
            flag = "max_steps" if args.max_steps > 0 else "num_train_epochs"
            callbacks.check_steps_left(checkpoint, steps, f"--{flag} {getattr(args, flag):g}")
        finished = checkpoint is not None and callbacks.is_finished(checkpoint, steps)
        if finished:
            trainer._load_from_checkpoint(checkpoint)
        elif checkpoint is None and trainer.is_world_process_zero():
            callbacks.clear_earlier_run(args.output_dir)
        with keeper.explain_failed_save(args.output_dir), stop:
            metrics = callbacks.train(trainer, checkpoint, steps, finished=finished)
            stop.check()
            _save(trainer, tokenizer, task_args, model_args, data)
        stop.check()
        metrics["optimizer_and_gradient_bytes"] = finetuning.training_state_bytes(trainer.model, trainer.optimizer)
        measured = finetuning.evaluate(trainer, task_args.task) if data.validation else {}
        metrics |= {**sizes, **data.counts(), "peak_memory_bytes": accounting.peak_memory_bytes()}
        if trainer.is_world_process_zero():
            words = finetuning.words(task_args, model_args, data, template)
            unit = finetuning.LOSS_UNITS[task_args.task]
            write_finetuning_outputs(trainer, {**metrics, **accounting.hardware()}, measured, words, unit)


def _config(task_args: TaskArguments, model_args: Any, tokenizer: Any) -> Any:
    """The config of the model to fine-tune, or of a new one that --preset and the tokenizer shape."""
    if task_args.preset is None:
        return load_config(model_args.model_name_or_path)
    special_tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {**get_preset(task_args.preset), "vocab_size": len(tokenizer), **special_tokens}
    config = HfDecoderConfig(**{**shape, **parse_overrides(task_args.config_overrides)})
    check_tokenizer_fits(tokenizer, config)
    return config


def _check(task_args: TaskArguments, model_args: Any, max_length: int | None) -> None:
    if task_args.preset is not None:
        _check_new_model(task_args, model_args)
    elif not model_args.model_name_or_path:
        raise ValueError("name the model to fine-tune: hf-decoder finetune MODEL --train_file FILE")
    elif task_args.config_overrides or task_args.tokenizer_name:
        raise ValueError("--config_overrides and --tokenizer_name shape a new model; they go with --preset")
    if task_args.preset is None and is_adapter(model_args.model_name_or_path):
        raise ValueError(
            f"{model_args.model_name_or_path} holds an adapter; name its base, and the adapter with "
            "--adapter_name_or_path to go on training it"
        )
    check_at_least("--max_length", max_length, 1)
    if "{prompt}" not in (task_args.prompt_template or "{prompt}"):
        raise ValueError(f"--prompt_template {task_args.prompt_template!r} must hold {{prompt}}")
    if not 0 <= task_args.validation_split_percentage < 100:
        raise ValueError(
            f"--validation_split_percentage {task_args.validation_split_percentage} must lie between 0 and 100"
        )
    adapts = model_args.use_peft or task_args.adapter_name_or_path
    for flag in ("load_in_4bit", "load_in_8bit", "use_dora"):
        if getattr(model_args, flag) and not adapts:
            raise ValueError(f"--{flag} goes with an adapter; add --use_peft")
    if task_args.merge and not adapts:
        raise ValueError("--merge needs an adapter to merge; add --use_peft")
    quantizes = model_args.load_in_4bit or model_args.load_in_8bit
    if quantizes and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--load_in_4bit and --load_in_8bit need bitsandbytes: pip install bitsandbytes")


def _check_new_model(task_args: TaskArguments, model_args: Any) -> None:
    if model_args.model_name_or_path:
        raise ValueError(f"--preset starts a new model; leave out {model_args.model_name_or_path} or the preset")
    if not task_args.tokenizer_name:
        raise ValueError("a new model needs a tokenizer: train one with hf-decoder tokenizer, and --tokenizer_name it")
    if model_args.use_peft or task_args.adapter_name_or_path:
        raise ValueError("an adapter needs a trained model, and --preset starts a new one; leave one of them out")


def _trainer(task_args: TaskArguments, model_args: Any, args: Any, data: rows.TaskData, tokenizer: Any) -> Any:
    """The trainer of the task, with model, adapter and rows."""
    if task_args.task == "classification":
        return _classification_trainer(task_args, model_args, args, data, tokenizer)
    model = _load(load_model, task_args, model_args, tokenizer)
    train, validation = rows.trainer_rows(data, tokenizer, args, _template(task_args))
    peft_config = _peft_config(task_args, model_args, LANGUAGE_MODEL)
    if peft_config is not None and rows.is_conversational(data.train):
        tokens = finetuning.train_template_tokens(peft_config, data.train, tokenizer, model)
        if tokens:
            print(f"the embeddings of the chat template's special tokens are trained too: {', '.join(tokens)}")
    kwargs: dict[str, Any] = {
        "model": model,
        "args": args,
        "train_dataset": train,
        "eval_dataset": validation,
        "processing_class": tokenizer,
        "peft_config": peft_config,
    }
    if task_args.task == "preference":
        return _trl().DPOTrainer(**kwargs)
    is_text = data.roles == ("text",)
    if args.packing_was is None:
        args.packing = is_text
    if args.packing_strategy is None:
        args.packing_strategy = "bfd_split" if is_text else "bfd"
    return finetuning.sft_trainer()(**kwargs, optimizer_cls_and_kwargs=muon_adamw(args) if args.uses_muon else None)


def _template(task_args: TaskArguments) -> str | None:
    """What --prompt_template says, with its new lines."""
    return None if task_args.prompt_template is None else task_args.prompt_template.replace("\\n", "\n")


def _classification_trainer(
    task_args: TaskArguments, model_args: Any, args: Any, data: rows.TaskData, tokenizer: Any
) -> Trainer:
    known = read_label_names(task_args.adapter_name_or_path) if task_args.adapter_name_or_path else None
    names = task_args.class_names or (list(known.values()) if known else None)
    label2id = label_map([row["label"] for row in data.train], names)
    if data.validation:
        label_map([row["label"] for row in data.validation], list(label2id))
    id2label = {index: name for name, index in label2id.items()}
    model = _load(load_classifier, task_args, model_args, tokenizer, id2label=id2label, label2id=label2id)
    share_padding(model, tokenizer)
    peft_config = _peft_config(task_args, model_args, CLASSIFIER)
    if peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, peft_config)
    validation = rows.class_rows(data.validation, tokenizer, label2id, args.max_length) if data.validation else None
    return Trainer(
        model=model,
        args=args,
        train_dataset=rows.class_rows(data.train, tokenizer, label2id, args.max_length),
        eval_dataset=validation,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=finetuning.ClassMetrics(list(label2id)),
        compute_loss_func=functools.partial(class_loss, smoothing=args.label_smoothing_factor),
        callbacks=[KeepLabelNames(id2label)] if hasattr(model, "peft_config") else None,
        optimizer_cls_and_kwargs=muon_adamw(args) if args.uses_muon else None,
    )


def _load(loader: Any, task_args: TaskArguments, model_args: Any, tokenizer: Any, **kwargs: Any) -> Any:
    """The base model, quantized if asked, with the adapter to go on with if there is one; or a new model."""
    from trl import get_quantization_config

    if task_args.preset is not None:
        config = _config(task_args, model_args, tokenizer)
        for name, value in kwargs.items():
            setattr(config, name, value)
        model = NEW_MODELS[loader].from_config(config, dtype=torch.float32)
        finetuning.add_dropout(model, task_args.dropout)
        return model
    if model_args.attn_implementation:
        kwargs["attn_implementation"] = model_args.attn_implementation
    quantization = get_quantization_config(model_args)
    if quantization is not None:
        kwargs["quantization_config"] = quantization
    model = loader(model_args.model_name_or_path, dtype=model_args.dtype or "float32", **kwargs)
    settle_layers(model, training=True)  # of a stock class too
    finetuning.add_dropout(model, task_args.dropout)
    if task_args.adapter_name_or_path:
        model = load_adapter(model, task_args.adapter_name_or_path, is_trainable=True)
    return model


def _peft_config(task_args: TaskArguments, model_args: Any, task_type: str) -> Any:
    """The LoRA that the flags describe, or None: no adapter, or one that is there already."""
    from trl import get_peft_config

    if task_args.adapter_name_or_path:
        return None
    model_args.lora_task_type = task_type
    return get_peft_config(model_args)


def _save(trainer: Any, tokenizer: Any, task_args: TaskArguments, model_args: Any, data: rows.TaskData) -> None:
    """Model or adapter into the output folder, ready to load."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    classifies = task_args.task == "classification"
    if not classifies and rows.is_conversational(data.train):
        finetuning.end_turns(model, tokenizer)
    # Of a quantized base the adapter goes into the weights as they were before: nothing is rounded twice.
    reloads = task_args.merge and (model_args.load_in_4bit or model_args.load_in_8bit)
    folder = Path(trainer.args.output_dir) / ("adapter" if reloads else "")
    if reloads or not task_args.merge:
        save_in_full(trainer, folder)
    if not trainer.is_world_process_zero():
        return
    if classifies and (folder / ADAPTER_CONFIG).is_file():
        save_label_names(folder, model.config.id2label)
    if not task_args.merge:
        return
    if reloads:
        ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
        loader = load_classifier if classifies else load_model
        model = loader(model_args.model_name_or_path, adapter=str(folder), dtype=model_args.dtype)
        if classifies:
            share_padding(model, tokenizer)
        elif ends is not None:
            model.generation_config.eos_token_id = ends
    merge(model).save_pretrained(trainer.args.output_dir)
    tokenizer.save_pretrained(trainer.args.output_dir)
