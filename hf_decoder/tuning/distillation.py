"""Trains a student on the next-token distributions of a teacher (Hinton et al. 2015), token chunk by token chunk."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_decoder.data.packing import IGNORE_INDEX
from hf_decoder.model.loss_hf_decoder import softcap

CHUNK_TOKENS = 512  # whose logits, of both models, are held at once
Head = Callable[[torch.Tensor], torch.Tensor]  # hidden states (N, D) -> logits (N, V)


def distillation_loss(
    student: torch.Tensor,
    student_head: Head,
    teacher: torch.Tensor,
    teacher_head: Head,
    targets: torch.Tensor,
    alpha: float,
) -> torch.Tensor:
    """alpha * KL(teacher || student) + (1 - alpha) * cross-entropy, summed over tokens, as fp32.

    The logits of a chunk are formed anew in the backward pass, so that only one chunk's are held at any time.

    Args:
        student, teacher: hidden states (N, D) of either, whose widths may differ.
        student_head, teacher_head: what makes logits of them; of two vocabularies, the shorter one counts.
        targets: ids (N,) of the next tokens.
    """
    total = torch.zeros((), dtype=torch.float32, device=student.device)
    chunks = (part.split(CHUNK_TOKENS) for part in (student, teacher, targets))

    def loss_of(hidden: torch.Tensor, taught: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = student_head(hidden).float()
        loss = (1 - alpha) * nn.functional.cross_entropy(logits, target, reduction="sum")
        with torch.no_grad():
            wanted = teacher_head(taught).float()
        size = min(logits.shape[-1], wanted.shape[-1])
        logs = (logits[:, :size].log_softmax(-1), wanted[:, :size].log_softmax(-1))
        return loss + alpha * nn.functional.kl_div(*logs, reduction="sum", log_target=True)

    for chunk in zip(*chunks, strict=True):
        total = total + checkpoint(loss_of, *chunk, use_reentrant=False)
    return total


def head_of(model: Any, probe: torch.Tensor) -> Head:
    """What makes logits of a model's last hidden states.

    The logits of the ids `probe` (1, S) are compared with those of the model itself.

    Raises:
        ValueError: for a family whose logits are made in another way.
    """
    config = model.config.get_text_config()
    head, cap = model.get_output_embeddings(), getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)

    def logits_of(hidden: torch.Tensor) -> torch.Tensor:
        return softcap(head(hidden) * scale if scale != 1 else head(hidden), cap)

    was_training = model.training
    model.eval()
    with torch.no_grad():
        known = model(input_ids=probe, use_cache=False).logits
        found = logits_of(hidden_states(model, input_ids=probe))
    model.train(was_training)
    if not torch.allclose(found.float(), known.float(), rtol=1e-2, atol=1e-2):
        raise ValueError(f"{type(model).__name__} makes its logits in a way that distillation does not know")
    return logits_of


def hidden_states(model: Any, **inputs: Any) -> torch.Tensor:
    """The last hidden states (B, S, D)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.base_model(**inputs, use_cache=False).last_hidden_state


@functools.cache
def distillation_trainer(sft_trainer: type) -> type:
    """The trainer of SFT, whose training loss is `distillation_loss`. Its evaluation loss stays that of SFT."""

    from trl.models.utils import _ForwardRedirection

    class DistillationTrainer(sft_trainer):  # type: ignore[misc,valid-type]
        def __init__(self, *args, teacher: Any, alpha: float, **kwargs):
            super().__init__(*args, **kwargs)
            self.teacher = teacher.to(self.args.device).eval().requires_grad_(False)
            self.alpha = alpha
            probe = torch.arange(8, device=self.args.device)[None]
            base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
            self._heads = head_of(base, probe), head_of(self.teacher, probe)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            if not self.model.training:
                return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            labels = nn.functional.pad(inputs["labels"], (0, 1), value=IGNORE_INDEX)[:, 1:]
            learned = labels != IGNORE_INDEX
            inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
            with torch.no_grad():
                taught = hidden_states(self.teacher, **inputs)[learned]
            plain = self.accelerator.unwrap_model(model)
            # through the forward of what wraps it, which joins the gradients of several processes
            student = _ForwardRedirection()(model, plain, hidden_states, plain, **inputs)[learned]
            student_head, teacher_head = self._heads
            total = distillation_loss(student, student_head, taught, teacher_head, labels[learned], self.alpha)
            if num_items_in_batch is None:
                return total / learned.sum().clamp(min=1)
            # which counts the tokens of all processes, and their gradients are averaged
            shares = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
            return total * shares / num_items_in_batch

    return DistillationTrainer


def check_teacher(teacher: Any, tokenizer: Any, teacher_tokenizer: Any, texts: Sequence[str], name: str) -> None:
    """Refuses a teacher whose tokens are not those of the student.

    Raises:
        ValueError: naming the teacher.
    """
    same = teacher_tokenizer.get_vocab() == tokenizer.get_vocab()
    if not same or any(teacher_tokenizer(text)["input_ids"] != tokenizer(text)["input_ids"] for text in texts):
        raise ValueError(
            f"--teacher {name} has another tokenizer than the student, so their distributions are of different "
            "tokens; give a teacher of the same tokenizer, or train the student on text that the teacher wrote"
        )
    rows = teacher.get_output_embeddings().weight.shape[0]
    if rows < len(tokenizer):
        raise ValueError(f"--teacher {name} has logits for {rows} tokens, and the tokenizer has {len(tokenizer)}")
