"""`hf-decoder quantize MODEL`: measures every installed quantization method on a checkpoint, or saves one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from hf_decoder.cli import load_model, load_tokenizer
from hf_decoder.cli.arguments import takes_argv
from hf_decoder.cli.flags.quantize import QuantizeArguments
from hf_decoder.data.documents import load_text
from hf_decoder.evaluation import metrics
from hf_decoder.interop import quantization
from hf_decoder.interop.checkpoint import check_absent, written_aside
from hf_decoder.reporting.model_card import write_conversion_card

BLOCK_SIZE = 512


@takes_argv
def main(args: QuantizeArguments) -> int:
    """Prints a line for each method as soon as it is measured."""
    methods = args.methods or [name for name in quantization.METHODS if quantization.installed(name)]
    for method in methods:
        quantization.quantization_config(method)  # checks every name before the first load
    if args.output_dir is not None and len(methods) != 1:
        raise ValueError(f"--output_dir saves one model; give one of --methods {' '.join(methods)}")
    logging.disable_progress_bar()  # of the files that transformers writes
    tokenizer = load_tokenizer(args.model_name_or_path)
    documents = load_text(args.validation_file, encoding=args.encoding, validation_fraction=0)["train"]
    if args.output_dir is None:
        _measure_all(args.model_name_or_path, methods, tokenizer, documents)
    else:
        _save(args, methods[0], tokenizer, documents, Path(args.output_dir).expanduser())
        print(f"{args.output_dir}: {methods[0]}")
    return 0


def _save(args: QuantizeArguments, method: str, tokenizer: Any, documents: Any, destination: Path) -> None:
    """Saves the quantized model and its tokenizer, measures it, and writes a card."""
    check_absent(destination)
    model = _load(args.model_name_or_path, method)  # fresh: bitsandbytes rounds its scales in a forward pass
    folder, kind = Path(args.model_name_or_path).expanduser(), type(model).__name__
    words = {"title": destination.name, "kind": kind, "source_kind": f"`{kind}`", "method": method}
    if folder.is_dir():  # the card shows no path of this machine
        words["source"] = folder.resolve().name
    else:
        words["source"] = words["base_model"] = args.model_name_or_path
    context_length = model.config.max_position_embeddings
    with written_aside(destination, 2 * quantization.tensor_bytes(model)) as aside:
        try:
            model.save_pretrained(aside)
        except ValueError:  # from transformers and torchao
            raise ValueError(f"method {method} cannot be saved; it only works while a model is loaded") from None
        tokenizer.save_pretrained(aside)
        del model
        rows = _measure_all(args.model_name_or_path, [method], tokenizer, documents)
        megabytes = ", ".join(f"{(row.disk_bytes or 0) / 1e6:.1f}" for row in rows)
        measured = {
            f"perplexity on {Path(args.validation_file).name}": ", ".join(f"{row.perplexity:.3f}" for row in rows),
            "weights on disk": f"{megabytes} MB",
        }
        write_conversion_card(
            aside,
            words,
            parameters=rows[0].parameters,
            context_length=context_length,
            measured={f"{what}, in bfloat16 and quantized": value for what, value in measured.items()},
            source_card=folder / "README.md" if folder.is_dir() else None,
        )


def _measure_all(name: str, methods: list[str], tokenizer: Any, documents: Any) -> list[quantization.Measurement]:
    """Measures the model in bfloat16 and by each method, and prints a line for each."""
    print(f"{'method':20}{'on disk':>10}{'in memory':>11}{'perplexity':>12}{'tokens/s':>10}")
    rows = []
    for method in [quantization.NONE, *methods]:
        row = _measure(method, _load(name, method), tokenizer, documents)
        disk = "-" if row.disk_bytes is None else f"{row.disk_bytes / 1e6:.2f} MB"
        memory = f"{row.memory_bytes / 1e6:.2f} MB"
        print(
            f"{row.method:20}{disk:>10}{memory:>11}{row.perplexity:>12.3f}{row.tokens_per_second:>10.1f}", flush=True
        )
        rows.append(row)
    return rows


def _load(name: str, method: str) -> Any:
    config = quantization.quantization_config(method)
    options = {} if config is None else {"quantization_config": config}
    return load_model(name, dtype=torch.bfloat16, **options).eval()


def _measure(method: str, model: Any, tokenizer: Any, documents: Any) -> quantization.Measurement:
    block_size = min(getattr(model.config, "max_position_embeddings", BLOCK_SIZE), BLOCK_SIZE)
    score, _ = metrics.score_text(model, tokenizer, documents, block_size=block_size)
    return quantization.Measurement(
        method,
        model.num_parameters(),
        quantization.disk_bytes(model),
        quantization.tensor_bytes(model),
        metrics.perplexity(score.loss),
        quantization.decoding_speed(model),
    )
