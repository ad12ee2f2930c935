"""Finds the configurations for `accelerate launch`, and refuses launches that would train differently than asked.

accelerate launch --config_file hf_decoder/training/launch/fsdp2.yaml --num_processes 8 scripts/pretrain.py ...
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# Launchers write the number of processes into one of these.
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def configurations() -> list[str]:
    """The names of the configurations."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def configuration_file(name: str) -> Path:
    """The file of a configuration, for `accelerate launch --config_file`.

    Raises:
        ValueError: if there is no such configuration; the message lists those there are.
    """
    if name not in configurations():
        raise ValueError(f"launch configuration {name!r} is unknown; choose one of: {', '.join(configurations())}")
    return FOLDER / f"{name}.yaml"


def check_launch(*, use_cpu: bool, uses_muon: bool, environment: Mapping[str, str] = os.environ) -> None:
    """Refuses launches that would train differently than asked.

    Raises:
        ValueError: if `accelerate launch --cpu` started one process of several, if FSDP is asked for on CPUs, where
            accelerate trains replicas, or if Muon would get DeepSpeed's flattened shards.
    """
    on = {name for name, value in environment.items() if value.lower() in ("true", "1", "yes")}
    started = any(name in environment for name in WORLD_SIZES)
    if "ACCELERATE_USE_CPU" in on and "MASTER_ADDR" in environment and not started:
        raise ValueError(
            "accelerate launch --cpu starts several processes with MPI alone, and started one; give it "
            f"--config_file {configuration_file('cpu')} in place of --cpu, with --num_processes"
        )
    if use_cpu and "ACCELERATE_USE_FSDP" in on:
        raise ValueError(
            "FSDP is asked for, but accelerate shards on accelerators only and would train replicas on these CPUs; "
            f"launch with --config_file {configuration_file('cpu')}, which says so"
        )
    if uses_muon and "ACCELERATE_USE_DEEPSPEED" in on:
        raise ValueError(
            "Muon needs whole matrices, and DeepSpeed gives an optimizer flattened pieces; take --optim adamw_torch, "
            f"or FSDP2: --config_file {configuration_file('fsdp2')}"
        )
