"""`hf-decoder env`: prints what a bug report needs about the machine and the installed packages."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess

from hf_decoder import __version__
from hf_decoder.cli import select_device
from hf_decoder.cli.arguments import takes_argv
from hf_decoder.cli.flags.env import EnvArguments
from hf_decoder.costs import accounting
from hf_decoder.costs.devices import GIB, cpu_count, cpu_features, cpu_name, machine_memory

# In the order in which torch and its extensions look for them.
COMPILERS = ("g++", "clang++", "c++", "cl")
VARIABLES = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "HF_DECODER_ENGINE", "HF_DECODER_WAYS")


@takes_argv
def main(args: EnvArguments) -> int:
    """Prints one line for each fact."""
    import torch

    facts = {
        "hf_decoder": __version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        "platform": platform.platform(),
        "processor": f"{cpu_name()}, {cpu_count()} cores, {' '.join(cpu_features()) or '-'}",
        "memory": f"{machine_memory() / GIB:.1f} GiB",
        "threads": f"{torch.get_num_threads()} (between operators {torch.get_num_interop_threads()})",
        "device": _device(),
        "compiler": _compiler(),
        "environment": " ".join(f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ) or "-",
    }
    packages = _packages()
    width = max(map(len, (*facts, *packages)))
    ways = [("engine's way", way) for way in _ways()] or [("engine's ways", "none measured yet")]
    for name, value in (*facts.items(), *packages.items(), *ways):
        print(f"{name:<{width}}  {value}")
    return 0


def _ways() -> list[str]:
    """Of each choice of the engine on this machine, the way taken, and the milliseconds of all."""
    from hf_decoder.engine.calibration import fastest, measured

    return [
        f"{case}: {fastest(times)} ("
        + ", ".join(f"{way} {'failed' if time is None else f'{time:.3g}'}" for way, time in times.items())
        + ")"
        for case, times in sorted(measured().items())
    ]


def _device() -> str:
    """The accelerator and its driver; with CUDA also memory and compute capability."""
    import torch

    if torch.cuda.is_available():
        capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
        driver = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}"
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
        return f"{accounting.hardware()['device']}, {memory:.1f} GiB, compute capability {capability}, {driver}"
    device = select_device(None)
    return "no accelerator" if device.type == "cpu" else str(device)


def _compiler() -> str:
    """The first C++ compiler found, with its version. Without one nothing is compiled."""
    for name in filter(None, (os.environ.get("CXX"), *COMPILERS)):
        if path := shutil.which(name):
            try:
                shown = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10).stdout
            except (OSError, subprocess.SubprocessError):
                shown = ""
            return f"{path} {shown.splitlines()[0] if shown else ''}".rstrip()
    return "none found"


def _packages() -> dict[str, str]:
    """The required and optional packages, with their versions."""
    try:
        asked = importlib.metadata.requires("hf-decoder") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        asked = ["torch", "transformers"]
    names = dict.fromkeys(re.split(r"[^\w.-]", line, maxsplit=1)[0] for line in asked)
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions
