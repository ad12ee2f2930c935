"""Measures of a language model on held-out text: perplexity, bits per byte, and what a compressor needs."""

from __future__ import annotations

import contextlib
import inspect
import lzma
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

IGNORE_INDEX = -100


def perplexity(loss: float) -> float:
    """exp of the mean negative log-likelihood `loss` (nats per token); infinite where that overflows."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def bits_per_byte(total_nats: float, num_bytes: int) -> float:
    """Bits the model needs for one byte of text: `total_nats` / ln 2 / `num_bytes`.

    Unlike perplexity it does not depend on the tokenizer, so models with different vocabularies, and general
    compressors, can be compared on the same text.

    Raises:
        ValueError: if `num_bytes` is not positive.
    """
    if num_bytes <= 0:
        raise ValueError(f"bits per byte need a text of at least one byte, got {num_bytes} bytes")
    return total_nats / math.log(2) / num_bytes


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits per byte that `xz -9e` needs for all `texts` as one UTF-8 stream.

    Raises:
        ValueError: if the texts are empty.
    """
    data = "".join(texts).encode("utf-8")
    if not data:
        raise ValueError("there is no text to compress: every text is empty")
    return 8 * len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)) / len(data)


@dataclass(frozen=True)
class Score:
    """Negative log-likelihood of a text: the sum in nats, and the number of tokens it was summed over."""

    nats: float
    tokens: int

    @property
    def loss(self) -> float:
        """Mean nats per scored token; NaN if no token was scored."""
        return self.nats / self.tokens if self.tokens else math.nan


@torch.no_grad()
def score(
    model: PreTrainedModel,
    rows: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 8,
    autocast_dtype: torch.dtype | None = None,
) -> Score:
    """Sums -ln p(label) over every label of `rows` that the model predicts, exactly, whatever the batch size.

    Args:
        model: a causal language model that returns the mean loss over the labels it is given (any `...ForCausalLM`).
        rows: mappings with `input_ids` and `labels` (both `[block]`, of one length), and `position_ids` where the
            row is packed. Labels are aligned with `input_ids`: the model shifts them. Labels of -100 are not scored,
            and neither is the first of a row, which nothing predicts.
        batch_size: rows per forward pass.
        autocast_dtype: runs the model under autocast in this type; None leaves the model's own.

    Model and tensors are on the model's device; the model is put into evaluation mode and back.
    """
    device = next(model.parameters()).device
    autocast = torch.autocast(device.type, autocast_dtype) if autocast_dtype else contextlib.nullcontext()
    options: dict[str, Any] = {"use_cache": False}
    if "skip_logits" in inspect.signature(type(model).forward).parameters:
        options["skip_logits"] = True  # only the loss is read
    if getattr(model.config, "z_loss_coef", 0.0):
        options["z_loss_coef"] = 0.0  # a term of training, no part of the likelihood
    was_training = model.training
    model.eval()
    nats, tokens = 0.0, 0
    try:
        for batch in _batches(rows, batch_size):
            inputs = {name: column.to(device) for name, column in batch.items()}
            # The mean times the count of its own batch: a mean of batch means would weigh tokens unequally.
            count = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
            if count == 0:
                continue
            with autocast:
                loss = model(**inputs, **options).loss
            nats += float(loss.double()) * count
            tokens += count
    finally:
        model.train(was_training)
    return Score(nats=nats, tokens=tokens)


def _batches(rows: Iterable[Mapping[str, Any]], batch_size: int) -> Iterable[dict[str, torch.Tensor]]:
    """Stacks `batch_size` rows at a time into tensors `[batch, block]` of the columns a causal model takes."""
    batch: list[Mapping[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == batch_size:
            yield _stack(batch)
            batch = []
    if batch:
        yield _stack(batch)


def _stack(batch: list[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    names = [name for name in ("input_ids", "position_ids", "labels") if name in batch[0]]
    return {name: torch.stack([torch.as_tensor(row[name]) for row in batch]) for name in names}
