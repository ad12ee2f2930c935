"""`hf-decoder VERB ...`: finds the verb, runs it, and turns a user's error into one line and exit code 2."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from hf_decoder.safety.interrupts import describe, interrupt, on_signal
from hf_decoder.safety.quiet import silence
from hf_decoder.safety.terminal import guard_streams

VERBS = {
    "pretrain": "train a tokenizer and a language model from raw text",
    "assistant": "every stage from raw text to an assistant: tokenizer, pretrain, finetune, eval, report",
    "tokenizer": "train a tokenizer from raw text and measure how well it fits",
    "eval": "measure a model: perplexity, BLEU, chrF, accuracy, F1, exact match, tasks of lm-evaluation-harness",
    "finetune": "train a model on text, chats, preferences, labels, rewards or a teacher; full or by adapter",
    "crossvalidate": "train a classifier from scratch on all folds but one, measure it on that one, in turn",
    "generate": "continue a prompt, chat, or answer a file of prompts, with a saved model",
    "report": "the page of a run, or of several side by side: what each stage changed, curves, cost, answers",
    "demo": "open a page to talk to a model, or to two side by side",
    "compare": "judge two models' answers blind, in the terminal or on a local page",
    "doctor": "prove a checkpoint row by row: padding, caches, tying, reload, tokenizer, files, export",
    "push": "check a model, upload it to the Hub, and prove that a stranger can load it",
    "convert": "convert a checkpoint from or to another family, or to GGUF or ONNX",
    "quantize": "measure the quantization methods on a model, or save it quantized",
    "serve": "serve a saved model to OpenAI clients, by the server of transformers",
    "benchmark": "measure speed against the stock class of the same shape and weights",
    "presets": "list the named model shapes and what each costs to train and serve",
    "plan": "estimate memory, speed and communication of a training, and print its launch command",
    "env": "print what a bug report needs: versions, hardware, packages, compilers",
}
TRACEBACK_VARIABLE = "HF_DECODER_TRACEBACK"
PASSES_ON = "serve"  # the server that it starts parses its flags
BROKEN_PIPE = 141  # 128 plus the number of the signal, as in a shell


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items()]
    return "\n".join(
        [
            "usage: hf-decoder VERB [options]",
            "",
            *lines,
            "",
            "hf-decoder VERB --help lists the options of a verb. hf-decoder --version prints the version.",
            f"An error is one line; {TRACEBACK_VARIABLE}=1 in the environment shows where it came from.",
        ]
    )


def _fail(name: str, message: str) -> int:
    print(f"{name}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns its exit code.

    The code is 2 for a user's error, 130 for Ctrl-C, 143 for SIGTERM, and 141 if nobody reads the output any more, as
    with `hf-decoder ... | head`.
    """
    guard_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = f"hf-decoder {arguments[0]}" if arguments and arguments[0] in VERBS else "hf-decoder"
    try:
        with on_signal(interrupt):
            try:
                return _answer(arguments)
            finally:
                sys.stdout.flush()
    except BrokenPipeError:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        # The interpreter flushes once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        return _fail(name, str(error) or type(error).__name__)
    except KeyboardInterrupt as stop:
        code, line = describe(stop)
        if line is not None:
            print(f"{name}: {line}", file=sys.stderr)
        return code
    except BaseException as error:
        # Libraries raise anything on a stranger's files. A panic in the Rust part of tokenizers is no Exception.
        is_fault = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not is_fault or os.environ.get(TRACEBACK_VARIABLE):
            raise
        return _fail(name, f"{type(error).__name__}: {error} ({TRACEBACK_VARIABLE}=1 shows where it came from)")


def _answer(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "--help-all"):
        print(_usage())
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb == "--version":
        from hf_decoder import __version__

        print(f"hf-decoder {__version__}")
        return 0
    if verb not in VERBS:
        from hf_decoder.cli.arguments import did_you_mean

        close = did_you_mean(verb, list(VERBS)).partition("; did")[1:]
        raise ValueError(f"unknown verb {verb!r}{''.join(close)}; choose one of: {', '.join(VERBS)}")
    silence()
    if verb == PASSES_ON:
        return _module(verb).main(rest)
    from hf_decoder.cli.arguments import parse_verb

    parsed = parse_verb(verb, rest)  # before the verb is imported, which takes seconds with torch
    return _module(verb).main(*parsed)


def _module(verb: str) -> Any:
    return importlib.import_module(f"hf_decoder.cli.{verb}")


if __name__ == "__main__":
    sys.exit(main())
