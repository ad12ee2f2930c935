"""`hf-decoder convert SOURCE DEST`: other families' checkpoints in, ours out, GGUF either way, ONNX out."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_decoder.cli import parse_arguments
from hf_decoder.interop.conversion import TARGETS, convert
from hf_decoder.interop.gguf_write import OUTTYPES
from hf_decoder.interop.verification import VerificationError


@dataclass
class ConvertArguments:
    """What is converted, and into what."""

    source: str = field(metadata={"help": "Folder, Hub name or .gguf file of the checkpoint to convert."})
    dest: str = field(metadata={"help": "Folder to write, or a .gguf file; it must not exist."})
    to: str = field(
        default="auto",
        metadata={
            "help": f"One of {', '.join(TARGETS)}. auto: another family comes in, ours leaves as the stock class that "
            "expresses it exactly."
        },
    )
    outtype: str = field(default="f16", metadata={"help": f"Type of the matrices in GGUF: {', '.join(OUTTYPES)}."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Largest weights file."})
    verify: bool = field(
        default=True,
        metadata={
            "help": "Load what left as a stock class or as ONNX beside its source and compare their logits; read back "
            "what left as GGUF."
        },
    )
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of a Hub name."})


def main(argv: Sequence[str]) -> int:
    """Parses the flags and converts; exit code 1 when the result does not compute the same as its source."""
    (args,) = parse_arguments(
        "convert", (ConvertArguments,), _name_positionals(argv), "Converts a checkpoint between families."
    )
    if args.outtype not in OUTTYPES:
        raise ValueError(f"--outtype {args.outtype!r} is unknown; choose one of: {', '.join(OUTTYPES)}")
    try:
        result = convert(
            args.source,
            Path(args.dest).expanduser(),
            to=args.to,
            outtype=args.outtype,
            max_shard_size=args.max_shard_size,
            verify=args.verify,
            revision=args.revision,
            progress=_bar,
        )
    except VerificationError as error:
        print(f"hf-decoder convert: failed: {error}; nothing was kept", file=sys.stderr)
        return 1
    print(f"{args.dest}: {result}")
    return 0


def _name_positionals(argv: Sequence[str]) -> list[str]:
    """Turns `SOURCE DEST --flags` into flags alone, which is what the dataclass parser reads."""
    rest = list(argv)
    named = []
    for flag in ("--source", "--dest"):
        if rest and not rest[0].startswith("-"):
            named += [f"{flag}={rest.pop(0)}"]
    return named + rest


def _bar(title: str, total: int) -> Any:
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty())
