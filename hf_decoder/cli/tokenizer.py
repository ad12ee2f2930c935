"""`hf-decoder tokenizer`: trains a tokenizer on the text that `pretrain` would train on, and says how well it fits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from hf_decoder import training
from hf_decoder.cli import parse_arguments
from hf_decoder.preparation import held_out_texts, open_text, training_texts
from hf_decoder.sources import TextArguments
from hf_decoder.tokenization import TOKENIZER_TYPES, train_tokenizer
from hf_decoder.tokenizer_report import report

DESCRIPTION = (
    "Trains a tokenizer from raw text, saves it where every tool of transformers finds it, and measures it on "
    "held-out text. With no arguments: a byte-level BPE of 4096 tokens on the Python standard library."
)


@dataclass
class TokenizerArguments:
    """Which tokenizer."""

    type: str = field(default="bpe", metadata={"help": f"Kind of tokenizer: {', '.join(TOKENIZER_TYPES)}."})
    vocab_size: int = field(default=4096, metadata={"help": "Tokens, specials included; char takes what it finds."})
    model_max_length: int | None = field(default=None, metadata={"help": "Tokens that callers may truncate to."})
    output_dir: str = field(default="runs/tokenizer", metadata={"help": "Folder for the tokenizer and its report."})
    overwrite_output_dir: bool = field(default=False, metadata={"help": "Write into a folder that holds something."})


def main(argv: Sequence[str]) -> int:
    """Trains, saves and reports."""
    args, text_args = parse_arguments("tokenizer", (TokenizerArguments, TextArguments), argv, DESCRIPTION)
    training.check_output_dir(args.output_dir, overwrite=args.overwrite_output_dir)
    seconds: dict[str, float] = {}
    with training.stage("corpus", seconds):
        text = open_text(text_args)
    with training.stage("tokenizer", seconds):
        tokenizer = train_tokenizer(training_texts(text), args.vocab_size, args.type, args.model_max_length)
    with training.stage("report", seconds):
        measured = report(tokenizer, training_texts(text), held_out_texts(text))
    tokenizer.save_pretrained(args.output_dir)
    path = Path(args.output_dir) / "tokenizer_report.json"
    path.write_text(json.dumps({**asdict(measured), **seconds}, indent=2, ensure_ascii=False), encoding="utf-8")
    print("\n".join(["held-out text", *(f"  {line}" for line in measured.lines())]))
    print(f"\n{args.output_dir} holds the tokenizer: AutoTokenizer.from_pretrained({args.output_dir!r})")
    return 0
