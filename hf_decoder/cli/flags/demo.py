"""The flags of `hf-decoder demo`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli.flags import Loading, flag, needed

DESCRIPTION = (
    "Opens a page on 127.0.0.1 to talk to a model, or to two side by side. It offers the adapters that were made for "
    "a model and lie in its folder or beside it."
)


@dataclass(kw_only=True)
class DemoArguments(Loading):
    """What the page offers."""

    folders: list[str] = needed(
        "Folders of models or adapters; with two or more the page has two columns.", positional=True, metavar="FOLDER"
    )
    port: int = flag(7860, "Port of the page; 0 takes any that is free.")


ARGUMENTS = (DemoArguments,)
