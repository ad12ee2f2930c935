"""`hf-decoder report`: writes the page of one run, or of several side by side."""

from __future__ import annotations

from hf_decoder.cli.arguments import takes_argv
from hf_decoder.cli.flags.report import ReportArguments
from hf_decoder.reporting.report import write_report
from hf_decoder.reporting.runs import read_run


@takes_argv
def main(args: ReportArguments) -> int:
    """Reads the runs and writes their report."""
    runs = [read_run(folder) for folder in args.runs]
    page = write_report(runs, args.output_dir or (args.runs[0] if len(runs) == 1 else "runs/report"))
    print(f"{page} shows the {'run' if len(runs) == 1 else 'runs'}; report.md beside it says the same")
    return 0
