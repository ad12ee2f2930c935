"""Rows about one forward pass: what must leave the logits as they are, and what must change them.

The model runs in fp32. Two ways to compute the same logits differ by the order of additions. On models of 2M to 125M
parameters that moved the logits by at most 2e-6 of the largest; a wrong mask or position moves them by 1e-2 or more.
`TOLERANCE` lies between.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from hf_decoder.data.packing import IGNORE_INDEX
from hf_decoder.doctor.report import Check, Finding, failed, passed, skipped, warned
from hf_decoder.doctor.subject import Subject, Unloadable
from hf_decoder.safety.quiet import quiet

TOLERANCE = 1e-4
# A row proves nothing if another context moves the logits by less than this, relative to the largest.
MIN_EFFECT = 100 * TOLERANCE
# Libraries of quantized products round their inputs, too. Measured with bitsandbytes: 2.2e-2.
QUANTIZED_TOLERANCE = 5e-2
PADDING = 7
MIN_TOKENS = 12  # of a row that is padded or cut into pieces


def difference(expected: torch.Tensor, found: torch.Tensor) -> float:
    """The largest difference of two logit tensors relative to the largest logit; infinite if one is not finite."""
    gap = (expected.float() - found.float()).abs().max() / expected.float().abs().max().clamp(min=1e-30)
    return float(gap) if bool(gap.isfinite()) else float("inf")


@torch.inference_mode()
def logits_of(subject: Subject, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Logits (B, S, V) without a cache. Arguments that the model's forward does not name are left out."""
    wanted = {"use_cache": False, **kwargs}
    return subject.model(ids, **{name: value for name, value in wanted.items() if subject.accepts(name)}).logits


def has_numbers(subject: Subject) -> bool:
    """Whether the logits of a plain row are finite. Otherwise nothing can be compared."""
    if subject.has_numbers is None:
        subject.has_numbers = bool(logits_of(subject, subject.ids(1)).isfinite().all())
    return subject.has_numbers


def too_short(subject: Subject, least: int = MIN_TOKENS) -> Finding | None:
    """A skip if the model's context has fewer than `least` tokens."""
    tokens = subject.probe_tokens
    return skipped(f"a context of {tokens} tokens is too short to try it") if tokens < least else None


def unproven(subject: Subject, gap: float, what: str) -> Finding | None:
    """A warning if `gap` may be a mistake or the rounding of quantized products."""
    if not (subject.is_quantized and TOLERANCE < gap <= QUANTIZED_TOLERANCE):
        return None
    return warned(
        f"{what}: {gap:.1e} of the largest apart, which may be the rounding of quantized products: not proven",
        "examine the checkpoint that was quantized",
    )


def judge(subject: Subject, gap: float, what: str) -> Finding:
    """Passes a `gap` that rounding explains, if the context matters enough for a mistake to show."""
    if warning := unproven(subject, gap, what):
        return warning
    if not gap <= TOLERANCE:
        return failed(f"{what}: logits differ by {gap:.1e} of the largest; rounding explains {TOLERANCE:.0e}")
    effect = context_effect(subject)
    if effect < MIN_EFFECT:
        return warned(
            f"{what}: logits differ by {gap:.1e}, but another context moves them by only {effect:.1e}: not proven",
            "train the model, which does not use its context yet",
        )
    return passed(f"{what}: logits differ by {gap:.1e} of the largest")


def context_effect(subject: Subject) -> float:
    """How far another first half of a row moves the last token's logits, relative to the largest."""
    if subject.context_effect is None:
        ids = subject.ids(1)
        other = ids.clone()
        half = ids.shape[1] // 2
        other[:, :half] = subject.ids(1, half, seed=1)
        subject.context_effect = difference(logits_of(subject, ids)[:, -1], logits_of(subject, other)[:, -1])
    return subject.context_effect


def check_loads(subject: Subject) -> Finding:
    """Every tensor of the files has a place in the model, every place has a tensor, and the logits are finite."""
    try:
        info = subject.loading_info
    except Unloadable as error:
        return failed(str(error))
    for kind, said in (
        ("missing_keys", "lacks {}, and the model starts with random values there"),
        ("mismatched_keys", "holds {} in another shape than config.json asks for"),
        ("unexpected_keys", "holds {}, which the model has no place for"),
    ):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in info.get(kind) or ())
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return failed("the checkpoint " + said.format(names[0] + more))
    if not has_numbers(subject):
        return failed("the logits are not finite")
    model = subject.model
    return passed(f"{type(model).__name__}, {model.num_parameters():,} parameters")


def check_causal(subject: Subject) -> Finding:
    """A token does not change the logits before it."""
    ids = subject.ids(1)
    half = ids.shape[1] // 2
    other = ids.clone()
    other[:, half:] = subject.ids(1, ids.shape[1] - half, seed=1)
    gap = difference(logits_of(subject, ids)[:, :half], logits_of(subject, other)[:, :half])
    return judge(subject, gap, "other tokens after them")


def check_batching(subject: Subject) -> Finding:
    """Each row of a batch has the same logits as alone."""
    ids = subject.ids(3)
    together = logits_of(subject, ids)
    gap = max(difference(logits_of(subject, ids[i : i + 1]), together[i : i + 1]) for i in range(len(ids)))
    return judge(subject, gap, "three rows together")


def left_padded(subject: Subject, ids: torch.Tensor, lengths: list[int]) -> dict[str, torch.Tensor]:
    """Inputs of `generate`: the first `lengths[i]` tokens of each row, padded on the left."""
    width = max(lengths) + PADDING
    pad = getattr(subject.config.get_text_config(), "pad_token_id", None)
    padded = torch.full((len(ids), width), pad if isinstance(pad, int) and pad >= 0 else int(ids[0, 0]))
    mask = torch.zeros_like(padded)
    for row, length in enumerate(lengths):
        padded[row, width - length :] = ids[row, :length]
        mask[row, width - length :] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": padded, "attention_mask": mask, "position_ids": positions}


def check_padding(subject: Subject) -> Finding:
    """Rows of several lengths, padded on the left, have the same logits as alone."""
    if not subject.accepts("attention_mask"):
        return failed("the model takes no attention_mask")
    if skip := too_short(subject):
        return skip
    longest = subject.probe_tokens - PADDING
    lengths = [longest, longest - 3, longest // 2]
    ids = subject.ids(3, longest)
    inputs = left_padded(subject, ids, lengths)
    found = logits_of(subject, inputs.pop("input_ids"), **inputs)
    gap = max(
        difference(logits_of(subject, ids[i : i + 1, :length]), found[i : i + 1, -length:])
        for i, length in enumerate(lengths)
    )
    return judge(subject, gap, f"up to {longest + PADDING - longest // 2} padding tokens in front")


def check_packing(subject: Subject) -> Finding:
    """Documents packed into one row, told apart by their positions, have the same logits as alone."""
    if not subject.accepts("position_ids"):
        return warned("the class takes no position_ids, so it cannot pack", "pad instead")
    total = subject.probe_tokens
    lengths = [total // 2, total // 3, total - total // 2 - total // 3]
    documents = subject.ids(1).split(lengths, dim=1)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    alone = torch.cat([logits_of(subject, ids) for ids in documents], dim=1)
    ids = torch.cat(documents, dim=1)
    finding = judge(
        subject, difference(alone, logits_of(subject, ids, position_ids=positions)), "three documents in a row"
    )
    if finding.status == "fail" and subject.is_stock_class:
        return warned(f"{finding.detail}; the class cannot pack", "pad instead")
    cached = difference(alone, logits_of(subject, ids, position_ids=positions, use_cache=True))
    if finding.status == "pass" and not cached <= TOLERANCE:
        return warned(
            f"{finding.detail} with use_cache=False; with use_cache=True the documents see each other ({cached:.1e})",
            "train packed rows with use_cache=False",
        )
    return finding


def check_attention(subject: Subject) -> Finding:
    """Eager attention gives the logits of sdpa, with padding and without."""
    model = subject.model
    if model.config._attn_implementation != "sdpa":
        return skipped("the class has no sdpa attention")
    if skip := too_short(subject):
        return skip
    ids = subject.ids(2)
    padded = left_padded(subject, ids, [ids.shape[1] - PADDING, ids.shape[1] // 2])
    padded_ids = padded.pop("input_ids")
    real = padded["attention_mask"].bool()

    def both() -> list[torch.Tensor]:
        return [logits_of(subject, ids), logits_of(subject, padded_ids, **padded)[real]]

    sdpa = both()
    try:
        with quiet():
            model.set_attn_implementation("eager")
        gap = max(difference(one, other) for one, other in zip(sdpa, both(), strict=True))
    finally:
        model.set_attn_implementation("sdpa")
    return judge(subject, gap, "eager")


@torch.no_grad()
def check_loss(subject: Subject) -> Finding:
    """The loss is the next token's cross-entropy without ignored labels, in evaluation and in training mode."""
    model = subject.model
    ids = subject.ids(2)
    labels = ids.clone()
    labels[0, : ids.shape[1] // 2] = IGNORE_INDEX
    logits = logits_of(subject, ids).float()
    expected = functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX
    )
    found = {"evaluation": model(ids, labels=labels).loss}
    values = subject.config.get_text_config().to_dict().items()
    if not any(value for name, value in values if ("drop" in name or name == "z_loss_coef") and type(value) is float):
        model.train()
        try:
            found["training"] = model(ids, labels=labels).loss
        finally:
            model.eval()
    for mode, loss in found.items():
        if loss is None:
            return failed(f"no loss in {mode} mode although labels are given")
        gap = abs(float(loss) - float(expected)) / float(expected)
        if warning := unproven(subject, gap, f"the loss in {mode} mode"):
            return warning
        if not gap <= TOLERANCE:
            return failed(f"the loss in {mode} mode is {float(loss):.5f}; that of the logits is {float(expected):.5f}")
    return passed(f"{float(expected):.4f} in {' and '.join(found)} mode, equal to that of the logits")


CLASS_REMEDY = "the fault is in the class, not in the weights: report it to the author, and until then "

CHECKS = (
    Check(
        "load",
        "loads, and every tensor has its place",
        "the model cannot be used, or computes with untrained weights",
        "save it again with save_pretrained, or copy the files again",
        check_loads,
    ),
    Check(
        "causal",
        "no token sees a later one",
        "training sees the answers, and its loss means nothing",
        CLASS_REMEDY + "do not train or evaluate with it",
        check_causal,
        needs="logits",
    ),
    Check(
        "batching",
        "a row in a batch is as alone",
        "an answer depends on the other rows of its batch",
        CLASS_REMEDY + "run one row at a time",
        check_batching,
        needs="logits",
    ),
    Check(
        "padding",
        "left padding changes nothing",
        "answers to a batch of prompts of different lengths are wrong",
        CLASS_REMEDY + "batch rows of one length only",
        check_padding,
        needs="logits",
    ),
    Check(
        "packing",
        "packed documents do not see each other",
        "training on packed rows learns across documents",
        CLASS_REMEDY + "pad instead of packing",
        check_packing,
        needs="logits",
    ),
    Check(
        "attention",
        "eager attention is sdpa",
        "a tool that chooses another attention gets other results",
        CLASS_REMEDY + "use the attention of its training",
        check_attention,
        needs="logits",
    ),
    Check(
        "loss",
        "loss is next-token cross-entropy",
        "training optimises something else: labels shifted twice or not at all, or masked tokens counted",
        CLASS_REMEDY + "compute the loss from the logits yourself",
        check_loss,
        needs="logits",
    ),
)
