"""`hf-decoder benchmark`: compares our speed with that of the stock class of the same shape and weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import LlamaConfig
from transformers.utils import logging

from hf_decoder.cli import check_at_least, parse_overrides, select_device
from hf_decoder.cli.arguments import takes_argv
from hf_decoder.cli.flags.benchmark import BenchmarkArguments
from hf_decoder.costs import accounting
from hf_decoder.costs.presets import get_preset
from hf_decoder.evaluation.benchmarking import SUITES, Row, Setting, with_ways
from hf_decoder.training.callbacks import bf16_supported


@takes_argv
def main(args: BenchmarkArguments) -> int:
    """Prints a line for each comparison as soon as it is measured."""
    setting = _setting(args)
    facts = accounting.hardware()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    dtype = str(setting.dtype).removeprefix("torch.")
    print(f"preset {args.preset}, vocabulary {args.vocab_size:,}, {dtype} on {setting.device}")
    print(
        f"{'suite':9}{'case':32}{'ours ms':>10}{'stock ms':>10}{'ratio':>7}{'of limit':>12}{'peak MB':>9}{'stock':>7}"
        f"{'llama.cpp ms':>14}{'ratio':>7}"
    )
    rows = []
    for suite in args.suites:
        for row in with_ways(SUITES[suite](setting)):
            rows.append(row)
            print(_line(row), flush=True)
    if args.json:
        content = {"facts": facts, "arguments": asdict(args), "rows": [asdict(row) for row in rows]}
        Path(args.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if args.plot:
        plot(rows, args.plot)
    return 0


def _line(row: Row) -> str:
    share = "" if row.share is None else f"{row.share:.0%} {row.limit}"
    sizes = ["" if size is None else f"{size / 2**20:.0f}" for size in (row.ours_bytes, row.stock_bytes)]
    line = f"{row.suite:9}{row.case:32}{row.ours * 1e3:>10.1f}{row.stock * 1e3:>10.1f}{row.ratio:>6.2f}x{share:>12}"
    line += f"{sizes[0]:>9}{sizes[1]:>7}"
    if row.llama_cpp is not None:
        line += f"{row.llama_cpp * 1e3:>14.1f}{row.llama_cpp / row.ours:>6.2f}x"
    return f"{line.rstrip()}  {row.text}".rstrip()


def _setting(args: BenchmarkArguments) -> Setting:
    unknown = [suite for suite in args.suites if suite not in SUITES]
    if unknown:
        raise ValueError(f"suite {unknown[0]!r} is unknown; choose among {', '.join(SUITES)}")
    name = args.dtype
    if name == "auto":
        name = "bfloat16" if bf16_supported() else "float32"
    dtype = getattr(torch, name, None)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"--dtype {args.dtype} is unknown; choose auto, bfloat16, float16 or float32")
    check_at_least("--repeats", args.repeats, 1)
    shape = {**get_preset(args.preset), **parse_overrides(args.config_overrides)}
    shape.pop("qk_norm", None)  # Llama has none
    unknown = [name for name in shape if name not in LlamaConfig().to_dict()]
    if unknown:
        raise ValueError(f"--config_overrides names {unknown[0]!r}, which the stock class does not have")
    return Setting(
        {"vocab_size": args.vocab_size, **shape},
        device=str(select_device(args.device)),
        dtype=dtype,
        repeats=args.repeats,
    )


def plot(rows: Sequence[Row], path: str) -> None:
    """Draws a bar chart of the stock class's time over ours."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.45 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([f"{row.suite}, {row.case}" for row in rows], [row.ratio for row in rows])
    axes.bar_label(bars, fmt="%.2fx", padding=3)
    axes.axvline(1.0, color="grey", linestyle="--")
    axes.invert_yaxis()
    axes.set_xlabel("times as fast as the stock class")
    axes.margins(x=0.12)
    figure.savefig(path, dpi=100)
