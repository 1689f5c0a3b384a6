"""`atlas report`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.cli import framework

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from chanfmt.reporting.make import Report


EXAMPLES = (
    "atlas report llama.h5 -o llama-report",
    "atlas report hf://datasets/USER/NAME/llama.h5 -o llama-report --overwrite --json",
    "atlas report 1b.h5 3b.h5 8b.h5 -o family.html",
)


_VERDICT = 16
"""Columns before a claim."""


@dataclass(frozen=True)
class ReportedOptions:
    """Which atlases."""

    files: tuple[str, ...] = field(
        metadata={
            "help": "atlas: a file, or hf://REPO/FILE; several make one page with a column and a line for each",
            "positional": "FILE",
            "nargs": "+",
        }
    )


@dataclass(frozen=True)
class ReportOutputOptions:
    """Where the report goes."""

    output: str = field(
        metadata={
            "help": "directory to write, or NAME.html for the page alone",
            "flag": "--output",
            "short": "-o",
            "metavar": "DIR",
        }
    )
    overwrite: bool = field(default=False, metadata={"help": "replace an earlier report there"})


def add(commands: Any) -> None:
    framework.add_command(
        commands,
        "report",
        "show what an atlas says, with figures, next to the paper's findings",
        run=_run,
        options=lambda: (ReportedOptions, ReportOutputOptions),
        examples=EXAMPLES,
        description=(
            "Write a directory with report.html (one self-contained page), report.md, report.json, figures/ (PNG and SVG) and "
            "data/ (CSV): concentration, its factors, controls, the halo's redundancy, read connectivity, stability. Several "
            "atlases, such as a family of models or one model on several texts, make one report: claims x atlases, figures with a "
            "line for each atlas, then the details of each."
        ),
    )


def _run(arguments: argparse.Namespace) -> int:
    import contextlib

    from chanfmt.hub.locate import open_atlas
    from chanfmt.reporting.family import make_family
    from chanfmt.reporting.make import make_report
    from chanfmt.reporting.names import short_names

    with contextlib.ExitStack() as stack:

        def make() -> Report:
            atlases = [stack.enter_context(open_atlas(file, contained=True)) for file in arguments.files]
            return make_report(atlases[0]) if len(atlases) == 1 else make_family(atlases, short_names(atlases))

        return publish(arguments, make)


def publish(arguments: argparse.Namespace, make: Callable[[], Report]) -> int:
    """Write the report that ``make`` returns, and print its claims. Returns the exit code of the command."""
    from chanfmt.base.claims import claimed
    from chanfmt.base.files import output_path
    from chanfmt.reporting.pages import check_output, write

    output = output_path(arguments.output)
    check_output(output, overwrite=arguments.overwrite)
    with claimed(output):
        report = make()
        files = write(report, output, overwrite=arguments.overwrite)
    for note in report.notes:
        say(f"note: {note}")
    if arguments.json:
        framework.print_json(report.as_json())
    elif report.members:
        _print_family(report)
    else:
        for section in report.sections:
            for claim in section.claims:
                framework.print_wrapped(f"{claim.verdict:<{_VERDICT}}{claim.statement}", " " * _VERDICT)
                framework.print_wrapped(f"{'':{_VERDICT}}{claim.measured} (the paper: {claim.paper})", " " * (_VERDICT + 2))
            for text in section.missing:
                say(f"missing from {section.title.lower()}: {text}")
    say(f"wrote {files[0]}" + (f" and {len(files) - 1} other files" if len(files) > 1 else ""))
    return 0


def _print_family(report: Report) -> None:
    """Print every claim with the verdict of each atlas."""
    for statement, found in report.by_statement.items():
        paper = next(iter(found.values())).paper
        framework.print_wrapped(f"{statement} (the paper: {paper})", "  ")
        for name, claim in found.items():
            framework.print_wrapped(f"  {claim.verdict:<{_VERDICT}}{name}: {claim.measured}", " " * (_VERDICT + 4))
