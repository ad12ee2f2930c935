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
from hf_decoder.interop.checkpoint import check_absent, written_aside
from hf_decoder.modelcard import write_conversion_card

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
    destination = None if args.output_dir is None else Path(args.output_dir).expanduser()
    if destination is not None:
        check_absent(destination)
        if quantization.disk_bytes(_load(args.model, methods[0])) is None:
            raise ValueError(f"method {methods[0]} has no form on disk; it can only be applied on load")
    tokenizer = load_tokenizer(args.model)
    documents = load_text(args.text_file, validation_fraction=0)["train"]
    print(f"{'method':20}{'on disk':>10}{'in memory':>11}{'perplexity':>12}{'tokens/s':>10}")
    rows: dict[str, quantization.Measurement] = {}
    for method in [quantization.NONE, *methods]:
        model = _load(args.model, method)
        rows[method] = row = _measure(method, model, tokenizer, documents)
        disk = "-" if row.disk_bytes is None else f"{row.disk_bytes / 1e6:.2f} MB"
        memory = f"{row.memory_bytes / 1e6:.2f} MB"
        print(
            f"{row.method:20}{disk:>10}{memory:>11}{row.perplexity:>12.3f}{row.tokens_per_second:>10.1f}", flush=True
        )
    if destination is not None:
        del model
        _save(args, methods[0], tokenizer, rows, destination)
        print(f"{args.output_dir}: {methods[0]}")
    return 0


def _save(
    args: QuantizeArguments,
    method: str,
    tokenizer: Any,
    rows: dict[str, quantization.Measurement],
    destination: Path,
) -> None:
    """The model, its tokenizer, and a card with what was measured."""
    model = _load(args.model, method)  # as it is before bitsandbytes rounds its scales in a forward pass
    folder, kind = Path(args.model).expanduser(), type(model).__name__
    words = {"title": destination.name, "kind": kind, "source_kind": f"`{kind}`", "method": method}
    if folder.is_dir():  # a path says where it lies on this machine only
        words["source"] = folder.resolve().name
    else:
        words["source"] = words["base_model"] = args.model
    pair = rows[quantization.NONE], rows[method]
    megabytes = ", ".join(f"{(row.disk_bytes or 0) / 1e6:.1f}" for row in pair)
    measured = {
        f"perplexity on {Path(args.text_file).name}": ", ".join(f"{row.perplexity:.3f}" for row in pair),
        "weights on disk": f"{megabytes} MB",
    }
    with written_aside(destination, 2 * (rows[method].disk_bytes or 0)) as aside:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        write_conversion_card(
            aside,
            words,
            parameters=pair[0].parameters,
            context_length=model.config.max_position_embeddings,
            measured={f"{what}, in bfloat16 and quantized": value for what, value in measured.items()},
            source_card=folder / "README.md" if folder.is_dir() else None,
        )


def _load(name: str, method: str) -> Any:
    config = quantization.quantization_config(method)
    options = {} if config is None else {"quantization_config": config}
    return load_model(name, dtype=torch.bfloat16, **options).eval()


def _measure(method: str, model: Any, tokenizer: Any, documents: Any) -> quantization.Measurement:
    block_size = min(getattr(model.config, "max_position_embeddings", BLOCK_SIZE), BLOCK_SIZE)
    score, _ = evaluation.score_text(model, tokenizer, documents, block_size=block_size)
    return quantization.Measurement(
        method,
        model.num_parameters(),
        quantization.disk_bytes(model),
        quantization.tensor_bytes(model),
        evaluation.perplexity(score.loss),
        quantization.decoding_speed(model),
    )
