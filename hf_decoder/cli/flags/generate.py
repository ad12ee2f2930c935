"""The flags of `hf-decoder generate`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli.flags import CAUSAL_MODEL, Draws, Loading, flag, needed

DESCRIPTION = (
    "Continues a prompt, answers a file of prompts, or talks: without a prompt on a terminal, and with --chat. "
    "/help lists what a talk understands besides messages."
)


@dataclass
class Sampling(Draws):
    """How the model answers; what is not given is as its generation_config says."""

    top_p: float | None = flag(None, "Draw among the likeliest that hold this probability.")
    top_k: int | None = flag(None, "Draw among this many of the likeliest.")
    min_p: float | None = flag(None, "Draw among those with this share of the likeliest one's probability.")
    repetition_penalty: float | None = flag(None, "Above 1 makes repeating less likely.")
    num_beams: int | None = flag(None, "Beams of beam search; 1 is none.")
    seed: int | None = flag(None, "Seed of the draws.")
    min_new_tokens: int | None = flag(None, "Tokens to add at least.", rare=True)
    no_repeat_ngram_size: int | None = flag(None, "No so many tokens twice in a row.", rare=True)
    length_penalty: float | None = flag(None, "Above 0 favours longer beams.", rare=True)
    early_stopping: bool | None = flag(None, "End when there are --num_beams answers.", rare=True)


@dataclass(kw_only=True)
class GenerateArguments(Sampling, Loading):
    """Which model, and what it answers."""

    model_name_or_path: str = needed(f"{CAUSAL_MODEL}, or folder of an adapter.", positional=True, metavar="MODEL")
    prompt: str | None = flag(None, "Text to continue.", positional=True, metavar="PROMPT")
    chat: bool = flag(False, "Talk, with history; with --input_file, each prompt is a user's turn.")
    system: str | None = flag(None, "System message of a talk.")
    input_file: str | None = flag(None, "Prompts: .jsonl, .csv, .parquet (prompt or messages), or text, one a line.")
    output_file: str | None = flag(
        None,
        "Where --input_file's rows go with their `completion`, as JSONL; an existing one is gone on with, after the "
        "rows it holds.",
    )
    prompt_column: str | None = flag(None, "The column that holds the prompt.")
    batch_size: int = flag(8, "Prompts of --input_file that run together.")
    adapter_name_or_path: str | None = flag(None, "PEFT adapter to put on the model.")


ARGUMENTS = (GenerateArguments,)
