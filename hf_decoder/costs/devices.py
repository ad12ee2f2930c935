"""Lists memory, peak FLOP/s and links of GPUs, Macs and CPUs, and finds out the same of this machine's CPU."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

GB, GIB = 10**9, 2**30
DEVICES_PER_NODE = 8
# `DEVICES` entry that stands for the processor of this machine.
THIS_CPU = "cpu"


@dataclass(frozen=True)
class Device:
    """Memory in bytes, dense bf16 FLOP/s, and bytes per second that it sends to a neighbour (0: it works alone)."""

    memory: int
    flops: float
    link: float = 0.0


# NVIDIA and AMD, by data sheets: dense bf16 with fp32 accumulation (half of the figure with sparsity); NVLink or
# Infinity Fabric in one direction, else PCIe. Apple, by press releases: fp32, which their GPUs multiply as fast as
# bf16, and the most common memory. CPUs: cores x base clock x `CPU_FLOPS`, and memory of a typical machine.
DEVICES = {
    "a100": Device(80 * GB, 312e12, 300 * GB),
    "a100-40gb": Device(40 * GB, 312e12, 300 * GB),
    "h100": Device(80 * GB, 989.4e12, 450 * GB),
    "h200": Device(141 * GB, 989.4e12, 450 * GB),
    "b200": Device(180 * GB, 2250e12, 900 * GB),
    "mi300x": Device(192 * GB, 1307.4e12, 448 * GB),
    "l40s": Device(48 * GB, 362e12, 32 * GB),
    "l4": Device(24 * GB, 121e12, 32 * GB),
    "rtx4090": Device(24 * GB, 165.2e12, 32 * GB),
    "rtx3090": Device(24 * GB, 71e12, 32 * GB),
    "m1": Device(16 * GIB, 2.6e12),
    "m1-max": Device(32 * GIB, 10.4e12),
    "m1-ultra": Device(64 * GIB, 21e12),
    "m2": Device(16 * GIB, 3.6e12),
    "m2-max": Device(32 * GIB, 13.6e12),
    "m2-ultra": Device(64 * GIB, 27.2e12),
    "xeon-8480+": Device(256 * GIB, 56 * 2.0e9 * 1024),
    "epyc-9654": Device(384 * GIB, 96 * 2.4e9 * 64),
}
# bf16 FLOPs per core and clock by instruction set, the fastest first. AMX computes 16 x 16 x 32 products in 16 clocks,
# VDPBF16PS 32 per clock. Without bf16: fp32 with two units of 16, 8 or 4 lanes.
CPU_FLOPS = {"amx_bf16": 1024, "avx512_bf16": 64, "avx512f": 64, "avx2": 32, "bf16": 64, "asimd": 16}
CLOCK = 2.5e9  # if the system does not tell


def device(kind: str) -> Device:
    """The device named by a key of `DEVICES`, or this machine's CPU (`THIS_CPU`)."""
    if kind != THIS_CPU:
        return DEVICES[kind]
    found = cpu_features()
    flops = next((rate for name, rate in CPU_FLOPS.items() if name in found), CPU_FLOPS["asimd"])
    return Device(machine_memory(), cpu_count() * _clock() * flops)


def cpu_count() -> int:
    """The number of logical processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The system's name of the processor."""
    if sys.platform == "darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """The instruction sets of this CPU among `CPU_FLOPS` and `amx_int8`."""
    flags = set((_cpuinfo("flags") or _cpuinfo("Features")).split())
    if sys.platform == "darwin":
        flags |= {"asimd"} if platform.machine() == "arm64" else set()
        flags |= {"bf16"} if _sysctl("hw.optional.arm.FEAT_BF16") == "1" else set()
        flags |= {"avx2"} if _sysctl("hw.optional.avx2_0") == "1" else set()
    return [name for name in (*CPU_FLOPS, "amx_int8") if name in flags]


def machine_memory() -> int:
    """Bytes of memory of this machine."""
    if sys.platform == "darwin":
        return int(_sysctl("hw.memsize") or 8 * GIB)
    if hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 8 * GIB  # Windows does not tell without a package


def _clock() -> float:
    """Clocks per second of the processor: the one in its name, or the current one."""
    named = re.search(r"@ ([\d.]+)GHz", cpu_name())
    if named:
        return float(named[1]) * 1e9
    try:
        return float(_cpuinfo("cpu MHz")) * 1e6 or CLOCK
    except ValueError:
        return CLOCK


def _cpuinfo(key: str) -> str:
    """The first value of a key in /proc/cpuinfo; empty if there is none."""
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.search(rf"^{key}\s*:\s*(.*)$", text, flags=re.MULTILINE)
    return found[1].strip() if found else ""


def _sysctl(name: str) -> str:
    try:
        return subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
