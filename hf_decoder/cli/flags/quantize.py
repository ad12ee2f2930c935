"""The flags of `hf-decoder quantize`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli.flags import CAUSAL_MODEL, flag, needed

DESCRIPTION = "Loads a model in bfloat16 and quantized by each method; measures size, perplexity and decoding speed."


@dataclass(kw_only=True)
class QuantizeArguments:
    """What is quantized, and how it is measured."""

    model_name_or_path: str = needed(f"{CAUSAL_MODEL}.", positional=True, metavar="MODEL")
    validation_file: str = needed("Text to measure perplexity on: .txt, .jsonl, .parquet, or a folder.")
    encoding: str | None = flag(None, "Encoding of text files that are not UTF-8, for example cp1252.")
    methods: list[str] = flag(
        [], "torchao_int8, torchao_int4, bitsandbytes_nf4, ...; if unset, all that are installed."
    )
    output_dir: str | None = flag(None, "Folder to save the model to; takes one method.")


ARGUMENTS = (QuantizeArguments,)
