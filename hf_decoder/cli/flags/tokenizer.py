"""The flags of `hf-decoder tokenizer`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli.flags import flag
from hf_decoder.data.sources import TextArguments

TOKENIZER_TYPES = ("bpe", "char")
DESCRIPTION = (
    "Trains a tokenizer from raw text, saves it where every tool of transformers finds it, and measures it on "
    "held-out text. With no arguments: a byte-level BPE of 4096 tokens on the Python standard library."
)


@dataclass
class TokenizerArguments:
    """Which tokenizer."""

    tokenizer_type: str = flag("bpe", "Kind of tokenizer.", choices=TOKENIZER_TYPES)
    vocab_size: int = flag(4096, "Tokens, specials included; char takes what it finds.")
    model_max_length: int | None = flag(None, "Tokens that callers may truncate to.")
    output_dir: str = flag("runs/tokenizer", "Folder for the tokenizer and its report.")
    overwrite_output_dir: bool = flag(False, "Write into a folder that holds something.")


ARGUMENTS = (TokenizerArguments, TextArguments)
