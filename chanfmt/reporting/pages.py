"""Write a report: ``report.html`` in one file, ``report.md``, ``report.json``, figures as PNG and SVG, numbers as CSV."""

from __future__ import annotations

import base64
import csv
import io
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base import html, markdown
from chanfmt.base.errors import MissingPackageError, UsageError
from chanfmt.base.files import atomic_directory, check_target
from chanfmt.base.text import json_text, number, spreadsheet_text
from chanfmt.reporting import drawing
from chanfmt.reporting.section import CLAIM_HEADINGS, claim_rows

if TYPE_CHECKING:
    from pathlib import Path

    from chanfmt.reporting.make import Report
    from chanfmt.reporting.section import Plot, Section, Table

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
h1, h2 { line-height: 1.2; }
h2 { border-top: 1px solid #bbb; padding-top: 1rem; margin-top: 2.5rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid #ddd; vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; text-align: right; }
figure { margin: 1.5rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption { font-size: .9rem; color: #333; }
.missing { border-left: 4px solid #767676; padding-left: .75rem; }
@media print {
  body { margin: 0; max-width: none; font-size: 10.5pt; }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
}
"""


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
    parts = [f"# {markdown.inline(report.title)}", markdown.table(("", ""), list(report.facts.items()))]
    parts += [f"**Note.** {markdown.inline(note)}" for note in report.notes]
    parts.append(f"## Beside the paper\n\n{markdown.table(CLAIM_HEADINGS, list(claim_rows(report.sections)))}\n\n{_CLAIM_NOTE}")
    for section in report.sections:
        parts.append(f"## {section.title}")
        parts += [markdown.paragraph(text) for text in section.text]
        parts += [f"> Missing: {markdown.inline(text)}." for text in section.missing]
        for plot in section.plots:
            parts.append(f"![{markdown.inline(plot.caption)}](figures/{plot.name}.png)\n\n_{markdown.inline(_caption(plot))}_")
        if section.numbers:
            parts.append(markdown.table(("number", "value"), [(name, number(value)) for name, value in section.numbers.items()]))
    return "\n\n".join(parts) + "\n"


def html_page(report: Report, figures: dict[str, bytes]) -> str:
    """``report.html``, one self-contained page; ``figures`` are the SVGs by name."""
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.inline(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{html.inline(report.title)}</h1>",
        html.table((), list(report.facts.items())),
        *(f"<p><strong>Note.</strong> {html.inline(note)}</p>" for note in report.notes),
        "<h2>Beside the paper</h2>",
        html.table(CLAIM_HEADINGS, list(claim_rows(report.sections))),
        f"<p>{html.inline(_CLAIM_NOTE)}</p>",
    ]
    for section in report.sections:
        parts += [
            f'<h2 id="{section.key}">{html.inline(section.title)}</h2>',
            *(f"<p>{html.inline(text)}</p>" for text in section.text),
        ]
        parts += [f'<p class="missing">Missing: {html.inline(text)}.</p>' for text in section.missing]
        parts += [_html_figure(plot, figures[plot.name]) for plot in section.plots]
        parts.append(_html_numbers(section))
    return "\n".join(part for part in parts if part) + "\n</body>\n</html>\n"


_CLAIM_NOTE = (
    'The paper is "Supernodes and Halos", arXiv 2604.23475. Its numbers refer to WikiText-2 and to the models named. '
    '"Differs" means that a claim does not carry over to this model on this text. "Undecided" means that the interval '
    "includes both answers. Intervals are 95% bootstrap intervals of medians over FFNs."
)


def _caption(plot: Plot) -> str:
    """The caption of ``plot``, the verdicts on the claims that it shows, and the names of its data files."""
    found = "; ".join(f"{claim.statement}: {claim.verdict} ({claim.measured}; the paper {claim.paper})" for claim in plot.claims)
    beside = f"Beside the paper: {found}." if found else "We do not know a number in the paper to compare this with."
    return f"{plot.caption} {beside} Data: {', '.join(f'data/{name}.csv' for name in plot.data)}."


def _html_numbers(section: Section) -> str:
    if not section.numbers:
        return ""
    rows = "\n".join(
        f'<tr><td>{html.inline(name)}</td><td class="number">{number(value)}</td></tr>' for name, value in section.numbers.items()
    )
    return f"<table>\n{rows}\n</table>"


def _html_figure(plot: Plot, svg: bytes) -> str:
    source: Any = base64.b64encode(svg).decode()
    return (
        f'<figure>\n<img alt="{html.inline(plot.caption)}" src="data:image/svg+xml;base64,{source}">\n'
        f"<figcaption>{html.inline(_caption(plot))}</figcaption>\n</figure>"
    )
