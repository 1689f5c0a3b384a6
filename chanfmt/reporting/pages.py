"""Write a report: ``report.html`` in one file, ``report.md``, ``report.json``, figures as PNG and SVG, numbers as CSV."""

from __future__ import annotations

import csv
import io
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base import markdown
from chanfmt.base.errors import MissingPackageError, UsageError
from chanfmt.base.files import atomic_directory, atomic_file, check_target
from chanfmt.base.text import json_text, number, spreadsheet_text
from chanfmt.reporting import drawing
from chanfmt.reporting.section import CLAIM_NOTE, data_names
from chanfmt.reporting.web import html_page

if TYPE_CHECKING:
    from pathlib import Path

    from chanfmt.reporting.make import Report
    from chanfmt.reporting.section import Plot, Section, Table


PAGE = ".html"
"""Ending of an output that is the page alone."""


def check_output(output: Path, *, overwrite: bool) -> None:
    """Raise `UsageError` if no report can be written as ``output``, a directory or a file that ends in `PAGE`."""
    if output.suffix == PAGE and not output.is_dir():
        check_target(output, overwrite=overwrite)
    else:
        check_directory(output, overwrite=overwrite)


def write(report: Report, output: Path, *, overwrite: bool = False) -> list[Path]:
    """Write ``report`` as the directory ``output``, or as the page alone if ``output`` ends in `PAGE`.

    Returns:
        The files, the page first.

    Raises:
        OutputAppearedError, MissingPackageError, ChanfmtError: As `write_report`.
    """
    if output.suffix != PAGE or output.is_dir():
        names = write_report(report, output, overwrite=overwrite)
        return [output / name for name in sorted(names, key=lambda name: name != "report.html")]
    figures = {plot.name: render(plot, "svg") for section in report.sections for plot in section.plots}
    text = html_page(report, figures, data=False)
    with atomic_file(output, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return [output]


def check_directory(directory: Path, *, overwrite: bool) -> None:
    """Raise `UsageError` if no report can be written to ``directory``, or if it holds something other than a report."""
    check_target(directory, overwrite=overwrite, directory=True)
    if directory.is_dir() and any(directory.iterdir()) and not (directory / "report.json").is_file():
        raise UsageError(f"{directory} holds something other than a report", hint="choose another directory")


def write_report(report: Report, directory: Path, *, overwrite: bool = False) -> list[str]:
    """Write ``report`` as ``directory``, whole or not at all. Returns the files' names.

    Args:
        overwrite: Whether a directory that is there is replaced.

    Raises:
        OutputAppearedError: ``directory`` exists, and ``overwrite`` is False. The report is kept beside it.
        MissingPackageError: matplotlib is not installed.
        ChanfmtError: The directory cannot be written.
    """
    images = {
        (plot.name, kind): render(plot, kind) for section in report.sections for plot in section.plots for kind in ("png", "svg")
    }
    with atomic_directory(directory, overwrite=overwrite) as temporary:
        for name in ("figures", "data"):
            (temporary / name).mkdir()
        for (name, kind), image in images.items():
            (temporary / "figures" / f"{name}.{kind}").write_bytes(image)
        for section in report.sections:
            for table in section.tables:
                _write_csv(table, temporary / "data" / f"{table.name}.csv")
        (temporary / "report.json").write_text(json_text(report.as_json()) + "\n", encoding="utf-8")
        (temporary / "report.md").write_text(markdown_page(report), encoding="utf-8")
        (temporary / "report.html").write_text(
            html_page(report, {name: image for (name, kind), image in images.items() if kind == "svg"}), encoding="utf-8"
        )
        return sorted(str(path.relative_to(temporary)) for path in temporary.rglob("*") if path.is_file())


def render(plot: Plot, kind: str) -> bytes:
    """Make the figure of ``plot``. Returns it as ``png`` or ``svg``, the same bytes every time.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackageError("matplotlib", "plot", "the figures of a report") from None
    stream = io.BytesIO()
    with mpl.rc_context(drawing.LOOK | {"svg.hashsalt": plot.name}):
        figure = Figure(figsize=plot.size, dpi=150, layout="constrained")
        FigureCanvasAgg(figure)
        drawing.draw_figure(plot, figure)
        figure.savefig(stream, format=kind, metadata={"Date": None} if kind == "svg" else {"Software": None})
    return stream.getvalue()


def _write_csv(table: Table, path: Path) -> None:
    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(table.columns)
        writer.writerows(zip(*(_texts(np.asarray(values)) for values in table.columns.values()), strict=True))


def _texts(values: np.ndarray) -> list[str]:
    if values.dtype.kind == "f":
        return ["" if np.isnan(value) else repr(value) for value in values.tolist()]
    texts = [str(value) for value in values.tolist()]
    return [spreadsheet_text(text) for text in texts] if values.dtype.kind == "U" else texts


def markdown_page(report: Report) -> str:
    """``report.md``, the page that a repository shows."""
    parts = [
        f"# {markdown.inline(report.title)}",
        *map(markdown.inline, report.counted),
        markdown.table(("", ""), list(report.facts.items())),
    ]
    parts += [f"**Note.** {markdown.inline(note)}" for note in report.notes]
    parts.append(f"## Beside the paper\n\n{markdown.table(*report.claims_table)}\n\n{CLAIM_NOTE}")
    for section in report.sections:
        parts.append(f"## {section.title}")
        parts += [markdown.paragraph(text) for text in section.text]
        parts += [f"> Missing: {markdown.inline(text)}." for text in section.missing]
        for plot in section.plots:
            parts.append(f"![{markdown.inline(plot.caption)}](figures/{plot.name}.png)\n\n_{markdown.inline(_shown(plot))}_")
        if section.numbers:
            parts.append(_folded("numbers", _number_table(section)))
    for name, member in report.members.items():
        facts = markdown.table(("", ""), list(member.facts.items()))
        tables = [
            f"**{markdown.inline(section.title)}**\n\n{_number_table(section)}" for section in member.sections if section.numbers
        ]
        parts.append(_folded(markdown.inline(name), "\n\n".join([facts, *tables])))
    return "\n\n".join(parts) + "\n"


def _number_table(section: Section) -> str:
    return markdown.table(("number", "value"), [(name, number(value)) for name, value in section.numbers.items()])


def _folded(summary: str, content: str) -> str:
    return f"<details>\n<summary>{summary}</summary>\n\n{content}\n\n</details>"


def _shown(plot: Plot) -> str:
    """The caption of ``plot``, the name of its data, and the verdicts on the claims that it shows."""
    verdicts = "".join(f" {claim.statement}: {claim.verdict}." for claim in plot.claims)
    return f"{plot.caption} {data_names(plot)}{verdicts}"
