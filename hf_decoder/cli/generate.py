"""`hf-decoder generate`: continues a prompt, or chats, with any causal language model, printing as it goes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TextStreamer, set_seed

from hf_decoder.cli import (
    DTYPES,
    check_choice,
    load_model,
    load_tokenizer,
    name_positionals,
    parse_arguments,
    select_device,
)

DEFAULT_NEW_TOKENS = 200
END_OF_TURN = "<|im_end|>"


@dataclass
class GenerateArguments:
    """Which model, what to do, and the settings of `generation_config` to change."""

    model: str = field(metadata={"help": "Folder or Hub name of a causal language model."})
    prompt: str | None = field(default=None, metadata={"help": "Text to continue."})
    chat: bool = field(default=False, metadata={"help": "Talk, with history; an empty line or end of input stops."})
    system: str | None = field(default=None, metadata={"help": "System message of --chat."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": f"Tokens to add, {DEFAULT_NEW_TOKENS} if unset."}
    )
    do_sample: bool | None = field(default=None, metadata={"help": "Draw (true) or take the likeliest (false)."})
    temperature: float | None = field(default=None, metadata={"help": "Sharpness of the draw; below 1 is sharper."})
    top_p: float | None = field(
        default=None, metadata={"help": "Draw among the likeliest that hold this probability."}
    )
    top_k: int | None = field(default=None, metadata={"help": "Draw among this many of the likeliest."})
    repetition_penalty: float | None = field(default=None, metadata={"help": "Above 1 makes repeating less likely."})
    num_beams: int | None = field(default=None, metadata={"help": "Beams of beam search; 1 is none."})
    seed: int | None = field(default=None, metadata={"help": "Seed of the draws."})
    dtype: str = field(default="auto", metadata={"help": f"Type of the weights: {', '.join(DTYPES)}."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; the accelerator if there is one."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model code of the Hub repository."})


GENERATION_FLAGS = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty", "num_beams")


def main(argv: Sequence[str]) -> int:
    """Parses the flags, loads the model, and continues or chats."""
    (args,) = parse_arguments(
        "generate",
        (GenerateArguments,),
        name_positionals(argv, ("--model", "--prompt")),
        "Continues a prompt, or chats.",
    )
    check_choice("--dtype", args.dtype, DTYPES)
    if args.prompt is None and not args.chat:
        raise ValueError("there is nothing to continue: give a prompt after the model, or --chat")
    if args.system is not None and not args.chat:
        raise ValueError("--system is part of a chat; add --chat")
    device = select_device(args.device)
    model = load_model(args.model, trust_remote_code=args.trust_remote_code, dtype=args.dtype).to(device).eval()
    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    if args.seed is not None:
        set_seed(args.seed)
    if args.chat:
        chat(model, tokenizer, args)
    else:
        ids = tokenizer(args.prompt, return_tensors="pt")["input_ids"]
        stream(model, tokenizer, ids, args, skip_prompt=False)
    return 0


def stream(
    model: Any,
    tokenizer: Any,
    ids: torch.Tensor,
    args: GenerateArguments,
    *,
    skip_prompt: bool,
    stop_ids: list[int] | None = None,
) -> str:
    """Continues `ids` `[1, prompt]`, printing text as it comes; returns the new text.

    Raises:
        ValueError: if the prompt is empty, too long for the model, or holds an id outside its vocabulary.
    """
    settings = _settings(model, tokenizer, ids, args)
    if stop_ids:
        settings["eos_token_id"] = stop_ids
    # Beams change their minds: their text can only be shown at the end.
    beams = settings.get("num_beams") or model.generation_config.num_beams or 1
    streamer = TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True) if beams == 1 else None
    ids = ids.to(model.device)
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), streamer=streamer, **settings)
    completion = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
    if streamer is None:
        shown = output[0, ids.shape[1] :] if skip_prompt else output[0]
        print(tokenizer.decode(shown, skip_special_tokens=True))
    return completion


def _settings(model: Any, tokenizer: Any, ids: torch.Tensor, args: GenerateArguments) -> dict[str, Any]:
    """Keyword arguments of `generate`: the flags that were given, and what the prompt's length leaves room for."""
    settings = {name: getattr(args, name) for name in GENERATION_FLAGS if getattr(args, name) is not None}
    limit = getattr(model.config, "max_position_embeddings", None)
    length = ids.shape[1]
    if length == 0:
        raise ValueError("the prompt is empty; give at least one character")
    rows = model.get_input_embeddings().num_embeddings
    if int(ids.max()) >= rows:
        raise ValueError(
            f"the tokenizer gives id {int(ids.max())}, but the model's vocabulary has {rows} entries; "
            "use the tokenizer that the model was trained with"
        )
    if limit is not None and length >= limit:
        raise ValueError(f"the prompt has {length} tokens, and max_position_embeddings is {limit}; shorten the prompt")
    wanted = settings.get("max_new_tokens") or model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS
    settings["max_new_tokens"] = wanted if limit is None else min(wanted, limit - length)
    if "temperature" in settings or "top_p" in settings or "top_k" in settings:
        settings.setdefault("do_sample", True)
    if model.generation_config.pad_token_id is None:
        settings["pad_token_id"] = (
            tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        )
    return settings


def chat(model: Any, tokenizer: Any, args: GenerateArguments) -> None:
    """Reads turns from standard input and answers each, with the whole conversation as context.

    Raises:
        ValueError: if the tokenizer has no chat template, or one turn alone is too long for the model.
    """
    if tokenizer.chat_template is None:
        raise ValueError(f"{args.model} has no chat template, so it cannot chat; give it a prompt to continue instead")
    system = [{"role": "system", "content": args.system}] if args.system else []
    turns: list[dict[str, str]] = []
    stop_ids = _stop_ids(model, tokenizer)
    opening = args.prompt
    while True:
        said = opening if opening is not None else _read_turn()
        opening = None
        if not said:
            return
        turns.append({"role": "user", "content": said})
        ids = _fit(model, tokenizer, system, turns)
        answer = stream(model, tokenizer, ids, args, skip_prompt=True, stop_ids=stop_ids)
        turns.append({"role": "assistant", "content": answer})


def _read_turn() -> str:
    """The next thing the user says; empty at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _stop_ids(model: Any, tokenizer: Any) -> list[int]:
    """What ends an answer: the model's own end tokens, and ChatML's end of a turn where the tokenizer has it."""
    ends = model.generation_config.eos_token_id
    ids = set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    vocabulary = tokenizer.get_vocab()
    return sorted(ids | ({vocabulary[END_OF_TURN]} if END_OF_TURN in vocabulary else set()))


def _fit(
    model: Any,
    tokenizer: Any,
    system: list[dict[str, str]],
    turns: list[dict[str, str]],
) -> torch.Tensor:
    """The conversation as ids `[1, prompt]`; forgets its oldest exchanges where they leave no room for an answer."""
    limit = getattr(model.config, "max_position_embeddings", None)
    while True:
        ids = tokenizer.apply_chat_template(
            system + turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        # An answer gets at least a quarter of the context.
        if limit is None or len(turns) == 1 or ids.shape[1] <= limit - limit // 4:
            return ids
        del turns[:2]
