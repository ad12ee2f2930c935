"""`hf-decoder quantize MODEL`: every installed method on a checkpoint, what it costs and gives; or one, saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hf_decoder import evaluation, quantization
from hf_decoder.cli import load_model, load_tokenizer, name_positionals, parse_arguments
from hf_decoder.corpus import load_text
from hf_decoder.interop.checkpoint import written_aside

BLOCK_SIZE = 512


@dataclass
class QuantizeArguments:
    """What is quantized, and how it is measured."""

    model: str = field(metadata={"help": "Folder or Hub name of a causal language model."})
    text_file: str = field(metadata={"help": "Text to measure perplexity on: .txt, .jsonl, .parquet, or a folder."})
    methods: list[str] = field(
        default_factory=list,
        metadata={"help": f"Which of {', '.join(quantization.METHODS)}; those that are installed by default."},
    )
    output_dir: str | None = field(default=None, metadata={"help": "Folder to save the model to; takes one method."})


def main(argv: Sequence[str]) -> int:
    """Prints one line a method as soon as it is measured."""
    (args,) = parse_arguments(
        "quantize",
        (QuantizeArguments,),
        name_positionals(argv, ("--model",)),
        "Loads a model in bfloat16 and quantized by each method, and measures size, perplexity and decoding speed.",
    )
    methods = args.methods or [name for name in quantization.METHODS if quantization.installed(name)]
    for method in methods:
        quantization.quantization_config(method)  # all names are checked before the first load
    if args.output_dir is not None and len(methods) != 1:
        raise ValueError(f"--output_dir saves one model; give one of --methods {' '.join(methods)}")
    tokenizer = load_tokenizer(args.model)
    documents = load_text(args.text_file, validation_fraction=0)["train"]
    print(f"{'method':20}{'on disk':>10}{'in memory':>11}{'perplexity':>12}{'tokens/s':>10}")
    for method in [quantization.NONE, *methods]:
        model = _load(args.model, method)
        row = _measure(method, model, tokenizer, documents)
        disk = "-" if row.disk_bytes is None else f"{row.disk_bytes / 1e6:.2f} MB"
        memory = f"{row.memory_bytes / 1e6:.2f} MB"
        print(
            f"{row.method:20}{disk:>10}{memory:>11}{row.perplexity:>12.3f}{row.tokens_per_second:>10.1f}", flush=True
        )
    if args.output_dir is not None:
        if row.disk_bytes is None:
            raise ValueError(f"method {methods[0]} has no form on disk; it can only be applied on load")
        model = _load(args.model, methods[0])  # as it is before bitsandbytes rounds its scales in a forward pass
        destination = Path(args.output_dir).expanduser()
        with written_aside(destination, 2 * row.disk_bytes) as aside:
            model.save_pretrained(aside)
            tokenizer.save_pretrained(aside)
        print(f"{args.output_dir}: {methods[0]}")
    return 0


def _load(name: str, method: str) -> Any:
    config = quantization.quantization_config(method)
    options = {} if config is None else {"quantization_config": config}
    return load_model(name, dtype=torch.bfloat16, **options).eval()


def _measure(method: str, model: Any, tokenizer: Any, documents: Any) -> quantization.Measurement:
    block_size = min(getattr(model.config, "max_position_embeddings", BLOCK_SIZE), BLOCK_SIZE)
    score, _ = evaluation.score_text(model, tokenizer, documents, block_size=block_size)
    return quantization.Measurement(
        method,
        quantization.disk_bytes(model),
        quantization.tensor_bytes(model),
        evaluation.perplexity(score.loss),
        quantization.decoding_speed(model),
    )
