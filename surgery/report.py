"""What was cut and what it gave: one record behind ``surgery.json``, the model card and the tables."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from surgery.check import LogitCheck, ShapeCheck
    from surgery.plan import Applied, BlockPlan, PruningPlan

REPORT_FORMAT = "surgery/1"


@dataclass(frozen=True)
class Report:
    """A cut that was made and that passed its checks.

    Attributes:
        plan: What was cut.
        applied: How the result is laid out.
        parameters_before, parameters_after: Elements of the checkpoints.
        bytes_before, bytes_after: Bytes of their tensors.
        shapes, logits: The checks; ``logits`` is None where it was not run, for the reason ``logits_skipped``.
        versions: Package to version.
        command: The command line.
    """

    plan: PruningPlan
    applied: Applied
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    shapes: ShapeCheck
    logits: LogitCheck | None
    logits_skipped: str
    versions: Mapping[str, str]
    command: str

    @property
    def padded(self) -> list[BlockPlan]:
        """FFNs that are filled up with zero channels."""
        return [block for block in self.plan.blocks if self.applied.widths[block.name] > block.n_kept]

    def to_json(self) -> dict[str, Any]:
        """The content of ``surgery.json``."""
        return {
            "format": REPORT_FORMAT,
            **plan_json(self.plan),
            "parameters": {"before": self.parameters_before, "after": self.parameters_after},
            "bytes": {"before": self.bytes_before, "after": self.bytes_after},
            "fingerprint": self.applied.fingerprint,
            "config_fields": {name: asdict(change) for name, change in self.applied.config.items()},
            "padded_to": {block.name: self.applied.widths[block.name] for block in self.padded},
            "checks": {
                "shapes": asdict(self.shapes),
                "logits": asdict(self.logits) if self.logits else {"skipped": self.logits_skipped},
            },
            "versions": dict(self.versions),
            "command": self.command,
        }


def plan_json(plan: PruningPlan) -> dict[str, Any]:
    """A plan for machines, without the channel ids (those are in the plan file)."""
    return {
        "source": asdict(plan.model),
        "atlas_sha256": plan.atlas_sha256,
        "calibration": plan.calibration,
        "method": plan.method,
        "protect": list(plan.protect),
        "protected": plan.protected,
        "seed": plan.seed,
        "sparsity": {"asked": plan.sparsity, "reached": plan.sparsity_reached},
        "multiple_of": plan.multiple_of,
        "layers": [
            {
                "layer": block.layer_index, "module": block.module, "channels": block.n_channels,
                "kept": block.n_kept, "supernodes": block.supernodes,
                "supernodes_removed": block.supernodes - block.supernodes_kept, "lp_kept": block.lp_kept,
            }
            for block in plan.blocks
        ],
    }


def layer_rows(plan: PruningPlan) -> tuple[list[str], list[list[str]]]:
    """Headings and one row per FFN."""
    headings = ["layer", "module", "channels", "kept", "supernodes", "removed", "LP kept"]
    rows = [
        [str(block.layer_index), block.module, f"{block.n_channels:,}", f"{block.n_kept:,}", str(block.supernodes),
         str(block.supernodes - block.supernodes_kept), _percent(block.lp_kept)]
        for block in plan.blocks
    ]
    return headings, rows


def summary_rows(plan: PruningPlan, report: Report | None = None) -> list[list[str]]:
    """What was asked and reached, as pairs of a quantity and its value."""
    supernodes = sum(block.supernodes for block in plan.blocks)
    kept = sum(block.supernodes_kept for block in plan.blocks)
    widths = ", ".join(
        f"{before:,} to {after:,} in {sum(block.n_channels == before for block in plan.blocks)} FFNs"
        for before, after in {block.n_channels: block.n_kept for block in plan.blocks}.items()
    )
    rows = [
        ["model", " @ ".join(text for text in (plan.model.id, plan.model.revision) if text)],
        ["method", plan.method],
        ["protected", f"{', '.join(plan.protect) or 'nothing'} ({plan.protected:,} channels)"],
        ["sparsity", f"{plan.sparsity:.4g} asked, {plan.sparsity_reached:.4g} reached"],
        ["width", widths],
        ["supernodes removed", f"{supernodes - kept:,} of {supernodes:,}"],
        ["LP mass kept", _lp_summary(plan)],
    ]
    if report:
        share = 1 - report.parameters_after / report.parameters_before
        rows += [
            ["parameters", f"{report.parameters_before:,} to {report.parameters_after:,} ({share:.1%} removed)"],
            ["size", f"{report.bytes_before / 1e6:,.1f} MB to {report.bytes_after / 1e6:,.1f} MB"],
            *([["zero channels", _padding_text(report)]] if report.padded else []),
            ["check: shapes", f"{report.shapes.tensors:,} tensors, as stock transformers expects them"],
            ["check: logits", _logit_text(report)],
        ]
    return rows


def _padding_text(report: Report) -> str:
    """Which FFNs are wider in the file than what they keep, and why."""
    padded = report.padded
    if all(report.applied.widths[block.name] == block.n_channels for block in padded):
        return (f"{len(padded)} FFNs keep their width, with zeros for what was removed: "
                "no config field gives stock code another one there")
    return f"{len(padded)} FFNs are filled up to the width of the widest: stock code knows one width for all of them"


def _logit_text(report: Report) -> str:
    if report.logits is None:
        return f"not run: {report.logits_skipped}"
    check = report.logits
    return (f"{check.relative_error:.2g} relative to the masked dense model, {check.tolerance:g} allowed "
            f"({check.count} {check.text}, {check.dtype})")


def _lp_summary(plan: PruningPlan) -> str:
    shares = [block.lp_kept for block in plan.blocks if block.lp_kept is not None]
    if not shares:
        return "unknown"
    return f"{_percent(statistics.median(shares))} (median; {_percent(min(shares))} to {_percent(max(shares))})"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"
