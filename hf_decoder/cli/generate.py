"""`hf-decoder generate`: continues a prompt, chats, or answers a file of prompts, with any causal language model."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer, set_seed

from hf_decoder.cli import (
    DTYPES,
    check_at_least,
    check_choice,
    load_model,
    load_tokenizer,
    name_positionals,
    parse_arguments,
    select_device,
    show_progress,
)
from hf_decoder.completion import (
    DEFAULT_NEW_TOKENS,
    check_ids,
    complete,
    cut_stop,
    encode_prompt,
    end_ids,
    generate_settings,
)
from hf_decoder.examples import Row, read_prompts
from hf_decoder.interrupts import going_on


@dataclass
class GenerateArguments:
    """Which model, what to do, and the settings of `generation_config` to change; the others stay as there."""

    model: str = field(metadata={"help": "Folder or Hub name of a causal language model, or folder of an adapter."})
    prompt: str | None = field(default=None, metadata={"help": "Text to continue."})
    chat: bool = field(
        default=False,
        metadata={"help": "Talk, with history, until an empty line; with --input_file, each prompt is a user's turn."},
    )
    system: str | None = field(default=None, metadata={"help": "System message of --chat."})
    input_file: str | None = field(
        default=None, metadata={"help": "Prompts: .jsonl, .csv, .parquet (prompt or messages), or text, one a line."}
    )
    output_file: str | None = field(
        default=None,
        metadata={
            "help": "Where --input_file's rows go with their `completion`, as JSONL; an existing "
            "one is gone on with, after the rows it holds."
        },
    )
    prompt_column: str | None = field(default=None, metadata={"help": "The column that holds the prompt."})
    batch_size: int = field(default=8, metadata={"help": "Prompts of --input_file that run together."})
    max_new_tokens: int | None = field(
        default=None, metadata={"help": f"Tokens to add, {DEFAULT_NEW_TOKENS} if unset."}
    )
    min_new_tokens: int | None = field(default=None, metadata={"help": "Tokens to add at least."})
    do_sample: bool | None = field(default=None, metadata={"help": "Draw (true) or take the likeliest (false)."})
    temperature: float | None = field(default=None, metadata={"help": "Sharpness of the draw; below 1 is sharper."})
    top_p: float | None = field(
        default=None, metadata={"help": "Draw among the likeliest that hold this probability."}
    )
    top_k: int | None = field(default=None, metadata={"help": "Draw among this many of the likeliest."})
    min_p: float | None = field(
        default=None, metadata={"help": "Draw among those with this share of the likeliest one's probability."}
    )
    repetition_penalty: float | None = field(default=None, metadata={"help": "Above 1 makes repeating less likely."})
    no_repeat_ngram_size: int | None = field(default=None, metadata={"help": "No so many tokens twice in a row."})
    num_beams: int | None = field(default=None, metadata={"help": "Beams of beam search; 1 is none."})
    length_penalty: float | None = field(default=None, metadata={"help": "Above 0 favours longer beams."})
    early_stopping: bool | None = field(default=None, metadata={"help": "End when there are --num_beams answers."})
    stop_strings: list[str] | None = field(default=None, metadata={"help": "Texts that end the answer."})
    seed: int | None = field(default=None, metadata={"help": "Seed of the draws."})
    adapter_name_or_path: str | None = field(default=None, metadata={"help": "PEFT adapter to put on the model."})
    dtype: str = field(default="auto", metadata={"help": f"Type of the weights: {', '.join(DTYPES)}."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; the accelerator if there is one."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the model code of the Hub repository."})


GENERATION_FLAGS = (
    "max_new_tokens",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "no_repeat_ngram_size",
    "num_beams",
    "length_penalty",
    "early_stopping",
    "stop_strings",
)


def main(argv: Sequence[str]) -> int:
    """Parses the flags, loads the model, and continues, chats or answers a file."""
    (args,) = parse_arguments(
        "generate",
        (GenerateArguments,),
        name_positionals(argv, ("--model", "--prompt")),
        "Continues a prompt, chats, or answers a file of prompts.",
    )
    _check(args)
    rows = _read(args) if args.input_file else []
    done = _done(args, rows)
    device = select_device(args.device)
    model = load_model(
        args.model, trust_remote_code=args.trust_remote_code, adapter=args.adapter_name_or_path, dtype=args.dtype
    )
    model = model.to(device).eval()
    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    if args.seed is not None:
        set_seed(args.seed)
    if args.input_file:
        answer_file(model, tokenizer, rows, done, args)
    elif args.chat:
        chat(model, tokenizer, args)
    else:
        stream(model, tokenizer, encode_prompt(tokenizer, args.prompt), args, skip_prompt=False)
    return 0


def _check(args: GenerateArguments) -> None:
    check_choice("--dtype", args.dtype, DTYPES)
    if args.prompt is None and not args.chat and not args.input_file:
        raise ValueError("there is nothing to continue: give a prompt after the model, --input_file, or --chat")
    if args.system is not None and not args.chat:
        raise ValueError("--system is part of a chat; add --chat")
    if (args.input_file is None) != (args.output_file is None):
        raise ValueError("--input_file and --output_file go together")
    if args.input_file and args.prompt is not None:
        raise ValueError("give a prompt or an --input_file, not both")
    for name in ("batch_size", "max_new_tokens", "num_beams"):
        check_at_least(f"--{name}", getattr(args, name), 1)


def _given(args: GenerateArguments) -> dict[str, Any]:
    """The settings that the flags name."""
    return {name: getattr(args, name) for name in GENERATION_FLAGS if getattr(args, name) is not None}


def stream(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    args: GenerateArguments,
    *,
    skip_prompt: bool,
    stop_ids: list[int] | None = None,
) -> str:
    """Continues the token ids of a prompt, printing text as it comes; returns the new text.

    Raises:
        ValueError: if the prompt is too long for the model, or holds an id outside its vocabulary.
    """
    check_ids(model, ids)
    settings = generate_settings(model, tokenizer, len(ids), _given(args))
    if stop_ids:
        settings["eos_token_id"] = stop_ids
    # Beams change their minds, and a stop string is only seen when it is whole: their text is shown at the end.
    beams = settings.get("num_beams") or model.generation_config.num_beams or 1
    streams = beams == 1 and not args.stop_strings
    streamer = TextStreamer(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True) if streams else None
    prompt = torch.tensor([list(ids)], device=model.device)
    with torch.inference_mode():
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), streamer=streamer, **settings)
    completion = cut_stop(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True), args.stop_strings)
    if streamer is None:
        shown = "" if skip_prompt else tokenizer.decode(output[0, : len(ids)], skip_special_tokens=True)
        print(shown + completion)
    return completion


def chat(model: Any, tokenizer: Any, args: GenerateArguments) -> None:
    """Reads turns from standard input and answers each, with the whole conversation as context.

    Raises:
        ValueError: if the tokenizer has no chat template, or one turn alone is too long for the model.
    """
    _check_template(tokenizer, args)
    system = [{"role": "system", "content": args.system}] if args.system else []
    turns: list[dict[str, str]] = []
    stop_ids = end_ids(model, tokenizer, chat=True)
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


def _check_template(tokenizer: Any, args: GenerateArguments) -> None:
    if tokenizer.chat_template is None:
        raise ValueError(f"{args.model} has no chat template, so it cannot chat; give it a prompt to continue instead")


def _read_turn() -> str:
    """The next thing the user says; empty at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return ""


def _fit(
    model: Any,
    tokenizer: Any,
    system: list[dict[str, str]],
    turns: list[dict[str, str]],
) -> list[int]:
    """The conversation as token ids; forgets its oldest exchanges where they leave no room for an answer."""
    limit = getattr(model.config, "max_position_embeddings", None)
    while True:
        ids = encode_prompt(tokenizer, system + turns)
        # An answer gets at least a quarter of the context.
        if limit is None or len(turns) == 1 or len(ids) <= limit - limit // 4:
            return ids
        del turns[:2]


def _read(args: GenerateArguments) -> list[Row]:
    """The rows of --input_file, each with its `prompt`: text, or messages."""
    rows = read_prompts(str(args.input_file), args.prompt_column)
    empty = [number for number, row in enumerate(rows, 1) if not row["prompt"] or not str(row["prompt"]).strip()]
    if empty:
        raise ValueError(f"{args.input_file}: {len(empty):,} of {len(rows):,} prompts are empty, first row {empty[0]}")
    return rows


def _done(args: GenerateArguments, rows: Sequence[Row]) -> int:
    """How many rows --output_file holds already.

    Raises:
        ValueError: if they are not the first rows of --input_file.
    """
    path = Path(str(args.output_file))
    if not args.input_file or not path.exists():
        return 0
    # An interrupted write leaves part of a line behind, which is not counted.
    lines = path.read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines):
        try:
            prompt = json.loads(line)["prompt"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number + 1} is not an answer of this command; name another") from None
        if number >= len(rows) or prompt != rows[number]["prompt"]:
            raise ValueError(f"{path} holds answers to other prompts (line {number + 1}); name another --output_file")
    return len(lines)


def answer_file(model: Any, tokenizer: Any, rows: Sequence[Row], done: int, args: GenerateArguments) -> None:
    """Appends the rows from `done` on, each with its `completion`, to --output_file as they are answered."""
    path = Path(str(args.output_file))
    system = [{"role": "system", "content": args.system}] if args.system else []
    prompts = [row["prompt"] for row in rows[done:]]
    if args.chat:
        _check_template(tokenizer, args)
        prompts = [[*system, {"role": "user", "content": p}] if isinstance(p, str) else system + p for p in prompts]
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = b"\n".join(path.read_bytes().split(b"\n")[:done]) + b"\n" if done else b""
    path.write_bytes(whole)
    answers = complete(model, tokenizer, prompts, _given(args), args.batch_size)
    kept = going_on(lambda: f"; {path} keeps the answers so far, and the same command goes on")
    with kept, path.open("a", encoding="utf-8") as file:
        for row, answer in zip(rows[done:], show_progress(answers, len(prompts), "answers"), strict=True):
            file.write(json.dumps({**row, "completion": answer}, ensure_ascii=False) + "\n")
            file.flush()
    print(f"{path} holds {len(rows):,} answers")
