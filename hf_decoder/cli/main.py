"""`hf-decoder VERB ...`: finds the verb, runs it, and turns what a user got wrong into one line and exit code 2."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from hf_decoder.noise import silence
from hf_decoder.terminal import guard_streams

VERBS = {
    "pretrain": "train a tokenizer and a language model from raw text",
    "tokenizer": "train a tokenizer from raw text and measure how well it fits",
    "eval": "measure a model: perplexity, bits per byte, BLEU, chrF, accuracy, F1, exact match",
    "finetune": "adapt a model to text, prompts, chats, labels or preferences; full, LoRA, DoRA or QLoRA",
    "crossvalidate": "measure a classifier from scratch on every part of its rows, held out in turn",
    "generate": "continue a prompt, chat, or answer a file of prompts, with a saved model",
    "compare": "judge two models' answers blind, in the terminal or on a local page",
    "doctor": "prove a checkpoint row by row: padding, caches, tying, reload, tokenizer, files, export",
    "push": "check a model, upload it to the Hub, and prove that a stranger can load it",
    "convert": "bring a checkpoint of another family in, or let ours out: a stock class, GGUF",
    "quantize": "measure the quantization methods on a model, or save it quantized",
    "serve": "answer OpenAI clients with a saved model, by the server of transformers",
    "benchmark": "measure speed against the stock class of the same shape and weights",
    "presets": "list the named model shapes and what each costs to train and serve",
    "plan": "memory, speed and communication of a training on many devices, and the command to launch it",
}
TRACEBACK_VARIABLE = "HF_DECODER_TRACEBACK"


def _usage() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {summary}" for verb, summary in VERBS.items()]
    return "\n".join(
        [
            "usage: hf-decoder VERB [options]",
            "",
            *lines,
            "",
            "hf-decoder VERB --help lists the options of a verb.",
            f"An error is one line; {TRACEBACK_VARIABLE}=1 in the environment shows where it came from.",
        ]
    )


def _fail(verb: str, message: str) -> int:
    print(f"hf-decoder {verb}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit code: 0, 2 for an error of the user's, 130 for an interrupt."""
    guard_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    verb, *rest = arguments
    if verb not in VERBS:
        print(f"hf-decoder: error: unknown verb {verb!r}; choose one of: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    silence()
    try:
        # Imported here: most verbs import torch, which the list of verbs should not wait for.
        return importlib.import_module(f"hf_decoder.cli.{verb}").main(rest)
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        return _fail(verb, str(error) or type(error).__name__)
    except KeyboardInterrupt:
        print(f"hf-decoder {verb}: interrupted", file=sys.stderr)
        return 130
    except BaseException as error:
        # What libraries make of a stranger's files; a panic of the Rust parts of tokenizers is no Exception.
        is_fault = isinstance(error, Exception) or type(error).__name__ == "PanicException"
        if not is_fault or os.environ.get(TRACEBACK_VARIABLE):
            raise
        return _fail(verb, f"{type(error).__name__}: {error} ({TRACEBACK_VARIABLE}=1 shows where it came from)")


if __name__ == "__main__":
    sys.exit(main())
