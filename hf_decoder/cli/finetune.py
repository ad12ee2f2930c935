"""`hf-decoder finetune`: every stage after pretraining, from text, preferences, labels, rewards, a teacher."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import time
import warnings
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments, set_seed
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from hf_decoder import HfDecoderConfig
from hf_decoder.cli import (
    MUON_ADAMW,
    check_at_least,
    check_choice,
    check_training,
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
from hf_decoder.data.tokenization import check_tokenizer_fits
from hf_decoder.interop.adapters import is_adapter
from hf_decoder.training import callbacks
from hf_decoder.training.checkpoints import CheckpointKeeper, check_same_run, checkpoint_to_resume, describe_run
from hf_decoder.training.optimizers import check_schedule, describe_recipe, wsd_kwargs
from hf_decoder.training.run_report import write_finetuning_outputs
from hf_decoder.training.stop_conditions import StopOnNan, StopOnSignal
from hf_decoder.training.throughput import TimeLimit, parse_duration
from hf_decoder.tuning import before_and_after, finetuning, rows
from hf_decoder.tuning.sampling import MOST_NEW_TOKENS, Rewards
from hf_decoder.tuning.tasks import TASKS
from hf_decoder.tuning.trainers import Job, prompt_template, save

COLUMNS = ("text", "prompt", "completion", "messages", "label", "chosen", "rejected", "reference")
STAGE = ("reward_funcs", "reward_weights", "teacher")  # flags that stay the same when a run goes on
# The same, of which older checkpoints do not tell: what a row holds, what its loss is, and what is trained.
KEPT = (
    "task", "max_length", "packing", "packing_strategy", "assistant_only_loss", "completion_only_loss",
    "prompt_template", "dropout", "label_smoothing_factor", "loss_type", "alpha", "beta", "num_generations",
    "max_completion_length", "lora_dropout", "lora_target_modules", "use_rslora",
)  # fmt: skip
# Flags of our own that only some tasks read.
SAMPLING = tuple(name for name, task in TASKS.items() if task.samples)
READERS = {
    "class_names": ("classification",), "alpha": ("distillation",),
    "reward_funcs": SAMPLING, "reward_timeout": SAMPLING,
}  # fmt: skip

# Trainer pickles its arguments beside every checkpoint, so their classes have names here; `__getattr__` makes them.
ARGUMENT_CLASSES = {task: f"{task.capitalize()}Arguments" for task in TASKS}


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
    base = getattr(trl, TASKS[task].config, TrainingArguments)
    changed = {name: (name, *rest) for name, *rest in [*_common_fields(), *_fields_of(task)]}

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
        if base.__name__ == "SFTConfig":
            self.packing_was = self.packing
            self.packing = bool(self.packing)
        self.measures_start = self.eval_on_start is None
        self.eval_on_start = bool(self.eval_on_start)
        self.chooses_evaluation = self.eval_strategy is None and self.eval_steps is None
        if self.eval_strategy is None:
            self.eval_strategy = "no" if self.chooses_evaluation else "steps"
        check_training(self)
        base.__post_init__(self)
        check_schedule(self)

    namespace = {"__post_init__": prepare, "__module__": __name__, "__doc__": "How it is trained."}
    return make_dataclass(ARGUMENT_CLASSES[task], changed.values(), bases=(base,), namespace=namespace)


def _common_fields() -> list[tuple[str, Any, Any]]:
    """The defaults of all tasks that differ from those of TRL and transformers."""
    return [
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
        _flag(
            "eval_strategy",
            str | None,
            None,
            "When held-out rows are measured: no, steps, epoch; if unset, each epoch, or every --eval_steps.",
        ),
        _flag("eval_on_start", bool | None, None, "Measure before the first step; on where rows are held out."),
        _flag("learning_rate", float | None, None, "Peak learning rate; if unset, by task, width and method."),
        _flag(
            "optim",
            str,
            OptimizerNames.ADAMW_TORCH_FUSED.value,
            f"{MUON_ADAMW}, the recipe of pretraining, or any name of transformers.",
        ),
    ]


def _fields_of(task: str) -> list[tuple[str, Any, Any]]:
    """The same of one task."""
    if TASKS[task].config == "SFTConfig":
        packing = "bfd, bfd_split or wrapped; text is split, other rows are not."
        return [
            _flag("packing", bool | None, None, "Several rows in one; on for rows of text if unset."),
            _flag("packing_strategy", str | None, None, packing),
            _flag("assistant_only_loss", bool | None, None, "Loss on the assistant's turns of messages; on if unset."),
        ]
    if task == "classification":
        return [_flag("max_length", int | None, None, "Tokens of a text; its last ones stay.")]
    if not TASKS[task].samples:
        return []
    most = f"Most tokens of a completion; if unset, {MOST_NEW_TOKENS}, or half of a shorter context."
    return [
        _flag("per_device_train_batch_size", int, 32, "Completions of a step, per device."),
        _flag("per_device_eval_batch_size", int, 32, "Completions of an evaluation step, per device."),
        _flag("num_generations", int | None, 8, "Completions of a prompt, which are compared with each other."),
        _flag("num_generations_eval", int | None, 4, "Completions of a held-out prompt."),
        _flag("max_completion_length", int | None, None, most),
        _flag("num_train_epochs", float, 1.0, "Passes over the prompts."),
        _flag("beta", float, 0.04, "Weight of the KL to the model that the training starts from."),
        _flag("include_num_input_tokens_seen", str, "no", "Trainer's count of tokens; TRL has its own."),
    ]


def _trl() -> Any:
    try:
        import trl
    except ModuleNotFoundError:
        raise ValueError("fine-tuning needs trl: pip install 'hf-decoder[finetune]'") from None
    # TRL asks at every step by the older name, and a reward that quiets warnings makes Python say it again
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    return trl


def argument_types(argv: Sequence[str]) -> tuple[type, ...]:
    """Whose fields are the flags: the task decides."""
    task = find_value(argv, "task") or "sft"
    check_choice("--task", task, tuple(TASKS))
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
    """The whole job: rows, model, training, measures, and a folder with model or adapter, curve, samples and card.

    Raises:
        ValueError: for what the user can get wrong, before anything of an earlier run is touched.
    """
    started = time.monotonic()
    _check(task_args, model_args, args)
    time_limit = parse_duration(task_args.time_limit) if task_args.time_limit else None
    checkpoint = _checkpoint(args)
    job = _job(task_args, model_args, args)
    set_seed(args.seed)
    logging.disable_progress_bar()
    _settle(job, checkpoint)
    run = _describe(job)
    if checkpoint is not None:
        check_same_run(checkpoint, run)
    keeper, stop = CheckpointKeeper(run, args.save_total_limit, checkpoint), StopOnSignal()
    args.save_total_limit = None  # the keeper's
    with keeper.explain_stop(args):
        trainer = job.trainer()
        steps = _prepare(job, trainer, checkpoint)
        callbacks.add_callbacks(trainer, keeper, stop, StopOnNan(job.tokenizer, watch_loss=not job.task.samples))
        if time_limit is not None:
            trainer.add_callback(TimeLimit(time_limit, started))
        prompts, before = _first_answers(job, trainer)
        finished = checkpoint is not None and callbacks.is_finished(checkpoint, steps)
        if finished:
            trainer._load_from_checkpoint(checkpoint)
        elif checkpoint is None and trainer.is_world_process_zero():
            callbacks.clear_earlier_run(args.output_dir)
        with keeper.explain_failed_save(args.output_dir), stop:
            metrics = callbacks.train(trainer, checkpoint, steps, finished=finished)
            stop.check()
            save(job, trainer)
        stop.check()
        _report(job, trainer, metrics)
        if prompts:
            after = before_and_after.answers(trainer.model, job.tokenizer, prompts)
            before_and_after.write_answers(Path(args.output_dir) / "samples.md", prompts, before, after)


def _checkpoint(args: Any) -> str | None:
    """The checkpoint to go on from, or None; refuses a folder that holds another run."""
    checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    if checkpoint is not None and not args.deepspeed:
        finetuning.check_resumable(checkpoint)
    resumes_here = checkpoint is not None and Path(checkpoint).resolve().parent == Path(args.output_dir).resolve()
    callbacks.check_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, resume=resumes_here)
    return checkpoint


def _job(task_args: TaskArguments, model_args: Any, args: Any) -> Job:
    """Tokenizer, config and rows of the job; prints a line about what is left out of the rows."""
    tokenizer = load_tokenizer(str(model_args.model_name_or_path or task_args.tokenizer_name))
    config = _config(task_args, model_args, tokenizer)
    samples = TASKS[task_args.task].samples
    rewards = Rewards(task_args.reward_funcs, task_args.reward_timeout) if samples else None
    data = rows.load_task(
        task_args.task,
        str(task_args.train_file),
        task_args.validation_file,
        {role: getattr(task_args, f"{role}_column") for role in COLUMNS},
        completion_files=(task_args.train_completion_file, task_args.validation_completion_file),
        validation_fraction=task_args.validation_split_percentage / 100,
        seed=args.seed,
        needed=rewards.columns if rewards else (),
    )
    template, limit = prompt_template(task_args), getattr(config, "max_position_embeddings", None)
    talks = rows.is_conversational(data.train)
    if template is not None and (talks or "prompt" not in data.roles):
        held = "messages" if talks else " and ".join(data.roles)
        raise ValueError(f"--prompt_template is for prompts of text, and the rows hold {held}; leave it out")
    lines = data.warnings(template)
    if talks:
        lines += rows.skip_unrendered(data, tokenizer)
    if samples:
        lines += _fit_completions(args, data, tokenizer, template, limit)
    elif limit is not None:
        args.max_length = min(args.max_length or limit, limit)
    for line in lines:
        print(f"warning: {line}")
    print(f"{len(data.train):,} rows to train on, {len(data.validation):,} held out")
    return _job_of(task_args, model_args, args, data, tokenizer, config=config, rewards=rewards)


def _fit_completions(args: Any, data: Any, tokenizer: Any, template: str | None, limit: int | None) -> list[str]:
    """Settles how long completions get, and leaves out the prompts that they do not fit behind."""
    args.max_completion_length = args.max_completion_length or min(MOST_NEW_TOKENS, (limit or 2**31) // 2)
    if limit is None:
        return []
    if args.max_completion_length >= limit:
        raise ValueError(
            f"--max_completion_length {args.max_completion_length} leaves no room for a prompt in the model's context "
            f"of {limit} tokens"
        )
    lines = rows.skip_long_prompts(data, tokenizer, template, limit - args.max_completion_length)
    prompts = args.generation_batch_size // args.num_generations
    if len(data.train) < prompts:
        raise ValueError(
            f"a step takes {prompts} prompts, and there are {len(data.train)}; lower --per_device_train_batch_size"
        )
    return lines


def _job_of(task_args: Any, model_args: Any, args: Any, data: Any, tokenizer: Any, **more: Any) -> Job:
    return Job(
        task_args=task_args,
        model_args=model_args,
        args=args,
        data=data,
        tokenizer=tokenizer,
        load_model=load_model,
        load_classifier=load_classifier,
        load_tokenizer=load_tokenizer,
        **more,
    )


def _describe(job: Job) -> dict[str, Any]:
    """What has to stay the same for the run to go on."""
    args, model_args, task_args = job.args, job.model_args, job.task_args
    recipe = describe_recipe(args, optimizer_name(args))
    run = describe_run(job.config, job.tokenizer, job.data.describe(), args=args, recipe=recipe)
    run["adapter"] = {"method": finetuning.describe_method(model_args, task_args.adapter_name_or_path)}
    flags = {**vars(model_args), **vars(args), **vars(task_args)}
    if stage := {name: flags[name] for name in STAGE if flags.get(name)}:
        run["stage"] = stage
    run["task"] = {name: flags.get(name) for name in KEPT}
    if task_args.task == "classification":
        run["task"]["class_names"] = list(job.label2id)
    return run


def _settle(job: Job, checkpoint: str | None) -> None:
    """Decides what the flags leave open: when to measure, and the learning rate."""
    args, data = job.args, job.data
    if args.chooses_evaluation and data.validation:
        args.eval_strategy = "epoch"
    if not data.validation:
        args.eval_strategy = "no"
    if args.measures_start or not data.validation:
        args.eval_on_start = bool(data.validation) and checkpoint is None
    if args.chooses_rate:
        adapts = bool(job.model_args.use_peft or job.task_args.adapter_name_or_path)
        new = job.task_args.preset is not None
        args.learning_rate = finetuning.learning_rate(job.task.rate, job.config, new=new, adapts=adapts)
        print(f"learning rate {args.learning_rate:.2g}; --learning_rate sets another")


def _prepare(job: Job, trainer: Any, checkpoint: str | None) -> int:
    """Counts rows and steps, fits schedule and curve to them, and returns the steps."""
    args = job.args
    if job.task.config != "TrainingArguments" and not job.task.samples:
        for line in rows.skip_masked(trainer, job.data, job.template):
            print(f"warning: {line}")
    steps = finetuning.count_steps(trainer)
    if args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY and not args.lr_scheduler_kwargs:
        args.lr_scheduler_kwargs = wsd_kwargs(steps)
    if args.fits_logging_steps:
        args.logging_steps = callbacks.logging_steps(steps)
    sizes = finetuning.count_parameters(trainer.model)
    print(f"{sizes['trainable_parameters']:,} of {sizes['parameters']:,} parameters are trained")
    if checkpoint is not None:
        flag = "max_steps" if args.max_steps > 0 else "num_train_epochs"
        callbacks.check_steps_left(checkpoint, steps, f"--{flag} {getattr(args, flag):g}")
    return steps


def _first_answers(job: Job, trainer: Any) -> tuple[list[Any], list[str]]:
    """A few prompts and what the model writes of them before the training; none of a model in shards."""
    args = job.args
    if not job.task.writes or args.world_size > 1 or args.deepspeed or args.fsdp:
        return [], []
    prompts = rows.prompts_of(job.data, job.template)
    prompts = before_and_after.fitting_prompts(prompts, trainer.model, job.tokenizer)
    return prompts, before_and_after.answers(trainer.model, job.tokenizer, prompts)


def _report(job: Job, trainer: Any, metrics: dict[str, Any]) -> None:
    """Measures the result and writes metrics, curve and card; prints what the stage changed."""
    metrics["optimizer_and_gradient_bytes"] = finetuning.training_state_bytes(trainer.model, trainer.optimizer)
    measured = finetuning.evaluate(trainer, job.task_args.task) if job.data.validation else {}
    metrics |= {**finetuning.count_parameters(trainer.model), **job.data.counts()}
    metrics["peak_memory_bytes"] = accounting.peak_memory_bytes()
    if not trainer.is_world_process_zero():
        return
    words = finetuning.words(job.task_args, job.model_args, job.data, job.template)
    words["change"] = before_and_after.describe_change(trainer.state.log_history, measured, job.task.measures)
    drawing = {"unit": job.task.unit, "curves": job.task.measures}
    write_finetuning_outputs(trainer, {**metrics, **accounting.hardware()}, measured, words, drawing)


def _config(task_args: TaskArguments, model_args: Any, tokenizer: Any) -> Any:
    """The config of the model to fine-tune, or of a new one that --preset and the tokenizer shape."""
    if task_args.preset is None:
        return load_config(model_args.model_name_or_path)
    special_tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {**get_preset(task_args.preset), "vocab_size": len(tokenizer), **special_tokens}
    config = HfDecoderConfig(**{**shape, **parse_overrides(task_args.config_overrides)})
    check_tokenizer_fits(tokenizer, config)
    return config


def _check(task_args: TaskArguments, model_args: Any, args: Any) -> None:
    """Refuses flags that do not go together."""
    if not 0 <= task_args.dropout < 1:
        raise ValueError(f"--dropout {task_args.dropout} must be at least 0 and below 1")
    _check_model(task_args, model_args)
    _check_task(task_args, args)
    if task_args.validation_completion_file and not task_args.validation_file:
        raise ValueError("--validation_completion_file goes with --validation_file; give both")
    check_at_least("--max_length", getattr(args, "max_length", None), 1)
    if "{prompt}" not in (task_args.prompt_template or "{prompt}"):
        raise ValueError(f"--prompt_template {task_args.prompt_template!r} must hold {{prompt}}")
    if not 0 <= task_args.validation_split_percentage < 100:
        raise ValueError(
            f"--validation_split_percentage {task_args.validation_split_percentage} must lie between 0 and 100"
        )


def _check_task(task_args: TaskArguments, args: Any) -> None:
    """Refuses flags that the task has no use for, or misses."""
    name, task = task_args.task, TASKS[task_args.task]
    trainer = getattr(_trl(), task.trainer, None)
    if args.uses_muon and trainer and "optimizer_cls_and_kwargs" not in inspect.signature(trainer).parameters:
        raise ValueError(f"--optim {MUON_ADAMW} does not go with TRL's {task.trainer}; leave it out")
    if task.has_reference and task_args.preset is not None:
        raise ValueError(f"--task {name} starts from a trained model, and --preset makes a new one; name a model")
    for flag, readers in READERS.items():
        if getattr(task_args, flag) != getattr(TaskArguments, flag) and name not in readers:
            raise ValueError(f"--{flag} goes with --task {' and '.join(readers)}")
    if (name == "distillation") != (task_args.teacher is not None):
        raise ValueError("--task distillation and --teacher go together; give both or neither")
    if not 0 <= task_args.alpha <= 1:
        raise ValueError(f"--alpha {task_args.alpha} must lie between 0 and 1")
    if task.samples:
        check_at_least("--max_completion_length", args.max_completion_length, 1)
        count = args.num_generations_eval or args.num_generations
        if args.per_device_eval_batch_size % count:
            raise ValueError(
                f"--per_device_eval_batch_size {args.per_device_eval_batch_size} must be a multiple of the {count} "
                "completions of a held-out prompt, --num_generations_eval"
            )


def _check_model(task_args: TaskArguments, model_args: Any) -> None:
    """Refuses a model, an adapter or a way to train it that is none."""
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
    adapts = model_args.use_peft or task_args.adapter_name_or_path
    given = [flag.name for flag in fields(model_args) if getattr(model_args, flag.name) != flag.default]
    shaping = [flag for flag in given if flag.startswith(("lora_", "use_dora", "use_rslora"))]
    for flag in (*shaping, *(flag for flag in given if flag.startswith("load_in_"))):
        if not adapts:
            raise ValueError(f"--{flag} goes with an adapter; add --use_peft")
    if shaping and task_args.adapter_name_or_path:
        raise ValueError(
            f"--{shaping[0]} shapes a new adapter, and --adapter_name_or_path goes on with one; leave one of them out"
        )
    if "model_revision" in given:
        raise ValueError("--model_revision is not read; download that revision, and name its folder as the model")
    if task_args.merge and not adapts:
        raise ValueError("--merge needs an adapter to merge; add --use_peft")
    quantizes = model_args.load_in_4bit or model_args.load_in_8bit
    if quantizes and importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("--load_in_4bit and --load_in_8bit need bitsandbytes: pip install bitsandbytes")


def _check_new_model(task_args: TaskArguments, model_args: Any) -> None:
    if model_args.model_name_or_path:
        raise ValueError(f"--preset starts a new model; leave out {model_args.model_name_or_path} or the preset")
    if model_args.dtype not in (None, "float32") or model_args.attn_implementation:
        raise ValueError("--dtype and --attn_implementation are for a trained model, and --preset starts a new one")
    if not task_args.tokenizer_name:
        raise ValueError("a new model needs a tokenizer: train one with hf-decoder tokenizer, and --tokenizer_name it")
    if model_args.use_peft or task_args.adapter_name_or_path:
        raise ValueError("an adapter needs a trained model, and --preset starts a new one; leave one of them out")
