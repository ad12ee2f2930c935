"""The flags of `hf-decoder plan`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli.flags import flag
from hf_decoder.costs.devices import DEVICES, DEVICES_PER_NODE

STRATEGIES = ("auto", "ddp", "fsdp2", "deepspeed_zero3")
OPTIMIZERS = ("muon_adamw", "adamw_torch")
LONGEST_ROW = 4096
DESCRIPTION = "Plans a training on one device or many. The estimates are for bf16 autocast over fp32 weights."


@dataclass
class PlanArguments:
    """Which model on which devices."""

    preset: str = flag("1b", "Named model shape; `hf-decoder presets` lists what they cost.", positional=True,
                       metavar="PRESET")  # fmt: skip
    vocab_size: int = flag(32768, "Vocabulary of the model.")
    gpu: str = flag("h100", f"Kind of device: {', '.join(DEVICES)}. cpu is this machine.", metavar="KIND")
    gpus: int | None = flag(None, "Devices, over all machines; 8 if unset, and 1 of a CPU or a Mac.")
    gpu_memory: float | None = flag(None, "GiB of a device, where it has more or less than its kind usually has.")
    gpus_per_node: int = flag(DEVICES_PER_NODE, "Devices of one machine.")
    strategy: str = flag("auto", "How the devices share the work.", choices=STRATEGIES)
    block_size: int | None = flag(None, f"Tokens of a row; the context, and at most {LONGEST_ROW}, if unset.")
    per_device_train_batch_size: int = flag(1, "Rows of a device in one pass.")
    gradient_accumulation_steps: int = flag(1, "Passes of an optimizer step.")
    gradient_checkpointing: bool | None = flag(
        None, "Form activations again instead of keeping them. By default: if need be."
    )
    optim: str = flag("muon_adamw", "Optimizer.", choices=OPTIMIZERS)
    mfu: float = flag(0.4, "Model FLOPs utilisation to assume.")


ARGUMENTS = (PlanArguments,)
