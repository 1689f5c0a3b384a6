"""`atlas report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.cli import framework
from chanfmt.cli.options import AtlasOptions

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from chanfmt.reporting.make import Report


EXAMPLES = (
    "atlas report llama.h5 -o llama-report",
    "atlas report hf://datasets/USER/NAME/llama.h5 -o llama-report --overwrite --json",
)


_VERDICT = 16
"""Columns before a claim."""


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

    def make() -> Report:
        with open_atlas(arguments.file, contained=True) as atlas:
            return make_report(atlas)

    return publish(arguments, make)


def publish(arguments: argparse.Namespace, make: Callable[[], Report]) -> int:
    """Write the report that ``make`` returns, and print its claims. Returns the exit code of the command."""
    from chanfmt.base.claims import claimed
    from chanfmt.base.files import output_path
    from chanfmt.reporting.pages import check_directory, write_report

    output = output_path(arguments.output)
    check_directory(output, overwrite=arguments.overwrite)
    with claimed(output):
        report = make()
        files = write_report(report, output, overwrite=arguments.overwrite)
    for note in report.notes:
        say(f"note: {note}")
    if arguments.json:
        framework.print_json(report.as_json())
    else:
        for section in report.sections:
            for claim in section.claims:
                framework.print_wrapped(f"{claim.verdict:<{_VERDICT}}{claim.statement}", " " * _VERDICT)
                framework.print_wrapped(f"{'':{_VERDICT}}{claim.measured} (the paper: {claim.paper})", " " * (_VERDICT + 2))
            for text in section.missing:
                say(f"missing from {section.title.lower()}: {text}")
    say(f"wrote {output / 'report.html'} and {len(files) - 1} other files")
    return 0
