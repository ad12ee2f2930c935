"""Completes many prompts in batches, padded on the left so that an answer does not depend on its neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from jinja2 import TemplateError

DEFAULT_NEW_TOKENS = 200
END_OF_TURN = "<|im_end|>"
DRAWS = frozenset({"temperature", "top_p", "top_k", "min_p"})

Prompt = str | list[dict[str, Any]]


def end_ids(model: Any, tokenizer: Any, *, chat: bool = False) -> list[int]:
    """Ids that end an answer: the model's end tokens, and in a chat the end of a ChatML turn if there is one."""
    ends = model.generation_config.eos_token_id
    ids = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    if chat:  # not by the whole vocabulary, which takes a while to list
        turn = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        ids |= {turn} if turn is not None and turn != tokenizer.unk_token_id else set()
    return sorted(ids)


def encode_prompt(
    tokenizer: Any, prompt: Prompt, tools: Sequence[Any] | None = None, options: Mapping[str, Any] | None = None
) -> list[int]:
    """Encodes a prompt, or renders a conversation with the chat template up to the assistant's answer.

    The template is also given the conversation's `tools`, and `options` of its own.

    Raises:
        ValueError: for an empty prompt, and for a conversation that the chat template rejects, or without a template.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
        # After an end token, which some tokenizers append, the model would start a new text.
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
            ids = ids[:-1]
    else:
        if tokenizer.chat_template is None:
            raise ValueError("the tokenizer has no chat template, so prompts must be text, not messages")
        try:
            settings = {**(options or {}), "tools": tools, "add_generation_prompt": True, "return_dict": True}
            ids = tokenizer.apply_chat_template(prompt, **settings)["input_ids"]
        except TemplateError as error:  # for example one without system messages
            raise ValueError(f"the chat template does not take this conversation: {error}") from None
    if not ids:
        raise ValueError("the prompt is empty; give at least one character")
    return ids


def check_ids(model: Any, ids: Sequence[int]) -> None:
    """Raises ValueError if there are too many ids, or ids without an embedding."""
    rows = model.get_input_embeddings().weight.shape[0]  # an adapter's layer has no num_embeddings
    if max(ids) >= rows:
        raise ValueError(
            f"the tokenizer gives id {max(ids)}, but the model's vocabulary has {rows} entries; "
            "use the tokenizer that the model was trained with"
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    if limit is not None and len(ids) >= limit:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, and max_position_embeddings is {limit}; shorten the prompt"
        )


def generate_settings(model: Any, tokenizer: Any, length: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `generate` for a prompt of `length` tokens.

    They are `given` plus what the model's `generation_config` leaves open. A sampling setting implies `do_sample`. A
    temperature of 0 means greedy decoding, whatever the other sampling settings are.
    """
    settings = {name: value for name, value in given.items() if value is not None}
    if settings.get("temperature") == 0:
        settings = {name: value for name, value in settings.items() if name not in DRAWS} | {"do_sample": False}
    limit = getattr(model.config, "max_position_embeddings", None)
    wanted = settings.get("max_new_tokens", model.generation_config.max_new_tokens)
    wanted = DEFAULT_NEW_TOKENS if wanted is None else wanted
    settings["max_new_tokens"] = wanted if limit is None else min(wanted, limit - length)
    if DRAWS & settings.keys():
        settings.setdefault("do_sample", True)
    if model.generation_config.pad_token_id is None:
        settings["pad_token_id"] = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    if settings.get("stop_strings"):
        settings["tokenizer"] = tokenizer
    return settings


def complete(
    model: Any, tokenizer: Any, prompts: Sequence[Prompt], given: Mapping[str, Any] | None = None, batch_size: int = 8
) -> Iterator[str]:
    """Yields the text of each prompt's completion, as `complete_or_cut`."""
    for text, _ in complete_or_cut(model, tokenizer, prompts, given, batch_size):
        yield text


@torch.inference_mode()
def complete_or_cut(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    given: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    beside: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[tuple[str, bool]]:
    """Yields the completion of each prompt, in order, without the prompt and without a stop string at its end.

    With each comes whether the model ended it, by an end token or a stop string; else the limit of length cut it.

    Args:
        prompts: texts, or lists of chat messages. The end of the turn ends an answer in a chat.
        given: settings of `generate` that differ from the model's generation_config.
        batch_size: most prompts per batch. Neighbours share none where the context leaves their answers unequal room.
            Greedy and beam search answer each prompt as if it were alone, up to rounding; sampling depends on the
            batch.
        beside: for each prompt, its `tools` and its `chat_template_kwargs`, where it has some.

    Raises:
        ValueError: for a prompt that is empty, too long, or outside the model's vocabulary; names its number.
    """
    given = dict(given or {})
    encoded: list[list[int]] = []
    for number, prompt in enumerate(prompts, 1):
        try:
            more = beside[number - 1] if beside else {}
            ids = encode_prompt(tokenizer, prompt, more.get("tools"), more.get("chat_template_kwargs"))
            check_ids(model, ids)
        except ValueError as error:
            raise ValueError(f"prompt {number}: {error}") from None
        encoded.append(ids)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    # how many tokens an answer may have, and what ends it: the same for all prompts of a batch
    ways = [
        (generate_settings(model, tokenizer, len(ids), given)["max_new_tokens"], not isinstance(prompt, str))
        for ids, prompt in zip(encoded, prompts, strict=True)
    ]
    for start, end in _batches(ways, batch_size):
        rows = encoded[start:end]
        length = max(map(len, rows))
        inputs = torch.tensor([[pad] * (length - len(row)) + row for row in rows], device=model.device)
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
        settings = generate_settings(model, tokenizer, length, given)
        ends = end_ids(model, tokenizer, chat=ways[start][1])
        if ends:
            settings.setdefault("eos_token_id", ends)
        output = model.generate(inputs, attention_mask=mask, **settings)
        for row in output[:, length:]:
            text = tokenizer.decode(row, skip_special_tokens=True)
            kept = cut_stop(text, given.get("stop_strings"))
            ended = kept != text or not set(row.tolist()).isdisjoint(_as_list(settings.get("eos_token_id")))
            yield kept, ended


def _batches(ways: Sequence[Any], size: int) -> Iterator[tuple[int, int]]:
    """Start and end of batches of at most `size` neighbours; a batch ends where the way differs."""
    start = 0
    for end in range(1, len(ways) + 1):
        if end == len(ways) or end - start == size or ways[end] != ways[start]:
            yield start, end
            start = end


def _as_list(ids: Any) -> list[int]:
    return list(ids) if isinstance(ids, list | tuple) else [] if ids is None else [ids]


def cut_stop(text: str, stop_strings: str | Sequence[str] | None) -> str:
    """`text` up to the first stop string in it."""
    stops = [stop_strings] if isinstance(stop_strings, str) else stop_strings or []
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
