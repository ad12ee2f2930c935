"""The flags of `hf-decoder compare`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli.flags import Draws, Loading, flag, needed

DESCRIPTION = "Has two models answer the same prompts and asks, blind, which answer is better."


@dataclass(kw_only=True)
class CompareArguments(Draws, Loading):
    """Which two models, on which prompts."""

    model_a: str = needed(
        "Folder or Hub name of a model; or a .jsonl of its answers, as generate writes it.",
        positional=True,
        metavar="MODEL_A",
    )
    model_b: str = needed("The other one.", positional=True, metavar="MODEL_B")
    input_file: str = needed("Prompts: .jsonl, .csv, .parquet, or text, one a line.")
    prompt_column: str | None = flag(None, "The column that holds the prompt.")
    chat: bool = flag(False, "Put each prompt to the models as a user's turn.")
    web: bool = flag(False, "Judge on a web page of this machine, not in the terminal.")
    port: int = flag(0, "Port of the page; 0 takes any that is free.")
    output_dir: str = flag("runs/compare", "Folder for answers, judgments and results.")
    batch_size: int = flag(8, "Prompts that run together.")
    seed: int = flag(0, "Seed of the draws, of the order and of the sides.")


ARGUMENTS = (CompareArguments,)
