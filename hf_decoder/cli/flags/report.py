"""The flags of `hf-decoder report`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli.flags import flag, needed

DESCRIPTION = (
    "Writes report.md and report.html of a run: what each stage changed, cost and read, all curves in one picture, "
    "benchmarks, answers. Of several runs it lays the curves over each other and puts the figures side by side."
)


@dataclass(kw_only=True)
class ReportArguments:
    """Of what."""

    runs: list[str] = needed("Folders of assistant, pretrain or finetune.", positional=True, metavar="RUN")
    output_dir: str | None = flag(None, "Folder for the report; if unset, the run's own, or runs/report for several.")


ARGUMENTS = (ReportArguments,)
