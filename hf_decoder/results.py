"""What a finished pretraining says of itself: exact measures, sizes, machine, and the files that show them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

from hf_decoder import accounting, evaluation, training
from hf_decoder.modelcard import write_model_card
from hf_decoder.packing import CorpusReport
from hf_decoder.preparation import StreamReport

if TYPE_CHECKING:
    from datasets import Dataset


def score_held_out(
    model: Any, args: TrainingArguments, rows: Dataset, report: CorpusReport, texts: Sequence[str]
) -> dict[str, Any]:
    """Metrics of the whole held-out text, exact: every token and every byte counts once."""
    score = evaluation.score(
        model,
        rows,
        batch_size=args.per_device_eval_batch_size,
        autocast_dtype=torch.bfloat16 if args.bf16 else None,
    )
    return {
        "eval_loss": score.loss,
        "perplexity": evaluation.perplexity(score.loss),
        "eval_bits_per_byte": evaluation.bits_per_byte(score.nats, report.bytes),
        "xz_bits_per_byte": evaluation.xz_bits_per_byte(texts),
        "eval_documents": report.documents,
        "eval_bytes": report.bytes,
        "eval_tokens": score.tokens,
    }


def sizes_and_machine(model: Any, report: CorpusReport | StreamReport) -> dict[str, Any]:
    """What else belongs beside the training metrics: sizes, memory, machine and versions."""
    return {
        "train_documents": report.documents,
        "train_bytes": report.bytes,
        "train_tokens": report.tokens,
        "parameters": model.num_parameters(),
        "context_length": getattr(model.config, "max_position_embeddings", None),
        "vocab_size": model.config.vocab_size,
        "peak_memory_bytes": accounting.peak_memory_bytes(),
        **accounting.hardware(),
    }


def write_outputs(
    output_dir: str,
    results: dict[str, Any],
    log_history: list[dict[str, Any]],
    samples: list[tuple[str, str]],
    words: dict[str, str],
) -> None:
    """Loss curve, samples and model card, beside the model that Trainer saved."""
    folder = Path(output_dir)
    training.plot_loss_curve(
        log_history,
        folder / "loss_curve.png",
        title=f"{results['parameters'] / 1e6:.1f}M parameters on {words['dataset']}",
        bytes_per_token=results["eval_bytes"] / results["eval_tokens"],
        xz_bits_per_byte=results["xz_bits_per_byte"],
    )
    training.write_samples(folder / "samples.md", samples)
    write_model_card(folder, results, words)


def procedure(args: TrainingArguments, optimizer: str, block_size: int) -> str:
    """How the model was trained, in a sentence for its card."""
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    schedule = SchedulerType(args.lr_scheduler_type).value
    precision = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "fp32"
    return (
        f"`{optimizer}`, peak learning rate {args.learning_rate:g}, schedule `{schedule}`, weight decay "
        f"{args.weight_decay:g} on matrices only; {rows} rows of {block_size} tokens a step; {precision}; seed "
        f"{args.seed}. Documents that share a row do not see each other."
    )


def summary(metrics: dict[str, Any]) -> str:
    """The measures in one line."""
    return (
        f"held out: loss {metrics['eval_loss']:.3f} nats per token, perplexity {metrics['perplexity']:.1f}, "
        f"{metrics['eval_bits_per_byte']:.3f} bits per byte (xz -9e: {metrics['xz_bits_per_byte']:.3f})"
    )
