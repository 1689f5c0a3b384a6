"""``report.html``: one page without network, for a desk and a phone, in light and dark, readable without scripts.

The only script is the project's own. The page's policy names its hash, so no text of a file can run.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib import resources
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base import html
from chanfmt.base.text import number
from chanfmt.format.show import short
from chanfmt.reporting import drawing
from chanfmt.reporting.explore import BINS
from chanfmt.reporting.section import CLAIM_HEADINGS, CLAIM_NOTE, claim_rows, data_names, of_claims, tally

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from chanfmt.reporting.explore import Explored
    from chanfmt.reporting.make import Report
    from chanfmt.reporting.section import Plot, Section


def html_page(report: Report, figures: dict[str, bytes], *, data: bool = True) -> str:
    """The page of ``report``.

    Args:
        figures: The SVGs by name.
        data: Whether the numbers lie beside the page as files, which captions then name.
    """
    return "\n".join(part for part in _parts(report, figures, data) if part) + "\n</body>\n</html>\n"


def _parts(report: Report, figures: dict[str, bytes], data: bool) -> Iterator[str]:
    style, script = _file("report.css"), _file("explore.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    title = html.inline(report.title)
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1>{title}</h1>"
    yield _members(report.members) if report.members else _verdicts(report.sections)
    yield html.table((), list(report.facts.items())).replace("<table>", '<table class="facts">', 1)
    yield from (f"<p><strong>Note.</strong> {html.inline(note)}</p>" for note in report.notes)
    yield _contents(report)
    claims = _claims_of_members(report) if report.members else _claims(report.sections)
    yield f'<h2 id="paper">Beside the paper</h2>\n{claims}\n<p>{html.inline(CLAIM_NOTE)}</p>'
    yield from _living(report.explored)
    for section in report.sections:
        yield from _section(section, figures, data)
    yield from _details(report.members)
    if report.explored:
        yield f"<script>{script}</script>"


def _file(name: str) -> str:
    return resources.files("chanfmt.reporting").joinpath(name).read_text(encoding="utf-8")


def _chip(verdict: str, text: str) -> str:
    return f'<span class="chip {verdict.replace(" ", "-")}">{text}</span>'


def _verdicts(sections: Sequence[Section]) -> str:
    """How many claims of the paper hold here, as one line of chips."""
    chips = " ".join(_chip(verdict, words) for verdict, words in tally(sections).items())
    return f'<p class="verdicts">{of_claims(sections)}: {chips}</p>' if chips else ""


def _members(members: Mapping[str, Report]) -> str:
    """The atlases of a report of several: the model, the text, and how many claims of the paper hold there."""
    rows = []
    for name, report in members.items():
        chips = " ".join(_chip(verdict, words) for verdict, words in tally(report.sections).items())
        what = f"{report.facts['model']}, {report.facts['calibration']}"
        rows.append(f"<tr><td><strong>{html.inline(name)}</strong><br>{html.inline(what)}</td><td>{chips}</td></tr>")
    claims = max(sum(len(section.claims) for section in report.sections) for report in members.values())
    return (
        f'<p>How many of {claims} claims of the paper each atlas shows:</p>\n<table class="members">\n'
        + "\n".join(rows)
        + "\n</table>"
    )


def _contents(report: Report) -> str:
    links = {"paper": "Beside the paper"} | ({"explore": "Explore"} if report.explored else {})
    links |= {section.key: section.title for section in report.sections} | ({"atlases": "Each atlas"} if report.members else {})
    items = "\n".join(f'<li><a href="#{key}">{html.inline(title)}</a></li>' for key, title in links.items())
    return f'<nav aria-label="Contents">\n<ul>\n{items}\n</ul>\n</nav>'


def _claims(sections: Sequence[Section]) -> str:
    names = dict(enumerate(CLAIM_HEADINGS))
    lines = ["".join(f"<th>{html.inline(heading)}</th>" for heading in CLAIM_HEADINGS)]
    for row in claim_rows(sections):
        cells = [
            f"<td>{_chip(cell, html.inline(cell))}</td>"
            if not names[place]
            else f'<td data-name="{html.inline(names[place])}">{html.inline(cell)}</td>'
            for place, cell in enumerate(row)
        ]
        lines.append("".join(cells))
    return '<table class="claims">\n' + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def _claims_of_members(report: Report) -> str:
    """The table claims x atlases."""
    headings = ("the paper says", *report.members)
    lines = ["".join(f"<th>{html.inline(heading)}</th>" for heading in headings)]
    for statement, found in report.by_statement.items():
        first = next(iter(found.values()))
        what = (
            f"<td><strong>{html.inline(statement)}</strong>: {html.inline(first.paper)}"
            f'<br><span class="soft">agrees if: {html.inline(first.criterion)}</span></td>'
        )
        cells = [
            f'<td data-name="{html.inline(name)}">{_chip(claim.verdict, html.inline(claim.verdict))}<br>{html.inline(claim.measured)}</td>'
            if claim is not None
            else f'<td data-name="{html.inline(name)}">-</td>'
            for name in report.members
            for claim in [found.get(name)]
        ]
        lines.append(what + "".join(cells))
    rows = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide" tabindex="0" role="group" aria-label="Claims and atlases">\n<table class="claims family">\n{rows}\n</table>\n</div>'


def _details(members: Mapping[str, Report]) -> Iterator[str]:
    """What each atlas's own report says, folded."""
    if not members:
        return
    yield '<h2 id="atlases">Each atlas</h2>\n<p>A report of one atlas also has figures, and its channels to explore.</p>'
    for name, report in members.items():
        yield f"<details>\n<summary>{html.inline(name)}</summary>"
        yield html.table((), list(report.facts.items())).replace("<table>", '<table class="facts">', 1)
        yield from (f"<p><strong>Note.</strong> {html.inline(note)}</p>" for note in report.notes)
        for section in report.sections:
            yield f"<h3>{html.inline(section.title)}</h3>"
            yield from _answer(section)
        yield "</details>"


def _answer(section: Section) -> Iterator[str]:
    yield from (f"<p>{html.inline(text)}</p>" for text in section.text)
    yield from (f'<p class="missing">Missing: {html.inline(text)}.</p>' for text in section.missing)


def _section(section: Section, figures: dict[str, bytes], data: bool) -> Iterator[str]:
    yield f'<h2 id="{section.key}">{html.inline(section.title)}</h2>'
    yield from _answer(section)
    yield from (_figure(plot, figures[plot.name], data) for plot in section.plots)
    if section.numbers:
        rows = "\n".join(
            f'<tr><td>{html.inline(name)}</td><td class="number">{number(value)}</td></tr>'
            for name, value in section.numbers.items()
        )
        yield f"<details>\n<summary>numbers</summary>\n<table>\n{rows}\n</table>\n</details>"


def _figure(plot: Plot, svg: bytes, data: bool) -> str:
    chips = " ".join(_chip(claim.verdict, html.inline(f"{claim.statement}: {claim.verdict}")) for claim in plot.claims)
    source = base64.b64encode(svg).decode()
    named = f" {data_names(plot)}" if data else ""
    return (
        f'<figure>\n<img alt="{html.inline(plot.caption)}" src="data:image/svg+xml;base64,{source}">\n'
        f"<figcaption>{html.inline(plot.caption)}{named}</figcaption>\n</figure>"
        + (f'\n<p class="shown">{chips}</p>' if chips else "")
    )


def _living(units: Sequence[Explored]) -> Iterator[str]:
    """The heat map, and what a script adds to it."""
    if not units:
        return
    image = base64.b64encode(drawing.heat_map(np.stack([unit.heat for unit in units]))).decode()
    widths = sorted({unit.n_channels for unit in units})
    last = f"rank {widths[-1]:,}" if len(widths) == 1 else "last rank"
    what = "Share of each layer's LP by rank: a row for every FFN or expert, the largest channel at the left, ranks on a log axis"
    yield f'<h2 id="explore">Explore</h2>\n<p>{what}. Dark is low and bright is high.</p>'
    yield f'<div class="axis"><span>{html.inline(short(units[0].name))}</span></div>'
    yield f'<div id="map" tabindex="0" role="group" aria-label="{what}. Arrow keys move, Enter opens the layer.">'
    height = max(90, min(640, 14 * len(units)))
    yield f'<img alt="{what}." style="height: {height}px" src="data:image/png;base64,{image}">\n</div>'
    yield f'<div class="axis"><span>{html.inline(short(units[-1].name))}; rank 1</span><span>{last}</span></div>'
    metrics = list(dict.fromkeys(name for unit in units for name in unit.values))
    data = {
        "bins": BINS,
        "metrics": metrics,
        "units": [unit.as_json() for unit in units],
    }
    # No text of a file may end the element.
    encoded = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    yield f'<script type="application/json" id="data">{encoded}</script>'
    yield """<noscript><p>With scripts, this part shows the channels of a layer. The browser atlas-tui shows all of them.</p></noscript>
<div id="living" hidden>
<p id="readout" aria-live="polite"></p>
<h3 id="layer"></h3>
<p><label>across <select id="x"></select></label> <label>upwards <select id="y"></select></label></p>
<div class="explore">
<div id="channels" tabindex="0" role="group" aria-label="Channels. Arrow keys choose one."></div>
<svg id="scatter" role="img" aria-label="Two metrics of the channels, on log axes"></svg>
</div>
<div id="card"></div>
</div>"""
