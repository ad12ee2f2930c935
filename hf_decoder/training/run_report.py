"""Measures a finished model exactly, and writes its metrics, loss curve, samples, model card and last lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType

from hf_decoder.costs import accounting
from hf_decoder.data.packing import CorpusReport
from hf_decoder.evaluation import metrics
from hf_decoder.evaluation.classification import check_against_chance, plot_confusion
from hf_decoder.interop.adapters import ADAPTER_CONFIG
from hf_decoder.reporting.loading_lines import DEFAULT_PROMPT, finetuned_load_lines, load_lines
from hf_decoder.reporting.model_card import steps_taken, write_finetuning_card, write_model_card
from hf_decoder.training import callbacks
from hf_decoder.training.run_rows import StreamReport

if TYPE_CHECKING:
    from datasets import Dataset

LONGEST_PROMPT = 120


def score_held_out(
    model: Any, args: TrainingArguments, rows: Dataset, report: CorpusReport, texts: Sequence[str]
) -> dict[str, Any]:
    """Metrics of the whole held-out text; every token and every byte counts once."""
    score = metrics.score(
        model,
        rows,
        batch_size=args.per_device_eval_batch_size,
        autocast_dtype=torch.bfloat16 if args.bf16 else None,
    )
    return {
        "eval_loss": score.loss,
        "perplexity": metrics.perplexity(score.loss),
        "eval_bits_per_byte": metrics.bits_per_byte(score.nats, report.bytes),
        "xz_bits_per_byte": metrics.xz_bits_per_byte(texts),
        "eval_documents": report.documents,
        "eval_bytes": report.bytes,
        "eval_tokens": score.tokens,
    }


def sizes_and_machine(model: Any, report: CorpusReport | StreamReport) -> dict[str, Any]:
    """Sizes, peak memory, machine and versions, to write beside the training metrics."""
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


def is_pretrained_only(folder: Path) -> bool:
    """Whether `pretrain` wrote the all_results.json in `folder`: its models have never seen a chat."""
    try:
        results = json.loads((folder / "all_results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(results, dict) and "train_tokens" in results and "train_rows" not in results


def write_results(trainer: Trainer, train: dict[str, Any], evaluation: dict[str, Any]) -> dict[str, Any]:
    """Writes train_results.json, eval_results.json, all_results.json and trainer_state.json; returns all metrics."""
    results = {**train, **evaluation}
    trainer.save_metrics("train", train, combined=False)
    trainer.save_metrics("eval", evaluation, combined=False)
    trainer.save_state()
    text = json.dumps(results, indent=4, sort_keys=True) + "\n"
    (Path(str(trainer.args.output_dir)) / "all_results.json").write_text(text, encoding="utf-8")
    return results


def write_outputs(
    trainer: Trainer,
    train: dict[str, Any],
    evaluation: dict[str, Any],
    samples: list[tuple[str, str]],
    words: dict[str, str],
) -> None:
    """Writes metrics, loss curve, samples and model card of a pretraining beside the saved model."""
    results = write_results(trainer, train, evaluation)
    folder = Path(str(trainer.args.output_dir))
    callbacks.plot_loss_curve(
        trainer.state.log_history,
        folder / "loss_curve.png",
        title=f"{results['parameters'] / 1e6:.1f}M parameters on {words['dataset']}",
        bytes_per_token=results["eval_bytes"] / results["eval_tokens"],
        xz_bits_per_byte=results["xz_bits_per_byte"],
    )
    callbacks.write_samples(folder / "samples.md", samples)
    prompt = line_of([prompt for prompt, _ in samples])
    write_model_card(folder, results, words)
    print_closing(folder, results, "model", load_lines(folder.as_posix(), prompt))


def write_finetuning_outputs(
    trainer: Trainer,
    train: dict[str, Any],
    evaluation: dict[str, Any],
    words: dict[str, Any],
    drawing: dict[str, Any],
) -> None:
    """Writes metrics, curves, confusion matrix and model card of a fine-tuning; prints the last lines.

    `drawing` holds arguments of `plot_loss_curve`, `words` those of the card and what the run `change`d.
    """
    folder = Path(str(trainer.args.output_dir))
    results = write_results(trainer, train, evaluation)
    title = f"{words['base']} on {words['dataset']}"
    callbacks.plot_loss_curve(trainer.state.log_history, folder / "loss_curve.png", title=title, **drawing)
    adapter = folder if (folder / ADAPTER_CONFIG).is_file() else None
    write_finetuning_card(folder, results, words, is_adapter=adapter is not None)
    lines = finetuned_load_lines(folder.as_posix(), words["task"], words["prompt"], adapter=adapter)
    print(f"{words['change']}\n")
    print_closing(folder, results, "adapter" if adapter else "model", lines)
    if "confusion_matrix" in results:
        plot_confusion(results, folder / "confusion_matrix.png", title)
        if line := check_against_chance(results):
            print(f"\n{line}")


def line_of(texts: Iterable[str]) -> str:
    """The first half of a line of `texts`, as the prompt in the lines of code that load the model."""
    lines = (line.strip()[:LONGEST_PROMPT] for text in texts for line in text.splitlines())
    line = next((line for line in lines if len(line) > 1 and "```" not in line), DEFAULT_PROMPT)
    half = line[: (len(line) + 1) // 2]
    return half.rpartition(" ")[0] or half


def example_of(prompts: Sequence[Any]) -> Any:
    """One of the first 100 `prompts` (texts or messages), short enough for a line of code."""
    return min((prompt for prompt in prompts[:100] if prompt), key=lambda prompt: abs(len(str(prompt)) - 40))


def print_closing(folder: Path, results: Mapping[str, Any], kind: str, lines: str) -> None:
    """Prints the last lines of a training: a time limit that cut it, the metrics, and how to load the result."""
    if results["train_steps"] < results["planned_steps"]:
        print(f"the time limit ended the training after step {steps_taken(results)}")
    print(summary(results))
    print_load_lines(folder, kind, lines)


def print_load_lines(folder: Path, kind: str, lines: str) -> None:
    print(f"\n{folder} holds the {kind}. These lines load and use it:\n\n{lines}")


def procedure(args: TrainingArguments, optimizer: str, block_size: int) -> str:
    """Says how the model was trained, for its card."""
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    schedule = SchedulerType(args.lr_scheduler_type).value
    precision = "bf16 autocast" if args.bf16 else "fp16 autocast" if args.fp16 else "fp32"
    return (
        f"`{optimizer}`, peak learning rate {args.learning_rate:g}, schedule `{schedule}`, weight decay "
        f"{args.weight_decay:g} on matrices only; {rows} rows of {block_size} tokens a step; {precision}; seed "
        f"{args.seed}. Documents that share a row do not see each other."
    )


# metric of all_results.json -> format in the last lines of a training
SHOWN = {
    "eval_loss": "loss {:.3f}",
    "perplexity": "perplexity {:.1f}",
    "eval_bits_per_byte": "{:.3f} bits per byte",
    "xz_bits_per_byte": "{:.3f} of xz -9e",
    "eval_accuracy": "accuracy {:.4f}",
    "eval_f1": "F1 {:.4f}",
    "eval_reward": "reward {:.4f}",
    "eval_kl": "KL {:.4f}",
    "eval_completions/mean_length": "{:.1f} tokens a completion",
    "eval_margin": "margin {:.3f}",
    "eval_rewards/margins": "reward margin {:.3f}",
    "eval_rewards/accuracies": "chosen answer ahead {:.4f}",
}


def summary(results: Mapping[str, Any]) -> str:
    """The metrics in one line."""
    shown = [form.format(results[key]) for key, form in SHOWN.items() if key in results]
    return f"held out: {', '.join(shown) or 'no rows, so nothing is measured'}"
