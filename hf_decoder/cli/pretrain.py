"""`hf-decoder pretrain`: trains a tokenizer and a model from raw text, and leaves a folder ready for the Hub."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.cli import (
    MUON_ADAMW,
    check_at_least,
    check_training,
    load_config,
    load_model,
    load_tokenizer,
    optimizer_name,
    parse_overrides,
)
from hf_decoder.cli.arguments import takes_argv
from hf_decoder.cli.flags.pretrain import DEFAULT_PRESET, DataArguments, ModelArguments, PretrainingDefaults
from hf_decoder.costs.presets import get_preset
from hf_decoder.data.documents import MIN_DOCUMENTS_TO_SPLIT
from hf_decoder.data.sources import names_of
from hf_decoder.data.streamed_text import StreamedText
from hf_decoder.data.tokenization import check_tokenizer_fits, train_tokenizer
from hf_decoder.evaluation.batch_generation import end_ids
from hf_decoder.reporting.model_card import template_path
from hf_decoder.training import callbacks
from hf_decoder.training.checkpoint_formats import save_in_full, whole_model
from hf_decoder.training.checkpoints import (
    CheckpointKeeper,
    check_same_run,
    checkpoint_to_resume,
    describe_run,
)
from hf_decoder.training.launch import check_launch
from hf_decoder.training.optimizers import check_schedule, describe_recipe, grouped_optimizer, muon_adamw, wsd_kwargs
from hf_decoder.training.run_report import procedure, score_held_out, sizes_and_machine, write_outputs
from hf_decoder.training.run_rows import Rows, coverage, make_rows, make_streamed_rows, open_text, training_texts
from hf_decoder.training.stop_conditions import StopOnNan, StopOnSignal, WarnOfSpikes, check_reporters
from hf_decoder.training.streamed_rows import StreamedRows, StreamingTrainer
from hf_decoder.training.throughput import MeasuringTrainer, StepMetrics, TimeLimit, parse_duration

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass
class PretrainingArguments(PretrainingDefaults, TrainingArguments):  # type: ignore[misc]  # narrower types
    """`TrainingArguments` with defaults for training from scratch."""

    def __post_init__(self) -> None:
        self.uses_muon = self.optim == MUON_ADAMW
        if self.uses_muon:  # transformers would refuse the name
            self.optim = OptimizerNames.ADAMW_TORCH
        if not torch.accelerator.is_available():
            self.use_cpu = True
        check_launch(use_cpu=self.use_cpu, uses_muon=self.uses_muon)
        check_training(self)
        callbacks.choose_bf16(self)
        self.fits_logging_steps = self.logging_steps is None
        self.logging_steps = callbacks.LOGGING_STEPS if self.fits_logging_steps else self.logging_steps
        super().__post_init__()
        check_schedule(self)


def argument_types(argv: Sequence[str]) -> tuple[type, ...]:
    """The dataclasses whose fields are the flags."""
    return ModelArguments, DataArguments, PretrainingArguments


@takes_argv
def main(model_args: ModelArguments, data_args: DataArguments, args: PretrainingArguments) -> int:
    """Runs `pretrain`. Of several processes only the first one prints."""
    with callbacks.quiet_but_for_main_process(args):
        return pretrain(model_args, data_args, args)


def pretrain(model_args: ModelArguments, data_args: DataArguments, args: PretrainingArguments) -> int:
    """Runs the whole job, in order.

    Returns 0, or 128 + the number of the signal that stopped the training.

    Raises:
        ValueError: for anything the user can get wrong, before an earlier run is touched.
        OSError: if a checkpoint cannot be written.
    """
    seconds: dict[str, float] = {}
    started = time.monotonic()
    time_limit = parse_duration(args.time_limit) if args.time_limit else None
    checkpoint = _checkpoint(args)
    config, tokenizer, rows = _prepare(model_args, data_args, args, checkpoint, seconds)
    steps = _count_steps(args, rows.train)
    rows_of_a_step = args.train_batch_size * args.world_size * args.gradient_accumulation_steps
    print("\n".join(rows.lines()))
    print("\n".join(coverage(rows.train_report, steps * rows_of_a_step, data_args.block_size)))
    run = describe_run(
        config,
        tokenizer,
        rows.description,
        trained_tokenizer=_trained_tokenizer(model_args),
        args=args,
        recipe=describe_recipe(args, optimizer_name(args)),
    )
    if checkpoint is not None:
        check_same_run(checkpoint, run)
        callbacks.check_steps_left(checkpoint, steps, f"--num_train_epochs {args.num_train_epochs:g}")
    finished = checkpoint is not None and callbacks.is_finished(checkpoint, steps)
    model = _model(checkpoint if finished else model_args.model_name_or_path, config, new=checkpoint is None)
    # A chat model that is tuned from this one ends its turns, whoever loads it.
    model.generation_config.eos_token_id = end_ids(model, tokenizer, chat=tokenizer.chat_template is not None)
    if args.lr_scheduler_type == SchedulerType.WARMUP_STABLE_DECAY and not args.lr_scheduler_kwargs:
        args.lr_scheduler_kwargs = wsd_kwargs(steps)
    if args.fits_logging_steps:
        args.logging_steps = callbacks.logging_steps(steps)
    keeper, stop = CheckpointKeeper(run, args.save_total_limit, checkpoint), StopOnSignal()
    args.save_total_limit = None  # the keeper deletes old checkpoints in Trainer's place
    with keeper.explain_stop(args):
        trainer = _trainer(model, tokenizer, rows, data_args, args, [keeper, stop])
        if time_limit is not None:
            trainer.add_callback(TimeLimit(time_limit, started))
        if checkpoint is None and trainer.is_world_process_zero():
            callbacks.clear_earlier_run(args.output_dir)
        if checkpoint is not None and isinstance(trainer, StreamingTrainer):
            trainer.resume(checkpoint)
        with keeper.explain_failed_save(args.output_dir), stop:
            metrics = callbacks.train(trainer, checkpoint, steps, finished=finished)
            stop.check()
            save_in_full(trainer, args.output_dir)
        stop.check()
        if trainer.is_world_process_zero():
            _measure_and_show(trainer, rows, metrics, seconds, _words(args, model_args, data_args))
    return 0


def _checkpoint(args: PretrainingArguments) -> str | None:
    """The checkpoint to resume from, or None. Checks first what would stop the run only at its end.

    Raises:
        ValueError: for a missing reporter or card template, a folder in use, or a checkpoint without steps left.
    """
    check_reporters(args.report_to or [])
    template_path()
    checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, args.output_dir)
    resumes_here = checkpoint is not None and Path(checkpoint).resolve().parent == Path(args.output_dir).resolve()
    callbacks.check_output_dir(args.output_dir, overwrite=args.overwrite_output_dir, resume=resumes_here)
    if checkpoint is not None and args.max_steps > 0:
        callbacks.check_steps_left(checkpoint, args.max_steps, f"--max_steps {args.max_steps}")
    return checkpoint


def _prepare(
    model_args: ModelArguments,
    data_args: DataArguments,
    args: PretrainingArguments,
    checkpoint: str | None,
    seconds: dict[str, float],
) -> tuple[PretrainedConfig, PreTrainedTokenizerBase, Rows]:
    """Makes the config, the tokenizer and the rows; adds the time of each stage to `seconds`."""
    for name in ("max_eval_samples", "preprocessing_num_workers"):
        check_at_least(f"--{name}", getattr(data_args, name), 1)
    overrides = parse_overrides(model_args.config_overrides)
    if model_args.model_name_or_path and (overrides or model_args.preset):
        raise ValueError("--preset and --config_overrides shape a new model; they do not go with --model_name_or_path")
    # A model to go on with brings its config and tokenizer. A checkpoint of this run brings the tokenizer.
    source = model_args.model_name_or_path and (checkpoint or model_args.model_name_or_path)
    config = _config(model_args.preset, overrides, source, data_args.block_size)
    set_seed(args.seed)
    if args.use_cpu:
        callbacks.keep_freed_memory()
    logging.disable_progress_bar()  # of the files that transformers writes; training and data keep their bars
    with args.main_process_first(desc="text"):
        with callbacks.stage("corpus", seconds):
            text = open_text(data_args)
        with callbacks.stage("tokenizer", seconds):
            tokenizer = _tokenizer(model_args, checkpoint, training_texts(text))
        _fit_to_tokenizer(config, tokenizer, resize=source is None and "vocab_size" not in overrides)
        with callbacks.stage("rows", seconds):
            rows = _rows(text, tokenizer, data_args, args)
    return config, tokenizer, rows


def _trainer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    data_args: DataArguments,
    args: PretrainingArguments,
    keepers: list[TrainerCallback],
) -> MeasuringTrainer:
    """The trainer, with `keepers` and the callbacks that watch the loss and show speed, curve and samples."""
    is_ours = isinstance(model, HfDecoderForCausalLM)
    trainer = (StreamingTrainer if data_args.streaming else MeasuringTrainer)(
        model=model,
        args=args,
        train_dataset=rows.train,
        eval_dataset=_spread(rows.evaluation, data_args.max_eval_samples),
        processing_class=tokenizer,
        # A padding collator adds an attention mask, and with a mask the documents of a row would see each other.
        data_collator=callbacks.collate_rows if is_ours else default_data_collator,
        optimizer_cls_and_kwargs=muon_adamw(args) if args.uses_muon else grouped_optimizer(args),
        callbacks=[*keepers, StopOnNan(tokenizer), WarnOfSpikes()],
    )
    if is_ours:
        trainer.callback_handler.callbacks.insert(0, StepMetrics(trainer, data_args.block_size))
    title = f"{model.num_parameters() / 1e6:.1f}M parameters"
    trainer.add_callback(callbacks.CurveAtSave(title=title, bytes_per_token=rows.eval_report.bytes_per_token))
    if args.sample_steps is not None:
        prompts = callbacks.held_out_prompts(rows.held_out)
        trainer.add_callback(callbacks.SampleText(tokenizer, prompts, args.sample_steps, args.seed))
    if not args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(callbacks.SpeedBar())
    return trainer


def _measure_and_show(
    trainer: Trainer, rows: Rows, metrics: dict[str, Any], seconds: dict[str, float], words: dict[str, str]
) -> None:
    """Measures the trained model on all held-out text, and writes and prints the results."""
    args, model = trainer.args, whole_model(trainer, str(trainer.args.output_dir))
    tokenizer: Any = trainer.processing_class
    with callbacks.stage("evaluate", seconds):
        eval_metrics = score_held_out(model, args, rows.evaluation, rows.eval_report, rows.held_out)
    train_metrics = {**metrics, **sizes_and_machine(model, rows.train_report), **seconds}
    prompts = callbacks.held_out_prompts(rows.held_out)
    samples = callbacks.draw_samples(model, tokenizer, prompts, seed=args.seed)
    write_outputs(trainer, train_metrics, eval_metrics, samples, words)


def _count_steps(args: PretrainingArguments, rows: Dataset | StreamedRows) -> int:
    """The number of optimizer steps of the whole run."""
    if args.max_steps > 0:
        return args.max_steps
    if isinstance(rows, StreamedRows):
        raise ValueError("--streaming needs --max_steps: the length of the text is unknown until it is read")
    batches = math.ceil(len(rows) / (args.train_batch_size * args.world_size))
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


def _config(preset: str | None, overrides: dict[str, Any], source: str | None, block_size: int) -> PretrainedConfig:
    """The config of the model in `source`; without one, of a new model from preset and overrides."""
    shape = get_preset(preset or DEFAULT_PRESET)
    config = HfDecoderConfig(**{**shape, **overrides}) if source is None else load_config(source)
    limit = getattr(config, "max_position_embeddings", None) or block_size
    if not 2 <= block_size <= limit:
        raise ValueError(
            f"--block_size {block_size} must lie between 2 and the model's max_position_embeddings, {limit}"
        )
    return config


def _model(name: str | None, config: PretrainedConfig, *, new: bool) -> Any:
    """The model called `name`, which training starts from or a finished checkpoint holds; without a name, a new one.

    Trainer loads the weights of a checkpoint to resume, together with the optimizer's state.
    """
    if name is not None and (new or callbacks.is_checkpoint(name)):
        return load_model(name, dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    special_tokens = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    # Greedy decoding of a small model soon repeats itself.
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.8, top_p=0.95, **special_tokens)
    return model


def _tokenizer(model_args: ModelArguments, checkpoint: str | None, texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """The tokenizer that was named, or that of the checkpoint or model; else one trained on `texts`."""
    name = model_args.tokenizer_name or checkpoint or model_args.model_name_or_path
    if name is not None:
        return load_tokenizer(name)
    return train_tokenizer(texts, vocab_size=model_args.vocab_size, tokenizer_type=model_args.tokenizer_type)


def _rows(
    text: DatasetDict | StreamedText,
    tokenizer: PreTrainedTokenizerBase,
    data_args: DataArguments,
    args: PretrainingArguments,
) -> Rows:
    if isinstance(text, StreamedText):
        return make_streamed_rows(text, tokenizer, data_args.block_size, data_args.shuffle_buffer_size, args)
    return make_rows(text, tokenizer, data_args.block_size, data_args.preprocessing_num_workers)


def _trained_tokenizer(model_args: ModelArguments) -> dict[str, Any]:
    """The settings of the tokenizer that the run trains; empty if it loads one."""
    if model_args.tokenizer_name or model_args.model_name_or_path:
        return {}
    size = {"vocab_size": model_args.vocab_size} if model_args.tokenizer_type == "bpe" else {}
    return {"tokenizer_type": model_args.tokenizer_type, **size}


def _fit_to_tokenizer(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, *, resize: bool) -> None:
    """Gives the config the tokenizer's special tokens, with `resize` its size, and checks that every id fits."""
    if resize:
        config.vocab_size = len(tokenizer)
    check_tokenizer_fits(tokenizer, config)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, name, None) is None:
            setattr(config, name, getattr(tokenizer, name))


def _spread(rows: Dataset, count: int | None) -> Dataset:
    """`count` rows, spread evenly over all; all of them if `count` is None."""
    if count is None or count >= len(rows):
        return rows
    return rows.select([i * len(rows) // count for i in range(count)])


def _words(args: PretrainingArguments, model_args: ModelArguments, data_args: DataArguments) -> dict[str, str]:
    """The model card's words about the text, its held-out part, the tokenizer and the training."""
    own_text = names_of(data_args)
    if data_args.validation_file is not None:
        held_out = f"text of its own, {Path(data_args.validation_file).name}"
    elif not own_text:
        held_out = "whole files, chosen by a hash of their path"
    elif data_args.dataset_name is not None:
        held_out = "the validation split, or where there is none, whole documents chosen by their hash"
    else:
        few = MIN_DOCUMENTS_TO_SPLIT
        held_out = f"whole documents chosen by their hash; with fewer than {few} documents, the end of the text"
    origin = model_args.tokenizer_name or model_args.model_name_or_path
    return {
        "dataset": ", ".join(own_text) if own_text else f"the standard library of Python {platform.python_version()}",
        "held_out": held_out,
        "tokenizer": f"taken from {origin}"
        if origin
        else f"{model_args.tokenizer_type}, trained on the training text",
        "start": f"the weights of {model_args.model_name_or_path}"
        if model_args.model_name_or_path
        else "random weights",
        "procedure": procedure(args, optimizer_name(args), data_args.block_size),
        **({"license": model_args.license} if model_args.license else {}),
    }
