"""The flags of the verbs, one module per verb. Help and errors come from its `ARGUMENTS` and `DESCRIPTION`.

They are apart from the verbs because these import torch, which nobody should wait for who asks for help. `PARTIAL`: a
verb has the flags of transformers' dataclasses, too; `argument_types(argv)` of its module knows them all.
`WITHOUT_ARGUMENTS`: what a verb runs with that is given nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")
CAUSAL_MODEL = "Folder or Hub name of a causal language model"


def flag(default: Any, help: str, **more: Any) -> Any:
    """A field of a dataclass that is a flag; what `more` may hold is said in `hf_decoder.cli.arguments`."""
    metadata = {"help": help, **more}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def needed(help: str, **more: Any) -> Any:
    """The same without a default."""
    return field(metadata={"help": help, **more})


@dataclass
class Loading:
    """How the model is loaded."""

    dtype: str = flag("auto", "Type of the weights; auto is that of the checkpoint.", choices=DTYPES)
    device: str | None = flag(None, "cpu, cuda, ...; the accelerator if there is one.")
    trust_remote_code: bool = flag(False, "Run the model code of the Hub repository.")


@dataclass
class Answers:
    """How the model answers; what is not given is as its generation_config says."""

    max_new_tokens: int | None = flag(None, "Longest answer, in tokens; 200 if nothing says.")
    stop_strings: list[str] | None = flag(None, "Texts that end an answer.")  # noqa: RUF009  (ruff knows it elsewhere)


@dataclass
class Draws(Answers):
    """How the model answers; what is not given is as its generation_config says."""

    do_sample: bool | None = flag(None, "Draw (true) or take the likeliest (false).")
    temperature: float | None = flag(None, "Sharpness of the draw: below 1 is sharper, 0 takes the likeliest.")
