"""Sequence classification: predictions, loss, report, and class names beside the checkpoints of adapters.

A whole classifier has its class names in config.json. An adapter has no such file, and must not have one, because
transformers would look for the base's weights there. Its class names are in `LABELS_FILE`, in the form of `id2label`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from hf_decoder.data.label_names import save_label_names


class KeepLabelNames(TrainerCallback):
    """Saves the class names beside the adapter of every checkpoint, so that each can be evaluated alone."""

    def __init__(self, names: Mapping[int, str]):
        self.names = names

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            save_label_names(Path(args.output_dir) / f"checkpoint-{state.global_step}", self.names)


def share_padding(model: Any, tokenizer: Any) -> None:
    """Makes tokenizer and classifier use one pad token, because the classifier reads the last token before padding."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id


def encode_texts(tokenizer: Any, texts: Sequence[str], max_length: int | None) -> list[list[int]]:
    """Token ids of each text, at most the last `max_length`, because the classifier reads the last token."""
    rows = tokenizer(list(texts))["input_ids"]
    return [row[-max_length:] if max_length else row for row in rows]


@torch.inference_mode()
def predict(model: Any, tokenizer: Any, texts: Sequence[str], *, batch_size: int = 8) -> list[int]:
    """The likeliest class id of each text. The model is put into evaluation mode and back."""
    was_training = model.training
    model.eval()
    rows = encode_texts(tokenizer, texts, getattr(model.config, "max_position_embeddings", None))
    classes: list[int] = []
    try:
        for start in range(0, len(rows), batch_size):
            batch = tokenizer.pad({"input_ids": rows[start : start + batch_size]}, return_tensors="pt")
            logits = model(
                input_ids=batch["input_ids"].to(model.device), attention_mask=batch["attention_mask"].to(model.device)
            ).logits
            classes += logits.float().argmax(-1).tolist()
    finally:
        model.train(was_training)
    return classes


def class_loss(
    outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor | int | None = None, smoothing: float = 0.0
) -> torch.Tensor:
    """Mean cross-entropy over the rows of a whole step, for `Trainer(compute_loss_func=...)`.

    The loss of transformers' classifiers is the mean of one batch, and gradient accumulation would add up the means.
    """
    total = torch.nn.functional.cross_entropy(
        outputs["logits"].float(), labels, reduction="sum", label_smoothing=smoothing
    )
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


def class_report(guesses: Sequence[str], labels: Sequence[str], names: Iterable[str]) -> dict[str, Any]:
    """The results of scikit-learn's `confusion_matrix` and `classification_report(output_dict=True)`.

    `labels` of the result are the `names` that occur. Rows of the matrix are labels, columns are guesses.
    """
    names = [name for name in names if name in {*guesses, *labels}]
    place = {name: index for index, name in enumerate(names)}
    matrix = np.zeros((len(names), len(names)), dtype=int)
    np.add.at(matrix, ([place[label] for label in labels], [place[guess] for guess in guesses]), 1)
    hits, guessed, support = matrix.diagonal(), matrix.sum(0), matrix.sum(1)
    measures = {
        "precision": hits / np.maximum(guessed, 1),
        "recall": hits / np.maximum(support, 1),
        "f1-score": 2 * hits / np.maximum(guessed + support, 1),
    }
    report: dict[str, Any] = {
        name: {**{key: float(values[i]) for key, values in measures.items()}, "support": int(support[i])}
        for name, i in place.items()
    }
    report["accuracy"] = float(hits.sum() / support.sum())
    for kind, weights in (("macro avg", None), ("weighted avg", support)):
        means = {key: float(np.average(values, weights=weights)) for key, values in measures.items()}
        report[kind] = {**means, "support": int(support.sum())}
    return {"labels": names, "confusion_matrix": matrix.tolist(), "classification_report": report}


def check_against_chance(report: Mapping[str, Any]) -> str | None:
    """A warning if the accuracy of a `class_report` is no better than always naming the most frequent class, or None.

    It must be 1.64 standard errors higher, which one chance model in twenty exceeds.
    """
    matrix = np.array(report["confusion_matrix"])  # a class may have the name of a measure of the report
    support, count = matrix.sum(1), matrix.sum()
    name, share, found = report["labels"][support.argmax()], support.max() / count, matrix.trace() / count
    if found > share + 1.64 * math.sqrt(share * (1 - share) / count):
        return None
    return (
        f"warning: accuracy {found:.4f} is no better than the most frequent class: always {name!r} would be right for "
        f"{share:.4f} of the {count:,} held-out rows"
    )


def plot_confusion(report: Mapping[str, Any], path: str | Path, title: str) -> None:
    """Draws the confusion matrix of a `class_report`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, matrix = report["labels"], np.array(report["confusion_matrix"])
    size = min(3.5 + 0.45 * len(names), 24)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1), label="share of the label's rows")
    # The name of a class or of a file may hold dollar signs.
    axes.set_xticks(range(len(names)), names, rotation=90 if len(names) > 4 else 0, parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    if len(names) <= 20:
        for (row, column), count in np.ndenumerate(matrix):
            color = "white" if shares[row, column] > 0.6 else "black"
            axes.text(column, row, f"{count:,}", ha="center", va="center", color=color)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("label")
    axes.set_title(title, parse_math=False)
    figure.savefig(path, dpi=120)
