"""Sequence classification: the label map, and the classes a model finds likeliest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def label_map(labels: Sequence[Any], names: Sequence[str] | None = None) -> dict[str, int]:
    """Label name -> class id: `names` in their order, or the distinct labels, numbers before words, sorted.

    Raises:
        ValueError: for fewer than two classes, a name that comes twice, or a label outside `names`; tells how many.
    """
    found = {str(label) for label in labels}
    if names is None:
        numeric = all(label.lstrip("-").isdigit() for label in found)
        names = sorted(found, key=int) if numeric else sorted(found)
    if len(set(names)) != len(names):
        raise ValueError(f"the label names {', '.join(names)} hold one twice")
    outside = [str(label) for label in labels if str(label) not in set(names)]
    if outside:
        raise ValueError(
            f"{len(outside):,} of {len(labels):,} labels are outside the label map, first {outside[0]!r}; "
            f"the map has: {', '.join(names)}"
        )
    if len(names) < 2:
        raise ValueError(f"classification needs at least two classes, and there is only {', '.join(names) or 'none'}")
    return {name: index for index, name in enumerate(names)}


def encode_texts(tokenizer: Any, texts: Sequence[str], max_length: int | None) -> list[list[int]]:
    """Token ids of each text, its last `max_length` at most: the classifier reads from the last token."""
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
