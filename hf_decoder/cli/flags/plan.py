"""The flags of `hf-decoder plan`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli.flags import flag
from hf_decoder.costs.devices import DEVICES, DEVICES_PER_NODE

STRATEGIES = ("auto", "ddp", "fsdp2", "deepspeed_zero3")
OPTIMIZERS = ("muon_adamw", "adamw_torch")
LONGEST_ROW = 4096
DESCRIPTION = "Plans a training on one device or many. Estimates are for bf16 autocast with fp32 weights."


@dataclass
class PlanArguments:
    """Which model on which devices."""

    preset: str = flag("1b", "Named model shape; `hf-decoder presets` lists what they cost.", positional=True,
                       metavar="PRESET")  # fmt: skip
    vocab_size: int = flag(32768, "Vocabulary of the model.")
    gpu: str = flag("h100", f"Kind of device: {', '.join(DEVICES)}. cpu is this machine.", metavar="KIND")
    gpus: int | None = flag(None, "Devices of all machines; if unset 8, or 1 for a CPU or a Mac.")
    gpu_memory: float | None = flag(None, "GiB of a device, if not what its kind usually has.")
    gpus_per_node: int = flag(DEVICES_PER_NODE, "Devices of one machine.")
    strategy: str = flag("auto", "How the devices share the work.", choices=STRATEGIES)
    block_size: int | None = flag(None, f"Tokens of a row; if unset the context, and at most {LONGEST_ROW}.")
    per_device_train_batch_size: int = flag(1, "Rows of a device in one pass.")
    gradient_accumulation_steps: int = flag(1, "Passes of an optimizer step.")
    gradient_checkpointing: bool | None = flag(
        None, "Recompute activations instead of keeping them; if unset, only where memory needs it."
    )
    optim: str = flag("muon_adamw", "Optimizer.", choices=OPTIMIZERS)
    mfu: float = flag(0.4, "Model FLOPs utilisation to assume.")


ARGUMENTS = (PlanArguments,)
