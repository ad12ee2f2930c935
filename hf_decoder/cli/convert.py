"""`hf-decoder convert SOURCE DEST`: converts from and to other families and GGUF, and exports to ONNX."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_decoder.cli.arguments import takes_argv
from hf_decoder.cli.flags.convert import ConvertArguments
from hf_decoder.interop.conversion import convert
from hf_decoder.interop.verification import VerificationError


@takes_argv
def main(args: ConvertArguments) -> int:
    """Converts a checkpoint. Exit code 1 says that the result computes something else than its source."""
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


def _bar(title: str, total: int) -> Any:
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty())
