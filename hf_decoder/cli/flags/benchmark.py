"""The flags of `hf-decoder benchmark`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli.flags import flag

SUITES = ("loss", "train", "packed", "prefill", "generate", "batch", "load")
DESCRIPTION = (
    "Measures our model against transformers' Llama of the same shape and weights: one process, alternating calls, "
    "medians. Results are compared before they are timed. Let nothing else run meanwhile."
)


@dataclass
class BenchmarkArguments:
    """What is measured, and where the results go."""

    suites: list[str] = flag(list(SUITES), f"Which of {', '.join(SUITES)}; all by default.")
    preset: str = flag("30m", "Named model shape; `hf-decoder presets` lists them.")
    config_overrides: str | None = flag(None, "Changes of the preset, `name=value,name=value`, in Llama's fields.")
    vocab_size: int = flag(32000, "Vocabulary of the models.")
    dtype: str = flag(
        "auto", "bfloat16, float16, float32, or auto: bfloat16 where the hardware multiplies it.", metavar="DTYPE"
    )
    device: str = flag("auto", "cpu, cuda, or auto: an accelerator if there is one.")
    repeats: int = flag(5, "Timed calls of each side.")
    json: str | None = flag(None, "File for the results as JSON.", metavar="FILE")
    plot: str | None = flag(None, "File for a bar chart of the ratios, PNG.", metavar="FILE")


ARGUMENTS = (BenchmarkArguments,)
