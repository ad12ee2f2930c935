"""What the optimizer does to which parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups: weight matrices, which decay, and all else (embeddings, norms, biases), which does not.

    A table tied to the embeddings counts as an embedding. Parameters that need no gradient are left out.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decay if parameter.ndim >= 2 and id(parameter) not in embeddings else rest).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def optimizer_cls_and_kwargs(
    model: PreTrainedModel, args: TrainingArguments
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """The optimizer that `args.optim` names, over `parameter_groups`: for `Trainer(optimizer_cls_and_kwargs=...)`."""
    optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    kwargs.setdefault("params", parameter_groups(model, args.weight_decay))
    return optimizer_cls, kwargs
