"""Rows about training, at level `deep`. They work on copies in memory and in temporary folders."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainingArguments

from hf_decoder.data.packing import IGNORE_INDEX
from hf_decoder.doctor.numerics import CLASS_REMEDY
from hf_decoder.doctor.report import Check, Finding, failed, passed, skipped
from hf_decoder.doctor.subject import Subject
from hf_decoder.safety.quiet import quiet

STEPS = 8
# A finite difference changes the loss by so much: far more than fp32 rounding, too little for curvature.
LOSS_CHANGE = 0.02
SLOPE_TOLERANCE = 0.02
GRADIENT_TOLERANCE = 1e-3


def _fresh(subject: Subject) -> Any:
    """A new copy of the model to train. The examined one is released to free its memory."""
    subject.release_model()
    model, _ = subject.load()
    return model.train()


def _gradients(model: Any, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _gap(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest difference of two sets of tensors, relative to each tensor's largest value, and its name.

    A tensor that is zero up to rounding is compared with 1e-3 of the largest value of all.
    """
    if expected.keys() != found.keys():
        return float("inf"), sorted(expected.keys() ^ found.keys())[0]
    sizes = {name: float(tensor.abs().max()) for name, tensor in expected.items()}
    least = max(1e-3 * max(sizes.values()), 1e-30)
    gaps = {}
    for name, tensor in expected.items():
        gap = float((tensor - found[name]).abs().max()) / max(sizes[name], least)
        gaps[name] = gap if gap == gap else float("inf")
    worst = max(gaps, key=lambda name: gaps[name])
    return gaps[worst], worst


def check_learns(subject: Subject) -> Finding:
    """A few steps of AdamW lower the loss of one batch."""
    ids = subject.ids(4)
    model = _fresh(subject)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = model(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    still = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if still:
        return failed(f"{still[0]} gets no gradient")
    if not losses[-1] < 0.99 * losses[0]:
        return failed(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {STEPS} steps on one batch")
    return passed(f"loss {losses[0]:.3f} -> {losses[-1]:.3f} in {STEPS} steps on one batch")


def check_gradients(subject: Subject) -> Finding:
    """Gradients agree with finite differences of the loss, and with those of eager attention."""
    ids = subject.ids(2)
    model = _fresh(subject)
    model.eval()  # no dropout: the same function each time
    _, gradients = _gradients(model, ids)
    norm = torch.sqrt(sum((g.double().pow(2).sum() for g in gradients.values()), torch.zeros((), dtype=torch.float64)))
    step = LOSS_CHANGE / float(norm)
    losses = []
    with torch.no_grad():
        for sign in (1, -2):
            for name, parameter in model.named_parameters():
                if name in gradients:
                    parameter += sign * step * (gradients[name] / norm).to(parameter.dtype)
            losses.append(float(model(ids, labels=ids, use_cache=False).loss))
        for name, parameter in model.named_parameters():
            if name in gradients:
                parameter += step * (gradients[name] / norm).to(parameter.dtype)
    slope = (losses[0] - losses[1]) / (2 * step)
    if not abs(slope / float(norm) - 1) <= SLOPE_TOLERANCE:
        return failed(f"the loss changes by {slope:.4g} along its gradient of length {float(norm):.4g}")
    said = f"slope {slope / float(norm):.4f} of the gradient's length"
    if model.config._attn_implementation == "sdpa":
        with quiet():
            model.set_attn_implementation("eager")
        gap, where = _gap(gradients, _gradients(model, ids)[1])
        if not gap <= GRADIENT_TOLERANCE:
            return failed(f"with eager attention the gradient of {where} differs by {gap:.1e}")
        said += f"; eager attention within {gap:.0e}"
    return passed(said)


def check_checkpointing(subject: Subject) -> Finding:
    """Gradient checkpointing changes no gradient."""
    if not subject.model.supports_gradient_checkpointing:
        return skipped("the class does not support it")
    ids = subject.ids(2)
    model = _fresh(subject)
    torch.manual_seed(0)
    _, expected = _gradients(model, ids)
    with quiet():
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable()
    torch.manual_seed(0)
    gap, where = _gap(expected, _gradients(model, ids)[1])
    if not gap <= GRADIENT_TOLERANCE:
        return failed(f"the gradient of {where} differs by {gap:.1e}")
    return passed(f"gradients within {gap:.0e}")


class _Rows(torch.utils.data.Dataset):
    """Four rows of several lengths, right-padded to the longest. Padding has no label."""

    def __init__(self, subject: Subject):
        self.ids = subject.ids(4, min(24, subject.probe_tokens))
        self.lengths = [self.ids.shape[1], 5, self.ids.shape[1] // 2, 9]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        mask = (torch.arange(self.ids.shape[1]) < self.lengths[index]).long()
        labels = torch.where(mask.bool(), self.ids[index], IGNORE_INDEX)
        return {"input_ids": self.ids[index], "attention_mask": mask, "labels": labels}


@contextmanager
def _trainer(model: Any, rows: _Rows, folder: str, **kwargs: Any) -> Iterator[Trainer]:
    defaults: dict[str, Any] = {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "save_strategy": "no"}
    args = TrainingArguments(
        folder, report_to="none", use_cpu=True, disable_tqdm=True, logging_strategy="no", **(defaults | kwargs)
    )
    trainer = Trainer(model, args, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    with quiet():
        yield trainer


def check_accumulation(subject: Subject) -> Finding:
    """One step of Trainer gives the same weights for four ragged rows at once and for one row four times."""
    rows = _Rows(subject)
    weights = []
    for batch, times in ((4, 1), (1, 4)):
        model = _fresh(subject)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        shape = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": times}
        with (
            tempfile.TemporaryDirectory() as folder,
            _trainer(model, rows, folder, optim="sgd", learning_rate=1.0, max_steps=1, **shape) as trainer,
        ):
            trainer.train()
        weights.append({name: before[name] - parameter.detach() for name, parameter in model.named_parameters()})
    gap, where = _gap(*weights)
    if not gap <= GRADIENT_TOLERANCE:
        return failed(f"the step of {where} differs by {gap:.1e}")
    return passed(f"1 x 4 and 4 x 1 ragged rows: steps within {gap:.0e}")


def check_resume(subject: Subject) -> Finding:
    """Six steps of Trainer give the same weights as four steps and, after a restart, two more."""
    rows = _Rows(subject)
    results = []
    settings: dict[str, Any] = {"max_steps": 6, "per_device_train_batch_size": 1, "learning_rate": 1e-3}
    for interrupted in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            if interrupted:
                saving = {"save_strategy": "steps", "save_steps": 4}
                with _trainer(_fresh(subject), rows, folder, **settings | saving) as trainer:
                    trainer.train()
            model = _fresh(subject)
            with _trainer(model, rows, folder, **settings) as trainer:
                trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-4" if interrupted else None)
            results.append({name: parameter.detach() for name, parameter in model.named_parameters()})
    for name, expected in results[0].items():
        if not torch.equal(expected, results[1][name]):
            return failed(
                f"{name} differs by {float((expected - results[1][name]).abs().max()):.1e} after a resumed run"
            )
    return passed("4 + 2 steps of AdamW equal 6, bit for bit")


CHECKS = (
    Check(
        "learns",
        "loss falls on one batch",
        "the model does not train",
        "look for parameters without a gradient, and for a loss of other labels",
        check_learns,
        needs="logits",
        level="deep",
    ),
    Check(
        "gradients",
        "gradients are the loss's slope",
        "training does not go downhill",
        CLASS_REMEDY + "train with attn_implementation='eager'",
        check_gradients,
        needs="logits",
        level="deep",
    ),
    Check(
        "checkpointing",
        "gradient checkpointing changes nothing",
        "training with less memory gives another model",
        CLASS_REMEDY + "train without gradient_checkpointing",
        check_checkpointing,
        needs="logits",
        level="deep",
    ),
    Check(
        "accumulation",
        "accumulation 1 x k = k x 1",
        "a smaller machine trains another model: short rows count more",
        CLASS_REMEDY + "accept num_items_in_batch in forward and divide the summed loss by it",
        check_accumulation,
        needs="logits",
        level="deep",
    ),
    Check(
        "resume",
        "resumed is uninterrupted",
        "an interrupted run ends with another model",
        "look for state that is neither a parameter nor a persistent buffer",
        check_resume,
        needs="logits",
        level="deep",
    ),
)
