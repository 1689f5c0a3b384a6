"""`atlas report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import progress_bar, say
from chanfmt.cli import framework
from chanfmt.cli.options import AtlasOptions

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from chanfmt.reporting.make import Report

    Progress = Callable[[int], Callable[[], object]]


EXAMPLES = (
    "atlas report llama.h5 -o llama-report",
    "atlas report hf://datasets/USER/NAME/llama.h5 -o llama-report --overwrite --json",
)


@dataclass(frozen=True)
class ReportOutputOptions:
    """Where the report goes."""

    output: str = field(metadata={"help": "directory to write", "flag": "--output", "short": "-o", "metavar": "DIR"})
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier report in that directory"})


def add(commands: Any) -> None:
    framework.add_command(
        commands,
        "report",
        "show what an atlas says, with figures, next to the paper's findings",
        run=_run,
        options=lambda: (AtlasOptions, ReportOutputOptions),
        examples=EXAMPLES,
        description=(
            "Write a directory with report.html (one self-contained page), report.md, report.json, figures/ (PNG and SVG) and "
            "data/ (CSV): concentration, its factors, controls, the halo's redundancy, read connectivity, stability."
        ),
    )


def _run(arguments: argparse.Namespace) -> int:
    from chanfmt.hub.locate import open_atlas
    from chanfmt.reporting.make import make_report

    def make(progress: Progress) -> Report:
        with open_atlas(arguments.file, contained=True) as atlas:
            return make_report(atlas, progress)

    return publish(arguments, make)


def publish(arguments: argparse.Namespace, make: Callable[[Progress], Report]) -> int:
    """Write the report that ``make`` returns, and print its claims. Returns the exit code of the command."""
    from pathlib import Path

    from chanfmt.base.errors import UsageError
    from chanfmt.base.files import check_target
    from chanfmt.reporting.pages import write_report

    output = Path(arguments.output)
    check_target(output, overwrite=arguments.overwrite, directory=True)
    if output.is_dir() and any(output.iterdir()) and not (output / "report.json").is_file():
        raise UsageError(f"{output} holds something other than a report", hint="choose another -o")
    bars: list[Any] = []

    def progress(steps: int) -> Callable[[], object]:
        bars.append(progress_bar(steps, "step", "report"))
        return bars[0].update

    try:
        report = make(progress)
    finally:
        for bar in bars:
            bar.close()
    files = write_report(report, output)
    for note in report.notes:
        say(f"note: {note}")
    if arguments.json:
        framework.print_json(report.as_json())
    else:
        for section in report.sections:
            for claim in section.claims:
                print(f"{claim.verdict:<14}  {claim.statement}: {claim.measured} (the paper: {claim.paper})")
            for text in section.missing:
                say(f"missing from {section.title.lower()}: {text}")
    say(f"wrote {output / 'report.html'} and {len(files) - 1} other files")
    return 0
