"""The flags of the verbs, one module for each. Help and errors come from its `ARGUMENTS` and `DESCRIPTION`.

The verbs import torch, and help should not wait for that. `PARTIAL` says that the verb also has flags of transformers'
dataclasses, which `argument_types(argv)` of the verb's module names. A verb without arguments runs with
`WITHOUT_ARGUMENTS`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

DTYPES = ("auto", "float32", "bfloat16", "float16")
CAUSAL_MODEL = "Folder or Hub name of a causal language model"


def flag(default: Any, help: str, **more: Any) -> Any:
    """A field of a dataclass that is a flag. `hf_decoder.cli.arguments` lists what `more` may hold."""
    metadata = {"help": help, **more}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def needed(help: str, **more: Any) -> Any:
    """A flag without a default, which must be given."""
    return field(metadata={"help": help, **more})


@dataclass
class Loading:
    """How the model is loaded."""

    dtype: str = flag("auto", "Type of the weights; auto is that of the checkpoint.", choices=DTYPES)
    device: str | None = flag(None, "cpu, cuda, ...; the accelerator if there is one.")
    trust_remote_code: bool = flag(False, "Run the model code of the Hub repository.")


@dataclass
class Answers:
    """How the model answers. What is not given comes from its generation_config."""

    max_new_tokens: int | None = flag(None, "Longest answer, in tokens; 200 if unset.")
    stop_strings: list[str] | None = flag(None, "Texts that end an answer.")  # noqa: RUF009  (ruff knows it elsewhere)


@dataclass
class Draws(Answers):
    """How the model answers. What is not given comes from its generation_config."""

    do_sample: bool | None = flag(None, "Sample (true), or take the likeliest token (false).")
    temperature: float | None = flag(None, "Below 1 sharpens the distribution; 0 takes the likeliest token.")
