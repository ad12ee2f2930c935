"""The flags of `hf-decoder presets`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli.flags import flag

DESCRIPTION = "Lists the presets and what they cost."


@dataclass
class PresetsArguments:
    """For which vocabulary, batch and context the costs are computed."""

    vocab_size: int = flag(32768, "Vocabulary; the small presets usually have less.")
    per_device_train_batch_size: int = flag(1, "Rows of a training step.")
    block_size: int = flag(1024, "Tokens of a row, in training and of context in serving.")


ARGUMENTS = (PresetsArguments,)
