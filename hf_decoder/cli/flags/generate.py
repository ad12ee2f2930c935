"""The flags of `hf-decoder generate`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli.flags import CAUSAL_MODEL, Draws, Loading, flag, needed

DESCRIPTION = (
    "Continues a prompt, answers a file of prompts, or chats: with --chat, or on a terminal without a prompt. In a "
    "chat, /help lists the commands."
)


@dataclass
class Sampling(Draws):
    """How the model answers. What is not given comes from its generation_config."""

    top_p: float | None = flag(None, "Sample from the likeliest tokens that hold this probability together.")
    top_k: int | None = flag(None, "Sample from this many of the likeliest tokens.")
    min_p: float | None = flag(None, "Sample from tokens with at least this share of the likeliest one's probability.")
    repetition_penalty: float | None = flag(None, "Above 1 makes repeating less likely.")
    num_beams: int | None = flag(None, "Beams of beam search; 1 turns it off.")
    seed: int | None = flag(None, "Seed of the samples.")
    min_new_tokens: int | None = flag(None, "Fewest new tokens.", rare=True)
    no_repeat_ngram_size: int | None = flag(None, "Never repeat a sequence of this many tokens.", rare=True)
    length_penalty: float | None = flag(None, "Above 0 favours longer beams.", rare=True)
    early_stopping: bool | None = flag(None, "End as soon as there are --num_beams answers.", rare=True)


@dataclass(kw_only=True)
class GenerateArguments(Sampling, Loading):
    """Which model, and what it answers."""

    model_name_or_path: str = needed(f"{CAUSAL_MODEL}, or folder of an adapter.", positional=True, metavar="MODEL")
    prompt: str | None = flag(None, "Text to continue.", positional=True, metavar="PROMPT")
    chat: bool = flag(False, "Chat with history; with --input_file, each prompt is a user's turn.")
    system: str | None = flag(None, "System message of a chat.")
    input_file: str | None = flag(None, "Prompts: .jsonl, .csv, .parquet (prompt or messages), or text, one a line.")
    output_file: str | None = flag(
        None,
        "JSONL file for --input_file's rows, each with its `completion`, and as `made_with` a digest of model and "
        "settings. The same command continues an existing file.",
    )
    prompt_column: str | None = flag(None, "The column that holds the prompt.")
    batch_size: int = flag(8, "Prompts of --input_file in one batch.")
    adapter_name_or_path: str | None = flag(None, "PEFT adapter to put on the model.")


ARGUMENTS = (GenerateArguments,)
