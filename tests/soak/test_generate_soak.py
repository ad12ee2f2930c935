"""Thousands of generate calls of all kinds: memory stays where it is, and no token differs from the stock class's."""

import gc
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_pairs import new_model, stock_model
from transformers import LlamaForCausalLM

from hf_decoder import HfDecoderForCausalLM

LONGEST_PROMPT, MOST_NEW_TOKENS = 40, 12
UNLIKE_ARGMAX = {"num_beams", "repetition_penalty"}


@pytest.fixture(scope="module")
def models() -> tuple[HfDecoderForCausalLM, LlamaForCausalLM]:
    """Ours and transformers' Llama with the same weights, large enough that the likeliest token is clear."""
    shape = {"vocab_size": 97, "intermediate_size": 48, "max_position_embeddings": 128}
    ours = new_model(**shape, tie_word_embeddings=False).eval()
    for parameter in ours.parameters():
        parameter.data.normal_(0, 0.3)
    return ours, stock_model(ours)


def draw(choose: random.Random) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Left-padded prompts of random lengths, and the settings of one call."""
    lengths = [choose.randint(1, LONGEST_PROMPT) for _ in range(choose.choice((1, 1, 2, 3, 4)))]
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, -length:] = torch.tensor([choose.randrange(2, 97) for _ in range(length)])
        mask[row, -length:] = 1
    settings: dict[str, Any] = {"max_new_tokens": choose.randint(1, MOST_NEW_TOKENS), "do_sample": False}
    kind = choose.choice(("greedy", "greedy", "sample", "sample", "beams", "static", "no cache", "penalty"))
    if kind == "sample":
        settings |= {"do_sample": True, "temperature": choose.uniform(0.5, 1.5), "top_k": choose.choice((0, 5, 50))}
        settings |= {"top_p": choose.choice((0.5, 0.9, 1.0))}
    elif kind == "beams":
        settings |= {"num_beams": choose.randint(2, 3)}
    elif kind == "static":
        settings |= {"cache_implementation": "static", "disable_compile": True}  # compiling takes seconds a shape
    elif kind == "no cache":
        settings |= {"use_cache": False}
    elif kind == "penalty":
        settings |= {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
    return {"input_ids": ids, "attention_mask": mask}, settings


def argmax_loop(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int) -> torch.Tensor:
    """Greedy decoding row by row: no batch, no padding, no cache."""
    width = inputs["input_ids"].shape[1] + new_tokens
    rows = []
    for ids, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True):
        row = ids[mask.bool()][None]
        for _ in range(new_tokens):
            token = model(row, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            row = torch.cat([row, token], 1)
            if token.item() == 1:
                break
        answer = row[0, int(mask.sum()) :]
        padding = torch.zeros(new_tokens - len(answer), dtype=torch.long)
        rows.append(torch.cat([ids, answer, padding]))
    longest = max(len(row) - int((row.flip(0).cumsum(0) == 0).sum()) for row in rows)
    return torch.stack(rows)[:, : max(longest, inputs["input_ids"].shape[1] + 1)][:, :width]


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@torch.inference_mode()
def soak(models, calls: int, seed: int, check_every: int, warm_up: int) -> dict[str, float]:
    """Makes the calls and compares every `check_every`-th; returns the figures."""
    ours, stock = models
    choose = random.Random(seed)
    checked = tokens = 0
    before, started = 0, time.monotonic()
    for number in range(calls):
        if number == warm_up:
            before = resident_bytes()
        inputs, settings = draw(choose)
        torch.manual_seed(number)
        answer = ours.generate(**inputs, **settings)
        tokens += answer.numel() - inputs["input_ids"].numel()
        if number % check_every == 0:
            torch.manual_seed(number)
            expected = stock.generate(**inputs, **settings)
            assert torch.equal(answer, expected), (number, inputs, settings)
            if not settings["do_sample"] and not UNLIKE_ARGMAX & set(settings):
                assert torch.equal(answer, argmax_loop(ours, inputs, settings["max_new_tokens"])), (number, settings)
            checked += 1
    seconds = time.monotonic() - started
    growth = resident_bytes() / before - 1
    return {"checked": checked, "tokens": tokens, "seconds": seconds, "before": before, "growth": growth}


def test_every_kind_of_call_gives_the_tokens_of_the_stock_class(models):
    found = soak(models, calls=60, seed=0, check_every=1, warm_up=40)
    assert found["checked"] == 60


@pytest.mark.soak
def test_twenty_thousand_calls(models, figures):
    calls, warm_up = 20_000, 2_000
    found = soak(models, calls, seed=1, check_every=20, warm_up=warm_up)
    figures(
        f"generate: {calls:,} calls, {found['tokens']:,} tokens in {found['seconds']:,.0f} s; {found['checked']:,} "
        f"calls compared with the stock class, none differed; resident memory {found['before'] / 1e6:,.0f} MB after "
        f"{warm_up:,} calls, {100 * found['growth']:+.2f}% at the end"
    )
    assert abs(found["growth"]) < 0.02
