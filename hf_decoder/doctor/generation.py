"""Rows about generation: caches, greedy decoding, and the generation settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig, StaticCache

from hf_decoder.doctor.numerics import (
    CLASS_REMEDY,
    QUANTIZED_TOLERANCE,
    TOLERANCE,
    difference,
    judge,
    left_padded,
    logits_of,
    too_short,
)
from hf_decoder.doctor.report import Check, Finding, failed, passed, skipped
from hf_decoder.doctor.subject import Subject
from hf_decoder.safety.quiet import quiet
from hf_decoder.safety.terminal import first_line

NEW_TOKENS = 12


@torch.inference_mode()
def _cached(subject: Subject, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits with a cache, computed in pieces: many tokens, then single ones, then a few at once."""
    length = ids.shape[1]
    logits, start = [], 0
    for stop in (length - 8, *range(length - 7, length - 2), length):
        outputs = subject.model(ids[:, start:stop], use_cache=True, **{str(subject.cache_argument): cache})
        logits.append(outputs.logits)
        start = stop
    return torch.cat(logits, dim=1)


def check_dynamic_cache(subject: Subject) -> Finding:
    """Calls with a growing cache give the logits of a single call."""
    if subject.cache_argument is None:
        return skipped("the class has no cache of keys and values")
    if skip := too_short(subject):
        return skip
    ids = subject.ids(2)
    found = _cached(subject, ids, DynamicCache(config=subject.model.config))
    return judge(subject, difference(logits_of(subject, ids), found), "DynamicCache, in pieces of 64, 1 and 3 tokens")


def check_static_cache(subject: Subject) -> Finding:
    """Calls with a cache of fixed size, which compiled decoding needs, give the logits of a single call."""
    if subject.cache_argument is None:
        return skipped("the class has no cache of keys and values")
    if not getattr(type(subject.model), "_can_compile_fullgraph", False):
        return skipped("the class does not say that it can be compiled with a static cache")
    if skip := too_short(subject):
        return skip
    ids = subject.ids(2)
    cache = StaticCache(config=subject.model.config, max_cache_len=ids.shape[1] + 5)
    return judge(subject, difference(logits_of(subject, ids), _cached(subject, ids, cache)), "StaticCache")


@contextmanager
def _settings(model: Any, generation_config: GenerationConfig) -> Iterator[None]:
    before = model.generation_config
    model.generation_config = generation_config
    try:
        with quiet():
            yield
    finally:
        model.generation_config = before


def check_generate(subject: Subject) -> Finding:
    """Greedy `generate` of two prompts of different length takes the likeliest token of a plain forward pass."""
    model = subject.model
    if not model.can_generate():
        return failed(f"{type(model).__name__} has no generate()")
    lengths = [subject.probe_tokens - NEW_TOKENS, subject.probe_tokens // 2 - NEW_TOKENS]
    if skip := too_short(subject, 2 * (NEW_TOKENS + 2)):
        return skip
    inputs = left_padded(subject, subject.ids(2), lengths)
    del inputs["position_ids"]
    pad = int(inputs["input_ids"][1, 0])
    with _settings(model, GenerationConfig(pad_token_id=pad)):
        rows = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    width = inputs["input_ids"].shape[1]
    if rows.shape[1] != width + NEW_TOKENS or not torch.equal(rows[:, :width], inputs["input_ids"]):
        return failed(f"asked for {NEW_TOKENS} tokens after a prompt of {width}, it returns {list(rows.shape)}")
    behind = 0.0
    for row, length in zip(rows, lengths, strict=True):
        ids = row[None, width - length :]
        logits = logits_of(subject, ids)[0, length - 1 : -1].float()
        taken = logits.gather(1, ids[0, length:, None])[:, 0]
        gaps = (logits.max(dim=1).values - taken) / logits.abs().max().clamp(min=1e-30)
        limit = QUANTIZED_TOLERANCE if subject.is_quantized else TOLERANCE
        wrong = (~(gaps <= limit)).nonzero().flatten()
        if len(wrong):
            step = int(wrong[0])
            return failed(
                f"token {step + 1} is {int(ids[0, length + step])}; a forward pass over the {length + step} tokens "
                f"before it gives {int(logits[step].argmax())}"
            )
        behind = max(behind, float(gaps.max()))
    return passed(f"2 left-padded rows of {NEW_TOKENS} tokens, each the likeliest of a plain forward pass")


def check_generation_config(subject: Subject) -> Finding:
    """generation_config.json does not contradict itself, and `generate` runs with it."""
    try:
        with quiet():
            config = subject.generation_config
            config.validate(strict=True)
    except Exception as error:
        text = " ".join(str(error).split()).partition("If you're using")[0]
        return failed(f"generation_config.json: {text.strip()}")
    try:
        with _settings(subject.model, config):
            subject.model.generate(subject.ids(1, 4), max_new_tokens=2)
    except Exception as error:
        with _settings(subject.model, GenerationConfig()):
            subject.model.generate(subject.ids(1, 4), max_new_tokens=2)
        return failed(f"generate() fails with the checkpoint's own settings: {first_line(error)}")
    quiet_keys = ("transformers_version", "use_cache", "output_attentions", "output_hidden_states")
    shown = [f"{k}={v}" for k, v in config.to_diff_dict().items() if k not in quiet_keys and not k.startswith("_")]
    return passed(", ".join(shown) or "greedy, nothing set")


CHECKS = (
    Check(
        "dynamic_cache",
        "cached is uncached, growing cache",
        "what generate() writes is not what the model predicts",
        CLASS_REMEDY + "generate with use_cache=False",
        check_dynamic_cache,
        needs="logits",
    ),
    Check(
        "static_cache",
        "cached is uncached, fixed cache",
        "compiled decoding writes something else than the model predicts",
        CLASS_REMEDY + "generate without cache_implementation='static'",
        check_static_cache,
        needs="logits",
        level="default",
    ),
    Check(
        "generate",
        "generate is an argmax loop",
        "greedy decoding does not take the likeliest token",
        CLASS_REMEDY + "write the decoding loop yourself",
        check_generate,
        needs="logits",
    ),
    Check(
        "generation_config",
        "generation settings are valid",
        "generate() warns or fails, and save_pretrained refuses a changed copy",
        "correct generation_config.json until GenerationConfig.from_pretrained(folder).validate(strict=True) passes",
        check_generation_config,
        needs="logits",
    ),
)
