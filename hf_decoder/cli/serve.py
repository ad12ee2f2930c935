"""`hf-decoder serve FOLDER`: the server of `transformers serve`, an OpenAI-compatible one, in a process that knows us.

transformers' own command looks a checkpoint's class up in its own namespace and imports nothing besides, so that it
serves no class of a plugin. Every flag is its own: `hf-decoder serve --help`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import transformers

import hf_decoder

PACKAGES = ("fastapi", "uvicorn", "openai")


def main(argv: Sequence[str]) -> int:
    """Serves until interrupted."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"serve needs {', '.join(missing)}: pip install 'hf-decoder[serve]'")
    import click
    from transformers.cli.transformers import app

    for name in hf_decoder.__all__:
        setattr(transformers, name, getattr(hf_decoder, name))
    try:
        app(args=["serve", *argv], prog_name="hf-decoder", standalone_mode=False)
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        raise ValueError(error.format_message()) from None
    if "--help" in argv:
        raise SystemExit(0)  # as the other verbs end after their help
    return 0
