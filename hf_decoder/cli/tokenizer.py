"""`hf-decoder tokenizer`: trains a tokenizer on the text of `pretrain`, and measures how well it fits."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from hf_decoder.cli.arguments import takes_argv
from hf_decoder.cli.flags.tokenizer import TokenizerArguments
from hf_decoder.data.sources import TextArguments
from hf_decoder.data.tokenization import train_tokenizer
from hf_decoder.data.tokenizer_report import report
from hf_decoder.training import callbacks
from hf_decoder.training.run_rows import held_out_texts, open_text, training_texts


@takes_argv
def main(args: TokenizerArguments, text_args: TextArguments) -> int:
    """Trains, saves and measures the tokenizer."""
    callbacks.check_output_dir(args.output_dir, overwrite=args.overwrite_output_dir)
    seconds: dict[str, float] = {}
    with callbacks.stage("corpus", seconds):
        text = open_text(text_args)
    with callbacks.stage("tokenizer", seconds):
        tokenizer = train_tokenizer(training_texts(text), args.vocab_size, args.tokenizer_type, args.model_max_length)
    with callbacks.stage("report", seconds):
        measured = report(tokenizer, training_texts(text), held_out_texts(text))
    tokenizer.save_pretrained(args.output_dir)
    path = Path(args.output_dir) / "tokenizer_report.json"
    path.write_text(json.dumps({**asdict(measured), **seconds}, indent=2, ensure_ascii=False), encoding="utf-8")
    print("\n".join(["held-out text", *(f"  {line}" for line in measured.lines())]))
    print(f"\n{args.output_dir} holds the tokenizer: AutoTokenizer.from_pretrained({args.output_dir!r})")
    return 0
