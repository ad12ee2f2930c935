"""`hf-decoder compare A B`: a person judges two models' answers, blind, in the terminal or on a local page."""

from __future__ import annotations

import gc
import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

from transformers import set_seed

from hf_decoder.cli import (
    check_at_least,
    check_package,
    load_model,
    load_tokenizer,
    mark_of,
    select_device,
    show_progress,
)
from hf_decoder.cli.arguments import takes_argv
from hf_decoder.cli.flags.compare import CompareArguments
from hf_decoder.data.records import read_prompts, read_rows
from hf_decoder.evaluation.batch_generation import Prompt, complete
from hf_decoder.evaluation.blind_comparison import JudgmentFile, Pair, Tally, blind_pairs
from hf_decoder.safety.interrupts import going_on
from hf_decoder.safety.terminal import printable

KEYS = {"1": "left", "l": "left", "2": "right", "r": "right", "t": "tie", "0": "tie", "b": "both_bad"}
NARROWEST = 60
ANSWERS = {"a": "answers_a.jsonl", "b": "answers_b.jsonl"}
JUDGMENTS = "judgments.jsonl"


@takes_argv
def main(args: CompareArguments) -> int:
    """Has both models answer, and asks for judgments until there are no more pairs."""
    for name in ("batch_size", "max_new_tokens"):
        check_at_least(f"--{name}", getattr(args, name), 1)
    if args.web:
        check_package("gradio", "demo")
        from hf_decoder.serving.local_page import free_port

        free_port(args.port)  # before the models answer, which takes longer
    names = _names(args.model_a, args.model_b)
    rows, lines = read_prompts(args.input_file, args.prompt_column)
    print("".join(f"{line}\n" for line in lines), end="")
    with going_on(lambda: _kept(Path(args.output_dir)), args.output_dir):
        _compare(args, names, [row["prompt"] for row in rows])
    return 0


def _kept(folder: Path) -> str:
    """What an interrupt leaves, and how to go on."""
    names = [name for name in (*ANSWERS.values(), JUDGMENTS) if (folder / name).is_file()]
    if not names:
        return "; the same command starts from the beginning"
    return f"; {folder} keeps {', '.join(names)}, and the same command goes on"


def _compare(args: CompareArguments, names: tuple[str, str], prompts: Sequence[Prompt]) -> None:
    file = JudgmentFile(Path(args.output_dir) / JUDGMENTS, names)
    answers = [_answers(args, side, prompts) for side in ANSWERS]
    pairs = blind_pairs([_shown(prompt) for prompt in prompts], *answers, seed=args.seed)
    if not pairs:
        raise ValueError(f"{names[0]} and {names[1]} give the same answer to every prompt: there is nothing to judge")
    if len(pairs) < len(prompts):
        left_out = len(prompts) - len(pairs)
        print(f"{left_out} of {len(prompts)} prompts are left out: the same answer from both, or asked before")
    if done := len(pairs) - len(file.remaining(pairs)):
        print(f"{done} of {len(pairs)} pairs are judged already")
    if others := len(file.judged) - done:
        print(f"{others} judgments in {file.path} are of other answers and do not count")
    try:
        if not file.remaining(pairs):
            pass
        elif args.web:
            from hf_decoder.serving.comparison_page import KEYS_SCRIPT, ComparisonPage
            from hf_decoder.serving.local_page import serve

            with suppress(KeyboardInterrupt):  # the way to end it
                serve(ComparisonPage(file, pairs).build(), args.port, head=KEYS_SCRIPT)
        else:
            judge_in_terminal(file, pairs)
    finally:  # an interrupt loses nothing
        _write_results(args, names, file.tally(pairs))


def _write_results(args: CompareArguments, names: tuple[str, str], tally: Tally) -> None:
    results = {"model_a": names[0], "model_b": names[1], **tally.results()}
    path = Path(args.output_dir) / "compare_results.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print("\n".join(["", *tally.lines(names)]))


def _names(a: str, b: str) -> tuple[str, str]:
    """Short names of the two, as long as they need to be to differ."""
    if a == b:
        raise ValueError(f"A and B are the same, {a}; name two models")
    one, other = Path(a).name, Path(b).name
    return (one, other) if one != other else (a, b)


def _shown(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt)


def _answers(args: CompareArguments, side: str, prompts: Sequence[Prompt]) -> list[str]:
    """The answers of one model: from its file, from an earlier session with the same settings, or asked for now."""
    name = getattr(args, f"model_{side}")
    if name.endswith(".jsonl"):
        return _read_answers(name, prompts)
    settings = {key: getattr(args, key) for key in ("max_new_tokens", "do_sample", "temperature", "stop_strings")}
    kept = Path(args.output_dir) / ANSWERS[side]
    mark = mark_of(name, None, prompts, settings, args.chat, args.seed, args.dtype)
    if kept.is_file():
        found = read_rows(kept)[0].get("settings")
        if found == mark:
            return _read_answers(str(kept), prompts)
        if found is None:
            raise ValueError(f"{kept} is no file of this command, which would replace it; name another --output_dir")
        print(f"{kept} holds answers to other prompts, of other weights or settings: {name} is asked again")
    answers = _ask(args, name, prompts, settings)
    rows = [{"settings": mark, "prompt": p, "completion": c} for p, c in zip(prompts, answers, strict=True)]
    part = kept.with_suffix(".part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.replace(kept)
    return answers


def _read_answers(path: str, prompts: Sequence[Prompt]) -> list[str]:
    rows = read_rows(path)
    if len(rows) != len(prompts):
        raise ValueError(f"{path} has {len(rows):,} answers for {len(prompts):,} prompts; they must be as many")
    for number, (row, prompt) in enumerate(zip(rows, prompts, strict=True), 1):
        if not isinstance(row.get("completion"), str) or row.get("prompt", prompt) != prompt:
            raise ValueError(f"{path}, row {number} is not the completion of prompt {number}")
    return [row["completion"] for row in rows]


def _ask(args: CompareArguments, name: str, prompts: Sequence[Prompt], settings: Mapping[str, Any]) -> list[str]:
    model = load_model(name, trust_remote_code=args.trust_remote_code, dtype=args.dtype)
    model = model.to(select_device(args.device)).eval()
    tokenizer = load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    set_seed(args.seed)
    if args.chat:
        prompts = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
    answers = complete(model, tokenizer, prompts, settings, args.batch_size)
    found = list(show_progress(answers, len(prompts), f"answers of {Path(name).name}"))
    del model
    gc.collect()  # only one of the two at a time
    return found


def judge_in_terminal(file: JudgmentFile, pairs: Sequence[Pair]) -> None:
    """Shows the pairs that are left, one at a time, and reads judgments until `q` or the end of input."""
    print("1: left is better   2: right is better   t: tie   b: both bad")
    print("u: undo the last one   q: stop (nothing judged is lost)")
    while left := file.remaining(pairs):
        print("\n" + "\n".join(side_by_side(left[0], shutil.get_terminal_size().columns)))
        said = _read_key()
        if said == "q":
            return
        if said == "u":
            if file.undo() is None:
                print("nothing was judged since the start")
        else:
            file.add(left[0], KEYS[said])


def _read_key() -> str:
    """The next valid key; the end of input is `q`."""
    while True:
        try:
            said = input("better? [1/2/t/b/u/q] " if sys.stdin.isatty() else "").strip().lower()
        except EOFError:
            return "q"
        if said in (*KEYS, "u", "q"):
            return said
        print(f"{said!r} is none of 1, 2, t, b, u, q")


def side_by_side(pair: Pair, width: int) -> list[str]:
    """The prompt over its two answers in columns, or one under the other where the terminal is narrow."""
    head = ["=" * width, *_wrap(pair.prompt, width), "-" * width]
    if width < NARROWEST:
        return [*head, "[1]", *_wrap(pair.left, width), "-" * width, "[2]", *_wrap(pair.right, width)]
    half = (width - 3) // 2
    columns = zip_longest(["[1]", *_wrap(pair.left, half)], ["[2]", *_wrap(pair.right, half)], fillvalue="")
    return [*head, *(f"{left:<{half}} | {right}".rstrip() for left, right in columns)]


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters; its own line ends stay, what is no text is spelt out."""
    lines: list[str] = []
    for line in printable(text.replace("\r\n", "\n")).expandtabs(4).split("\n"):
        lines += textwrap.wrap(line, width, drop_whitespace=False, replace_whitespace=False) or [""]
    return lines
