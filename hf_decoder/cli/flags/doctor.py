"""The flags of `hf-decoder doctor`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli.flags import flag, needed

DESCRIPTION = "Tests checkpoints row by row."


@dataclass(kw_only=True)
class DoctorArguments:
    """What is examined, and how deeply."""

    checkpoints: list[str] = needed(
        "Folder or Hub name of a model; several are shown side by side.", positional=True, metavar="CHECKPOINT"
    )
    quick: bool = flag(False, "Only the quick rows.")
    deep: bool = flag(False, "Also the rows about training, which need several times the memory.")
    rows: list[str] | None = flag(None, "Run only the rows of these names.")
    text_file: str | None = flag(None, "Text like the training's, which the model must predict better than chance.")
    json: str | None = flag(None, "File to write every row to, with details and remedies.", metavar="FILE")
    trust_remote_code: bool = flag(False, "Run model code of the folder.")
    revision: str | None = flag(None, "Branch, tag or commit of a Hub name.")


ARGUMENTS = (DoctorArguments,)
