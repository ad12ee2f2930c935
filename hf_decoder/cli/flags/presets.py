"""The flags of `hf-decoder presets`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli.flags import flag

DESCRIPTION = "Lists the presets and their costs."


@dataclass
class PresetsArguments:
    """Which vocabulary, batch and context the costs are for."""

    vocab_size: int = flag(32768, "Vocabulary of the model; small presets usually have a smaller one.")
    per_device_train_batch_size: int = flag(1, "Rows of a training step.")
    block_size: int = flag(1024, "Tokens of a training row, and of the context in serving.")


ARGUMENTS = (PresetsArguments,)
