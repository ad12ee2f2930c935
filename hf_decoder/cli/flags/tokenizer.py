"""The flags of `hf-decoder tokenizer`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli.flags import flag
from hf_decoder.data.sources import TextArguments

TOKENIZER_TYPES = ("bpe", "char")
DESCRIPTION = (
    "Trains a tokenizer from raw text, saves it for transformers, and measures it on held-out text. With no "
    "arguments: a byte-level BPE of 4096 tokens on the Python standard library."
)


@dataclass
class TokenizerArguments:
    """Which tokenizer is trained."""

    tokenizer_type: str = flag("bpe", "Kind of tokenizer.", choices=TOKENIZER_TYPES)
    vocab_size: int = flag(4096, "Tokens, special ones included; char takes all characters of the text.")
    model_max_length: int | None = flag(None, "Length that callers may truncate to, in tokens.")
    output_dir: str = flag("runs/tokenizer", "Folder for the tokenizer and its report.")
    overwrite_output_dir: bool = flag(False, "Write into a folder that is not empty.")


ARGUMENTS = (TokenizerArguments, TextArguments)
