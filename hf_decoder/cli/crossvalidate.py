"""`hf-decoder crossvalidate`: trains a classifier from scratch, and measures it on unseen rows, fold by fold."""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hf_decoder.cli import check_training, parse_overrides
from hf_decoder.cli.arguments import takes_argv
from hf_decoder.cli.flags.crossvalidate import CrossvalidateArguments
from hf_decoder.costs import accounting
from hf_decoder.costs.presets import get_preset
from hf_decoder.data import records
from hf_decoder.data.label_names import label_map
from hf_decoder.evaluation.classification import check_against_chance, class_report, plot_confusion
from hf_decoder.evaluation.metrics import accuracy
from hf_decoder.reporting.loading_lines import classifier_load_lines
from hf_decoder.reporting.model_card import write_finetuning_card
from hf_decoder.safety.interrupts import going_on
from hf_decoder.training import callbacks
from hf_decoder.training.run_report import example_of, print_load_lines
from hf_decoder.tuning import crossvalidation

RESULTS, PREDICTIONS = "crossvalidation_results.json", "predictions.jsonl"


@takes_argv
def main(args: CrossvalidateArguments) -> int:
    """Runs the folds."""
    crossvalidate(args)
    return 0


def crossvalidate(args: CrossvalidateArguments) -> dict[str, Any]:
    """Runs the missing folds, prints each and the mean, and writes results and predictions.

    Raises:
        ValueError: for what the user can get wrong, before training starts.
    """
    check_training(args)
    for name in ("dropout", "pretraining_dropout", "word_dropout"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least 0 and below 1")
    if not 0 <= args.teacher_weight <= 1:
        raise ValueError(f"--teacher_weight {args.teacher_weight} must be between 0 and 1")
    recipe = _recipe(args)
    named = {"text": args.text_column, "label": args.label_column}
    selected = records.select_columns(records.read_rows(args.train_file), "classification", named, args.train_file)
    if selected.unused:
        print(f"warning: {args.train_file}: {records.describe_unused(selected.unused)}")
    rows, skipped = records.drop_unusable(selected)
    if skipped.reasons:
        print(f"warning: {args.train_file}: {skipped}")
    label2id = label_map([row["label"] for row in rows])
    folds = crossvalidation.fold_of_each([row["label"] for row in rows], args.num_folds, args.seed)
    folder = Path(args.output_dir)
    settings = {"rows": len(rows), "content": _digest(rows), "num_folds": args.num_folds, **asdict(recipe)}
    done, lines, model = _results_so_far(folder, settings, overwrite=args.overwrite_output_dir)
    callbacks.keep_freed_memory()
    logging.set_verbosity_error()

    def kept() -> str:
        if not done:
            return " before the first fold was complete; the same command starts from the beginning"
        return f"; {folder} keeps {len(done)} of {args.num_folds} folds; the same command goes on"

    with going_on(kept, folder):
        for fold in range(len(done), min(args.num_folds, args.max_folds or args.num_folds)):
            train = [row for row, of in zip(rows, folds, strict=True) if of != fold]
            held_out = [row for row, of in zip(rows, folds, strict=True) if of == fold]
            result, predicted = _run_fold(train, held_out, label2id, recipe, folder)
            done.append({"fold": fold, **result})
            lines += [{"fold": fold, **line} for line in predicted]
            _write(folder, settings, done, lines, {"model": model})
            shown = [f"{kind} {done[-1][kind]:.4f}" for kind in ("accuracy", "baseline_accuracy") if kind in done[-1]]
            print(f"fold {fold + 1} of {args.num_folds}: {', '.join(shown)}, {done[-1]['seconds']:.0f} s", flush=True)
        if model is None:
            print(f"training on all {len(rows):,} rows", flush=True)
            model = _train_on_all(args, rows, label2id, recipe)
        report = class_report([line["prediction"] for line in lines], [line["label"] for line in lines], label2id)
        results = _write(folder, settings, done, lines, {"model": model, **report})
    for kind in ("accuracy", "baseline_accuracy"):
        if kind in results:
            print(f"{kind} {results[kind]:.4f}, mean of {len(done)} folds")
    _show(args, results, example_of([row["text"] for row in rows]))
    return results


def _recipe(args: CrossvalidateArguments) -> crossvalidation.Recipe:
    return crossvalidation.Recipe(
        shape={**get_preset(args.preset), **parse_overrides(args.config_overrides)},
        vocab_size=args.vocab_size,
        pretraining_epochs=args.pretraining_epochs,
        pretraining_learning_rate=args.pretraining_learning_rate,
        pretraining_dropout=args.pretraining_dropout,
        num_train_epochs=args.num_train_epochs,
        learning_rate=args.learning_rate,
        dropout=args.dropout,
        word_dropout=args.word_dropout,
        teacher_weight=args.teacher_weight,
        batch_size=args.per_device_train_batch_size,
        seed=args.seed,
    )


def _train_on_all(
    args: CrossvalidateArguments, rows: list[records.Row], label2id: dict[str, int], recipe: crossvalidation.Recipe
) -> dict[str, Any]:
    """Trains the final classifier on all rows, saves it, and returns its sizes."""
    folder, start = Path(args.output_dir), time.perf_counter()
    history: list[dict[str, Any]] = []
    model, tokenizer = crossvalidation.train_classifier(rows, label2id, recipe, str(folder), history)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    unit = "cross-entropy" + (" and distance to the teacher" if recipe.teacher_weight else "")
    title = f"a new {args.preset} model on all of {Path(args.train_file).name}"
    callbacks.plot_loss_curve(history, folder / "loss_curve.png", title=title, unit=unit)
    return {
        "train_rows": len(rows),
        "parameters": model.num_parameters(),
        "trainable_parameters": model.num_parameters(),
        "train_runtime": time.perf_counter() - start,
        "peak_memory_bytes": accounting.peak_memory_bytes(),
    }


def _show(args: CrossvalidateArguments, results: dict[str, Any], text: str) -> None:
    """Draws the confusion matrix, writes the model card, and prints the last lines."""
    folder, name, folds = Path(args.output_dir), Path(args.train_file).name, len(results["folds"])
    title = f"{name}, held out in {folds} of {args.num_folds} folds"
    plot_confusion(results, folder / "confusion_matrix.png", title)
    means = results["classification_report"]["macro avg"]
    measured = {"eval_accuracy": results["accuracy"], "eval_f1": means["f1-score"], "eval_rows": means["support"]}
    words = {"task": "classification", "base": f"a new {args.preset} model", "dataset": name, "prompt": text}
    words["method"] = (
        f"all parameters; measured on {folds} of {args.num_folds} folds, each by a model trained on the others"
    )
    write_finetuning_card(folder, {**results["model"], **measured, **accounting.hardware()}, words, is_adapter=False)
    print(f"{folder} holds {RESULTS}, confusion_matrix.png and {PREDICTIONS}")
    print_load_lines(folder, "model, trained on all rows", classifier_load_lines(folder.as_posix(), text))
    if line := check_against_chance(results):
        print(f"\n{line}")


def _run_fold(
    train: list[records.Row],
    held_out: list[records.Row],
    label2id: dict[str, int],
    recipe: crossvalidation.Recipe,
    folder: Path,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Trains on `train`; returns the measures on `held_out`, and a line of predictions.jsonl for each of its rows."""
    labels = [str(row["label"]) for row in held_out]
    start, cpu = time.perf_counter(), time.process_time()
    model, tokenizer = crossvalidation.train_classifier(train, label2id, recipe, str(folder))
    guesses = crossvalidation.predicted_labels(model, tokenizer, held_out)
    result: dict[str, Any] = {"accuracy": accuracy(guesses, labels), "parameters": model.num_parameters()}
    result |= {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu}
    lines = [
        {"text": row["text"], "label": label, "prediction": guess}
        for row, label, guess in zip(held_out, labels, guesses, strict=True)
    ]
    baseline = crossvalidation.bag_of_words(train, held_out)
    if baseline is not None:
        result["baseline_accuracy"] = accuracy(baseline, labels)
        lines = [{**line, "baseline": guess} for line, guess in zip(lines, baseline, strict=True)]
    return result, lines


def _results_so_far(
    folder: Path, settings: dict[str, Any], *, overwrite: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any] | None]:
    """The folds that an earlier run with the same rows and settings measured, their predictions, and the sizes of its
    final model, if any.

    Raises:
        ValueError: if the folder holds something else.
    """
    path, predictions = folder / RESULTS, folder / PREDICTIONS
    callbacks.check_output_dir(folder, overwrite=overwrite or path.is_file())
    if overwrite:
        path.unlink(missing_ok=True)
        predictions.unlink(missing_ok=True)
    if not path.is_file():
        return [], [], None
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        same, folds = earlier["settings"] == settings, list(earlier["folds"])
        # read by line feeds: a text may hold other ends of lines
        lines = [json.loads(line) for line in records.read_lines(predictions)]
        lines = [line for line in lines if line["fold"] < len(folds)]  # not of a fold whose result was not written
        whole = {line["fold"] for line in lines} == set(range(len(folds)))
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} and {PREDICTIONS} are no results of this command; name another --output_dir")
    if not same:
        raise ValueError(
            f"--output_dir {folder} holds a run with other rows or settings, or of an older version; give "
            "--overwrite_output_dir to replace it, or another --output_dir"
        )
    return folds, lines, earlier.get("model")


def _digest(rows: list[records.Row]) -> str:
    """Tells the rows apart from others, and from the same texts with other labels."""
    content = json.dumps([(row["text"], str(row["label"])) for row in rows])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _write(
    folder: Path,
    settings: dict[str, Any],
    folds: list[dict[str, Any]],
    lines: list[dict[str, Any]],
    more: dict[str, Any],
) -> dict[str, Any]:
    """Writes the predictions and then the results; a kill leaves those of before, or both."""
    means = {
        kind: statistics.fmean(fold[kind] for fold in folds)
        for kind in ("accuracy", "baseline_accuracy")
        if all(kind in fold for fold in folds)
    }
    results = {
        "settings": settings,
        "folds": folds,
        **means,
        **more,
        **accounting.hardware(),
        "threads": torch.get_num_threads(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        PREDICTIONS: "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines),
        RESULTS: json.dumps(results, indent=2) + "\n",
    }
    for name, text in texts.items():
        part = folder / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(folder / name)
    return results
