"""Make the report of an atlas: its sections, in the order of the questions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base import html
from chanfmt.base.choices import unknown
from chanfmt.base.errors import AtlasError, MissingPackageError, UsageError
from chanfmt.base.narrate import progress_bar
from chanfmt.base.text import one_line
from chanfmt.format.show import short
from chanfmt.format.texts import configuration
from chanfmt.reporting import drawing
from chanfmt.reporting.explore import explored
from chanfmt.reporting.section import CLAIM_HEADINGS, claim_rows, counted
from chanfmt.reporting.sections import concentrated, controls, factors, halo, measured, reading, stable
from chanfmt.reporting.units import find_units, has_experts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from chanfmt.format.reader import Atlas
    from chanfmt.reporting.explore import Explored
    from chanfmt.reporting.section import Claim, Plot, Section, Table


@dataclass(frozen=True, eq=False, repr=False)
class Report:
    """The report of one atlas, or of several.

    Attributes:
        title: One line.
        facts: Name to text: model, calibration, labels.
        notes: Cautions about the whole report, in sentences.
        sections: One per question.
        explored: What the living part of the page shows.
        members: In a report of several atlases, the name of each atlas to its own report, which holds the claims.
    """

    title: str
    facts: dict[str, str]
    notes: tuple[str, ...]
    sections: tuple[Section, ...]
    explored: tuple[Explored, ...] = ()
    members: Mapping[str, Report] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<Report {short(self.title)!r}: {', '.join(section.key for section in self.sections)}>"

    def _repr_html_(self) -> str:
        """The report for a notebook, without text and figures: the facts, the notes and the paper's claims."""
        verdicts = "".join(f"<p>{html.inline(line)}</p>" for line in self.counted)
        notes = (f"<p><strong>Note.</strong> {html.inline(note)}</p>" for note in self.notes)
        claims = html.table(*self.claims_table)
        title = f"<p><strong>{html.inline(self.title)}</strong></p>"
        return "\n".join([title, verdicts, html.table((), list(self.facts.items())), *notes, "<p>Beside the paper:</p>", claims])

    @property
    def counted(self) -> list[str]:
        """How many claims have each verdict, in a line for each atlas; without a claim, no line."""
        if not self.members:
            return list(filter(None, [counted(self.sections)]))
        return [f"{name}. {line}" for name, report in self.members.items() for line in report.counted]

    @property
    def claims_table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Headings and rows of the table of claims: of the paper's numbers and this atlas's, or of claims x atlases."""
        if not self.members:
            return CLAIM_HEADINGS, list(claim_rows(self.sections))
        rows = [
            (
                statement,
                claims[0].paper,
                *(f"{found[name].verdict}: {found[name].measured}" if name in found else "-" for name in self.members),
            )
            for statement, found in self.by_statement.items()
            for claims in [list(found.values())]
        ]
        return (*CLAIM_HEADINGS[:2], *self.members), rows

    @property
    def by_statement(self) -> dict[str, dict[str, Claim]]:
        """Of several atlases: statement of a claim to the claims of the atlases that have it, by name."""
        statements = dict.fromkeys(
            claim.statement for report in self.members.values() for section in report.sections for claim in section.claims
        )
        return {
            statement: {
                name: claim
                for name, report in self.members.items()
                for section in report.sections
                for claim in section.claims
                if claim.statement == statement
            }
            for statement in statements
        }

    def section(self, key: str) -> Section:
        """The section with this key. Raises `KeyError`."""
        return {section.key: section for section in self.sections}[key]

    def table(self, name: str) -> Table | None:
        """The table of this name; None if no section has it."""
        return next((table for section in self.sections for table in section.tables if table.name == name), None)

    @property
    def plots(self) -> dict[str, Plot]:
        """Every figure of the report, by its name."""
        return {plot.name: plot for section in self.sections for plot in section.plots}

    def plot(self, name: str, axes: Any = None) -> list[Any]:
        """Draw one of `plots` with matplotlib.

        Args:
            name: Name of the figure.
            axes: Matplotlib axes, one for each panel of the figure; None for a new figure.

        Returns:
            The axes, one for each panel.

        Raises:
            UsageError: The report has no such figure, or the number of axes is wrong.
            MissingPackageError: matplotlib is not installed (extra ``plot``).
        """
        plot = self.plots.get(name)
        if plot is None:
            raise unknown("figure", name, self.plots)
        if axes is None:
            try:
                import matplotlib as mpl
                from matplotlib import pyplot
            except ImportError:
                raise MissingPackageError("matplotlib", "plot", "the figures of a report") from None
            with mpl.rc_context(drawing.LOOK):
                return drawing.draw_figure(plot, pyplot.figure(figsize=plot.size, layout="constrained"))
        panels = list(getattr(axes, "flat", [axes] if hasattr(axes, "plot") else axes))
        if len(panels) != len(plot.draw):
            raise UsageError(
                f"the figure {name} has {len(plot.draw)} panels, and {len(panels)} axes were given",
                hint=f"make the axes with: pyplot.subplots(1, {len(plot.draw)})",
            )
        drawing.draw_panels(plot, panels)
        return panels

    def as_json(self) -> dict[str, Any]:
        """Every number of the pages as JSON-ready data, except that numbers may be NaN."""
        own = {"atlases": {name: report.as_json() for name, report in self.members.items()}} if self.members else {}
        return {
            "title": self.title,
            "facts": self.facts,
            "notes": self.notes,
            **own,
            "sections": {
                section.key: {
                    "title": section.title,
                    "numbers": dict(section.numbers),
                    "missing": section.missing,
                    "claims": [vars(claim) for claim in section.claims],
                }
                for section in self.sections
            },
        }


def make_report(atlas: Atlas) -> Report:
    """Make the `Report` of ``atlas``. Its numbers depend on the file alone.

    Raises:
        AtlasError: The atlas holds no measured LP.
    """
    units, without = find_units(atlas)
    if not units:
        raise AtlasError(f"{atlas.path} holds no measured LP", hint=f"see: atlas info {atlas.path}")
    rho = atlas.labels.rho
    steps = (
        lambda: concentrated.make(units, rho),
        lambda: factors.make(units),
        lambda: controls.make(units),
        lambda: halo.make(units, atlas.calibration.tokens),
        lambda: reading.make(units, _even_spread(atlas)),
    )
    sections = []
    with progress_bar(len(steps) + len(units), "step", "report") as bar:
        for step in steps:
            sections.append(step())
            bar.update()
        sections.append(stable.make(units, rho, bar.update))
    effects = measured.make(units, atlas.calibration.tokens)
    if effects is not None:
        sections.append(effects)
    notes = []
    if atlas.status != "complete":
        notes.append(f"This atlas is {one_line(atlas.status)}: its build is unfinished, and its numbers will change.")
    if atlas.core_rho != rho:
        notes.append(
            f"Labels refer to the top {rho:.4g} of the channels, but connectivity and redundancy still refer to the top "
            f"{atlas.core_rho:.4g}. The statements about the halo therefore mix two different cores."
        )
    if without:
        notes.append(f"{without:,} FFNs or experts without LP are left out, because no calibration token reached them.")
    if has_experts(units):
        notes.append(
            "Each expert that tokens reached counts as one FFN. Intervals resample whole FFNs with all of their experts."
        )
    calibration = atlas.calibration
    return Report(
        title=f"Importance atlas of {one_line(atlas.model.id)}",
        facts={
            "file": one_line(atlas.path.name),
            "content SHA-256": atlas.content_sha256,
            "model": one_line(atlas.model.id),
            "revision": one_line(atlas.model.revision) or "none recorded",
            "weights": one_line(atlas.model.dtype),
            "calibration": f"{calibration.sequences:,} x {calibration.seq_len:,} tokens of "
            + ", ".join(dict.fromkeys(one_line(row.source) for row in calibration.contributions))
            + calibration.ends_note,
            "labels": f"rho {atlas.labels.rho:g}, eta {atlas.labels.eta:g}, K {atlas.labels.support_size}",
            "FFNs": f"{len(atlas.blocks):,}",
            "ranked units": f"{len(units):,}",
        },
        notes=tuple(notes),
        sections=tuple(sections),
        explored=explored(units, several_stacks=len(atlas.stacks) > 1),
    )


def _even_spread(atlas: Atlas) -> float | None:
    """Share of the residual dimensions that are in a write support; None if the model's configuration has no hidden size."""
    width = (configuration(atlas.model.config) or {}).get("hidden_size")
    return min(1.0, atlas.labels.support_size / width) if isinstance(width, int) and width > 0 else None
