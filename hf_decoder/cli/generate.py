"""`hf-decoder generate`: continues a prompt, chats, or answers a file of prompts, with any causal language model."""

from __future__ import annotations

import importlib.util
import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteriaList, TextStreamer, set_seed

from hf_decoder.cli import (
    check_at_least,
    did_you_mean,
    load_model,
    load_tokenizer,
    mark_of,
    select_device,
    show_progress,
)
from hf_decoder.cli.arguments import takes_argv
from hf_decoder.cli.flags.generate import GenerateArguments
from hf_decoder.data.records import Row, read_prompts
from hf_decoder.evaluation.batch_generation import (
    check_ids,
    complete,
    cut_stop,
    encode_prompt,
    end_ids,
    generate_settings,
)
from hf_decoder.safety.interrupts import going_on
from hf_decoder.serving.conversation import fit_conversation, untaught_note

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
MARK = "made_with"  # column of an answer: which model and settings it is of


@takes_argv
def main(args: GenerateArguments) -> int:
    """Loads the model, and continues a prompt, chats, or answers a file."""
    talks = args.chat or (args.prompt is None and args.input_file is None and sys.stdin.isatty())
    _check(args, talks=talks)
    rows = _read(args) if args.input_file else []
    mark = mark_of(args.model_name_or_path, args.adapter_name_or_path, _settings(args)) if rows else ""
    done, length = _done(args, rows, mark)
    device = select_device(args.device)
    model = load_model(
        args.model_name_or_path,
        trust_remote_code=args.trust_remote_code,
        adapter=args.adapter_name_or_path,
        dtype=args.dtype,
    )
    model = model.to(device).eval()
    tokenizer = load_tokenizer(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
    if args.seed is not None:
        set_seed(args.seed)
    if args.input_file:
        answer_file(model, tokenizer, rows, args, mark, done, length)
    elif talks:
        Chat(model, tokenizer, args).run()
    else:
        stream(model, tokenizer, encode_prompt(tokenizer, str(args.prompt)), args, skip_prompt=False)
    return 0


def _check(args: GenerateArguments, *, talks: bool) -> None:
    if args.prompt is None and not talks and not args.input_file:
        raise ValueError("there is nothing to continue: give a prompt after the model, --input_file, or --chat")
    if args.system is not None and not talks:
        raise ValueError("--system is part of a chat; add --chat")
    if (args.input_file is None) != (args.output_file is None):
        raise ValueError("--input_file and --output_file go together")
    if args.input_file and args.prompt is not None:
        raise ValueError("give a prompt or an --input_file, not both")
    for name in ("batch_size", "max_new_tokens", "num_beams"):
        check_at_least(f"--{name}", getattr(args, name), 1)


def _given(args: GenerateArguments) -> dict[str, Any]:
    """The generation settings that the flags give."""
    return {name: getattr(args, name) for name in GENERATION_FLAGS if getattr(args, name) is not None}


def stream(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    args: GenerateArguments,
    *,
    skip_prompt: bool,
    **settings: Any,
) -> str:
    """Continues the token ids of a prompt, prints text as it comes, and returns the new text.

    `settings` override those of `args`.

    Raises:
        ValueError: if the prompt is too long for the model, or holds an id outside its vocabulary.
    """
    check_ids(model, ids)
    settings = generate_settings(model, tokenizer, len(ids), _given(args)) | settings
    # Beams may change earlier text, and a stop string is known only when complete: print their text at the end.
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


class Chat:
    """A chat in the terminal. It reads messages and commands, and answers with the whole chat as context.

    Answers go to standard output, all else to standard error.
    """

    COMMANDS = {
        "/help": "lists the commands",
        "/clear": "forgets the chat, but not the system message",
        "/system": "TEXT sets the system message; without TEXT it removes it",
        "/save": "FILE appends the chat to a JSONL file as `messages`, which finetune reads",
        "/exit": "ends the chat, as Ctrl-D does; Ctrl-C stops an answer",
    }

    def __init__(self, model: Any, tokenizer: Any, args: GenerateArguments) -> None:
        """Raises ValueError for a system message without a chat template."""
        self.model, self.tokenizer, self.args = model, tokenizer, args
        self.system, self.turns = args.system, list[dict[str, str]]()
        if args.system is not None:
            _check_template(tokenizer, args)
        self._ends = end_ids(model, tokenizer, chat=True)

    def run(self) -> None:
        """Answers until `/exit` or the end of input."""
        self._introduce()
        said = self.args.prompt
        while said != "/exit":
            try:
                if said:
                    self._take(said)
                said = _read_line().rstrip()
            except KeyboardInterrupt:
                if not sys.stdin.isatty():
                    raise
                said = None
                _note("\n(/exit or Ctrl-D ends the chat)")
            except EOFError:
                return

    def _introduce(self) -> None:
        model, name = self.model, Path(self.args.model_name_or_path).name
        context = getattr(model.config, "max_position_embeddings", None)
        size = f"{model.num_parameters() / 1e6:,.1f}M parameters"
        length = "" if context is None else f", a context of {context:,} tokens"
        kind, dtype = type(model).__name__, str(model.dtype).removeprefix("torch.")
        _note(f"{name}: {kind}, {size}{length}, {dtype} on {model.device}")
        note = untaught_note(self.tokenizer, self.args.model_name_or_path, self.args.adapter_name_or_path)
        if note is not None:
            _note(note)
        _note("/help lists the commands; /exit or Ctrl-D ends.")

    def _take(self, said: str) -> None:
        """Answers a message or runs a command. An error becomes one line."""
        try:
            if said.startswith("/"):
                self._obey(*said.split(maxsplit=1))
            else:
                self._answer(said.lstrip())
        except (ValueError, OSError) as error:
            _note(f"({error})")

    def _obey(self, command: str, value: str = "") -> None:
        if command not in self.COMMANDS:
            raise ValueError(f"{command} is no command{did_you_mean(command, list(self.COMMANDS), '/help')}")
        if command == "/help":
            for name, text in self.COMMANDS.items():
                _note(f"{name:<8} {text}")
        elif command == "/clear":
            _note(f"({len(self.turns)} messages forgotten)")
            self.turns = []
        elif command == "/system":
            _check_template(self.tokenizer, self.args)
            self.system = value or None
            _note("(no system message)" if self.system is None else "(the system message is set)")
        elif command == "/save":
            if not value or not self.turns:
                raise ValueError("there is nothing to save yet" if value else "name the file: /save FILE")
            path = Path(value).expanduser()
            before = path.read_bytes()[-1:] if path.is_file() else b""
            with path.open("a", encoding="utf-8") as file:
                file.write("\n" if before not in (b"", b"\n") else "")  # somebody left it in the middle of a line
                file.write(json.dumps({"messages": self._messages()}, ensure_ascii=False) + "\n")
            _note(f"({len(self.turns)} messages appended to {path})")

    def _messages(self) -> list[dict[str, str]]:
        return [*self._system(), *self.turns]

    def _system(self) -> list[dict[str, str]]:
        return [] if self.system is None else [{"role": "system", "content": self.system}]

    def _answer(self, said: str) -> None:
        """Prints the answer as it comes.

        Raises:
            ValueError: if the message alone is too long for the model. The chat stays as it was.
        """
        ids, kept = fit_conversation(self.model, self.tokenizer, self.system, self.turns, said)
        if len(kept) < len(self.turns):
            _note(f"(the context is full: the {len(self.turns) - len(kept)} oldest messages are forgotten)")
        self.turns = kept
        with _interruptible() as stopped:
            criterion = StoppingCriteriaList([lambda ids, _: torch.full(ids.shape[:1], stopped(), device=ids.device)])
            answer = stream(
                self.model,
                self.tokenizer,
                ids,
                self.args,
                skip_prompt=True,
                eos_token_id=self._ends or None,
                stopping_criteria=criterion,
            )
        if stopped():
            _note("(stopped)")
        self.turns += [{"role": "user", "content": said}, {"role": "assistant", "content": answer}]


@contextmanager
def _interruptible() -> Iterator[Any]:
    """Yields a function that tells whether Ctrl-C came. A second Ctrl-C interrupts at once."""
    event = threading.Event()

    def stop(number: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield event.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _read_line() -> str:
    """Reads the next line; on a terminal with prompt, editing and history. Raises EOFError at the end."""
    if not sys.stdin.isatty():
        return input()
    if importlib.util.find_spec("readline") is not None:
        importlib.import_module("readline")  # changes what `input` does
    return input("> ")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _check_template(tokenizer: Any, args: GenerateArguments) -> None:
    if tokenizer.chat_template is None:
        raise ValueError(f"{args.model_name_or_path} has no chat template, so it takes no messages")


def _read(args: GenerateArguments) -> list[Row]:
    """The rows of --input_file, whose `prompt` is text or messages."""
    rows, lines = read_prompts(str(args.input_file), args.prompt_column)
    for line in lines:
        _note(line)
    empty = [number for number, row in enumerate(rows, 1) if not row["prompt"] or not str(row["prompt"]).strip()]
    if empty:
        raise ValueError(f"{args.input_file}: {len(empty):,} of {len(rows):,} prompts are empty, first row {empty[0]}")
    return rows


def _settings(args: GenerateArguments) -> dict[str, Any]:
    """What the answers to a file depend on beside its prompts and the model."""
    return {**_given(args), **{name: getattr(args, name) for name in ("chat", "system", "seed", "dtype")}}


def _line(row: Row, mark: str, completion: str) -> str:
    """The line of --output_file for an answer, without its end."""
    kept = {column: value for column, value in row.items() if column not in (MARK, "completion")}
    return json.dumps({**kept, MARK: mark, "completion": completion}, ensure_ascii=False)


def _done(args: GenerateArguments, rows: Sequence[Row], mark: str) -> tuple[int, int]:
    """How many answers --output_file holds already, and how many bytes they take.

    Raises:
        ValueError: if they do not answer the first rows of --input_file, or are of another model or other settings.
    """
    path = Path(str(args.output_file))
    if not args.input_file or not path.exists():
        return 0, 0
    if path.samefile(args.input_file):
        raise ValueError(f"--input_file and --output_file are one file, {path}; name another --output_file")
    lines = path.read_bytes().split(b"\n")
    length = 0
    for number, line in enumerate(lines if lines[-1] else lines[:-1]):
        if number >= len(rows):
            raise ValueError(f"{path} holds answers to other prompts (line {number + 1}); name another --output_file")
        try:
            row = json.loads(line)
            prompt, _ = row["prompt"], row["completion"]
        except (ValueError, KeyError, TypeError, RecursionError):
            start = _line(rows[number], mark, "")[:-2].encode()
            if number == len(lines) - 1 and (line.startswith(start) or start.startswith(line)):
                return number, length  # an interrupt left a part of this answer
            raise ValueError(
                f"{path}, line {number + 1} is no answer of this command; name another --output_file"
            ) from None
        if prompt != rows[number]["prompt"]:
            raise ValueError(f"{path} holds answers to other prompts (line {number + 1}); name another --output_file")
        if row.get(MARK) != mark:
            raise ValueError(
                f"{path} holds answers of another model or of other settings (line {number + 1}); name another "
                "--output_file"
            )
        length += len(line) + 1
    return len(lines) - (not lines[-1]), length


def answer_file(
    model: Any, tokenizer: Any, rows: Sequence[Row], args: GenerateArguments, mark: str, done: int, length: int
) -> None:
    """Answers the rows from `done` on; appends each with its `completion` to the first `length` bytes of the file."""
    path = Path(str(args.output_file))
    system = [{"role": "system", "content": args.system}] if args.system else []
    prompts = [row["prompt"] for row in rows[done:]]
    if args.chat:
        _check_template(tokenizer, args)
        prompts = [[*system, {"role": "user", "content": p}] if isinstance(p, str) else system + p for p in prompts]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        with path.open("r+b") as file:
            if done:  # an editor may have left the last line without its end
                file.seek(length - 1)
                file.write(b"\n")
            file.truncate(length)
    answers = complete(model, tokenizer, prompts, _given(args), args.batch_size)
    kept = going_on(lambda: f"; {path} keeps the answers so far, and the same command goes on")
    with kept, path.open("a", encoding="utf-8") as file:
        for row, answer in zip(rows[done:], show_progress(answers, len(prompts), "answers"), strict=True):
            file.write(_line(row, mark, answer) + "\n")
            file.flush()
    print(f"{path} holds {len(rows):,} answers")
