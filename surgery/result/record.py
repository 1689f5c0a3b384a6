"""The record of a cut, behind ``surgery.json``, the model card and the tables."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.own_names import NARROWED_FIELD
from surgery.planning.layouts import (
    CUSTOM,
    CUSTOM_FIELDS,
    DECI,
    UNIFORM,
    custom_changes,
    deci_changes,
    layout_text,
    needs_code,
)
from surgery.planning.options import MAX_LAYER_SPARSITY
from surgery.planning.plan import percent
from surgery.planning.sizes import Sizes, applied_changes
from surgery.planning.width import default_multiple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from surgery.cut.check import LogitCheck, ShapeCheck
    from surgery.cut.extra_layers import ExtraLayers
    from surgery.cut.gguf.record import GgufRecord
    from surgery.planning.decide import SelectorEffect
    from surgery.planning.plan import Applied, BlockPlan, Change, PruningPlan
    from surgery.recovery.options import RecoveryReport
    from surgery.result.base import Base
    from surgery.result.manifest import Manifest
    from surgery.result.verdict import Verdict

REPORT_FORMAT = "surgery/1"
_SHOWN = 0.0005
"""Difference of two shares that shows in a summary."""


@dataclass(frozen=True)
class Report:
    """A cut that was made and that passed its checks.

    Attributes:
        plan: Which channels stay.
        base: The model that was cut: the plan's model, or a fine-tune of it.
        applied: How the result is laid out.
        parameters_before, parameters_after: Parameters of the two models. If the plan does not say how many the model has,
            elements of the two checkpoints, which may hold buffers too.
        bytes_before, bytes_after: Bytes of the tensors of the two checkpoints, or of the two GGUF files.
        shapes, logits: The checks. ``logits`` is None if it was not run, and ``logits_skipped`` is then the reason.
        versions: Package to version.
        command: The command line, without directories; empty if Python code made the cut.
        loader: Name of the transformers class that loads the result.
        files: The files of the result. ``surgery.json``, which holds this record, and the card, which may change, are left
            out.
        recovery: How the kept channels were refitted; None if they were not.
        switched: Config fields that changed and that do not follow from the widths: for the biases of a recovery, the dtype, and
            layers that were dropped; dotted if nested.
        extra_layers: What became of layers that stock transformers does not load; None if no width of theirs was concerned.
        dtype: Float that all floating tensors were rounded to; None if they are as the source stores them.
        source_file: Size and bits of the quantised file that the source was made from; empty if there was none.
        set_by: Name of every FFN to the config field that sets its width; empty if none does alone.
        verdict: What the result is good for; None if nobody judged it.
        gguf: How the GGUF file was written; None if the result is a safetensors checkpoint. If it is set, bytes are those of
            the two GGUF files.
    """

    plan: PruningPlan
    base: Base
    applied: Applied = field(repr=False)
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    shapes: ShapeCheck
    logits: LogitCheck | None
    logits_skipped: str
    versions: Mapping[str, str] = field(repr=False)
    command: str
    loader: str
    files: Manifest = field(repr=False)
    recovery: RecoveryReport | None = None
    switched: Mapping[str, Change] = field(default_factory=dict)
    extra_layers: ExtraLayers | None = None
    dtype: str | None = None
    source_file: str = ""
    set_by: Mapping[str, str] = field(default_factory=dict, repr=False)
    verdict: Verdict | None = None
    gguf: GgufRecord | None = None

    @property
    def config_fields(self) -> dict[str, Change]:
        """All config fields that changed, dotted if nested."""
        return {**self.applied.config, **self.switched}

    @property
    def sizes(self) -> Sizes:
        """Parameters, bytes and config before and after the cut."""
        widths = list(self.applied.widths.values())
        changed = {name: (change.before, change.after) for name, change in self.config_fields.items()}
        words: tuple[str, ...] = ()
        if self.plan.layout == DECI:
            words = deci_changes({"model_type": self.plan.model.model_type}, widths)
            changed = {name: pair for name, pair in changed.items() if name in self.switched}
        elif self.plan.layout == CUSTOM:
            listed = {entry["module"] for entry in changed[NARROWED_FIELD][1]}
            words = custom_changes([self.applied.widths[block.name] for block in self.plan.blocks if block.module in listed])
            changed = {name: pair for name, pair in changed.items() if name not in CUSTOM_FIELDS}
        words = (*words, *applied_changes(changed))
        return Sizes((self.parameters_before, self.parameters_after), (self.bytes_before, self.bytes_after), words)

    @property
    def padded(self) -> list[BlockPlan]:
        """FFNs that are padded with zero channels."""
        return [block for block in self.plan.blocks if self.applied.widths[block.name] > block.n_kept]

    def to_json(self) -> dict[str, Any]:
        """The content of ``surgery.json``."""
        return {
            "format": REPORT_FORMAT,
            **plan_json(self.plan),
            "base": asdict(self.base),
            "parameters": {"before": self.parameters_before, "after": self.parameters_after},
            "bytes": {"before": self.bytes_before, "after": self.bytes_after},
            "dtype": self.dtype,
            "source_file": self.source_file,
            "fingerprint": self.applied.fingerprint,
            "config_fields": {name: asdict(change) for name, change in self.config_fields.items()},
            "padded_to": {block.name: self.applied.widths[block.name] for block in self.padded},
            "checks": {
                "shapes": asdict(self.shapes),
                "logits": asdict(self.logits) if self.logits else {"skipped": self.logits_skipped},
            },
            "recovery": self.recovery.to_json() if self.recovery else None,
            "extra_layers": self.extra_layers.to_json() if self.extra_layers else None,
            "verdict": self.verdict.to_json() if self.verdict else None,
            "gguf": self.gguf.to_json() if self.gguf else None,
            "versions": dict(self.versions),
            "command": self.command,
            "loader": self.loader,
            "files": {name: asdict(record) for name, record in self.files.items()},
        }


def plan_json(plan: PruningPlan) -> dict[str, Any]:
    """A plan for programs, without the channel ids, which are in the plan file."""
    return {
        "source": asdict(plan.model),
        "atlas_sha256": plan.atlas_sha256,
        "atlas_source": plan.atlas_source,
        "calibration": plan.calibration,
        "method": plan.method,
        "protect": list(plan.protect),
        "unprotect": list(plan.unprotect),
        "protected": plan.protected,
        "released": plan.released,
        "protection": [asdict(effect) | {"cost_share": effect.cost / plan.channels_kept} for effect in plan.protection],
        "seed": plan.seed,
        "sparsity": {
            "asked": plan.sparsity,
            "reached": plan.sparsity_reached,
            "reached_in_scope": plan.scope_sparsity_reached,
        },
        "allocation": plan.allocation,
        "max_layer_sparsity": plan.max_layer_sparsity,
        "scope": {"layers": plan.layers, "stack": list(plan.stack), "channels": plan.scope_channels},
        "invert": plan.invert,
        "multiple_of": plan.multiple_of,
        "experts": plan.evidence.to_json() if plan.evidence else None,
        "layout": plan.layout,
        "parameters": {"before": plan.parameters or None, "after": plan.parameters_after},
        "bytes": _before_after(plan.sizes.bytes if plan.sizes else None),
        "layers": [
            {
                "layer": block.layer_index,
                "module": block.module,
                "channels": block.n_channels,
                "experts": block.n_experts,
                "kept": block.n_kept,
                "written": width,
                "supernodes": block.supernodes,
                "supernodes_removed": block.supernodes - block.supernodes_kept,
                "lp_kept": block.lp_kept,
            }
            for block, width in zip(plan.blocks, plan.widths, strict=True)
        ],
    }


def summary_rows(plan: PruningPlan, report: Report | None = None) -> list[list[str]]:
    """Pairs of a quantity and its value: what was asked and reached, and with ``report`` what was written and checked."""
    supernodes = sum(block.supernodes for block in plan.blocks)
    kept = sum(block.supernodes_kept for block in plan.blocks)
    model = report.base if report else plan.model
    sizes = report.sizes if report else plan.sizes
    rows = [
        *(_size_rows(sizes, report) if sizes else []),
        ["model", " @ ".join(text for text in (model.id, model.revision) if text)],
        *([["atlas", plan.atlas_source]] if plan.atlas_source else []),
        ["method", plan.method],
        ["allocation", _allocation(plan)],
        *_protection_rows(plan),
        ["sparsity", _sparsity(plan)],
        *([["rounding", _rounding(plan)]] if _is_rounded(plan) else []),
        ["width", _widths(plan)],
        *([["experts", str(plan.evidence)]] if plan.evidence else []),
        *([["layout", layout_text(plan.layout, plan.model_config, plan.widths)]] if plan.layout != UNIFORM else []),
        ["supernodes removed", f"{supernodes - kept:,} of {supernodes:,}"],
        ["LP mass kept", _lp_summary(plan)],
    ]
    if report:
        rows += [
            *_file_rows(report),
            *([["zero channels", _padding_text(report)]] if report.padded else []),
            *([["extra layers", report.extra_layers.summary()]] if report.extra_layers else []),
            ["check: shapes", f"{report.shapes.tensors:,} tensors, as {_loading_code(report)} expects them"],
            ["check: logits", _logit_text(report)],
            *([["recovery", report.recovery.summary()]] if report.recovery else []),
        ]
    return rows


def _loading_code(report: Report) -> str:
    return "transformers" if needs_code(report.plan.layout) else "stock transformers"


def _file_rows(report: Report) -> list[list[str]]:
    """The file that the source was made from, and the file that the result is, if they are GGUF files."""
    if report.gguf is None:
        return [["source file", f"{report.source_file}; the result is not quantised"]] if report.source_file else []
    notes = [["note", note] for note in report.gguf.notes]
    source = [["source file", report.source_file]] if report.source_file else []
    return [*source, ["GGUF", report.gguf.summary], *notes, ["check: GGUF", report.gguf.check]]


def _before_after(pair: tuple[int, int] | None) -> dict[str, int | None]:
    before, after = pair or (None, None)
    return {"before": before, "after": after}


def _size_rows(sizes: Sizes, report: Report | None) -> list[list[str]]:
    rows = sizes.rows
    if report and report.dtype:
        rows = [[name, f"{text}, rounded to {report.dtype}" if name == "size" else text] for name, text in rows]
    return rows


def _allocation(plan: PruningPlan) -> str:
    text = "uniform: the same share of every FFN"
    if plan.allocation == "global":
        cap = MAX_LAYER_SPARSITY if plan.max_layer_sparsity is None else plan.max_layer_sparsity
        text = f"global: the lowest scores of all FFNs, at most {cap:.4g} of each"
    return text + (", inverted: the channels that would go stay, and the others go" if plan.invert else "")


def _protection_rows(plan: PruningPlan) -> list[list[str]]:
    """The protected channels, and what each selector did."""
    names = [effect.selector for effect in plan.protection if effect.selector != "none"]
    total = f"{', '.join(names) or 'nothing'} ({_number_of(plan.protected, 'channel')})"
    rows = [["protected", total + (", before the inversion" if plan.invert and plan.protected else "")]]
    rows += [[f"- {effect.selector}", _effect(plan, effect)] for effect in plan.protection if effect.selector != "none"]
    if plan.unprotect:
        released = _number_of(plan.released, "channel")
        rows.append(["unprotected", f"{', '.join(plan.unprotect)} ({released} no longer protected)"])
    return rows


def _effect(plan: PruningPlan, effect: SelectorEffect) -> str:
    text = _number_of(effect.selected, "channel")
    if effect.new < effect.selected:
        text += f", {effect.new:,} of which are new"
    if not effect.cost:
        return text + f"; no effect: {_kept_anyway(plan, effect)}"
    cost = f"{_number_of(effect.cost, 'other channel')} go in their place ({effect.cost / plan.channels_kept:.2%} of the kept)"
    return f"{text}, {effect.safe:,} of which stay anyway; {cost}"


def _kept_anyway(plan: PruningPlan, effect: SelectorEffect) -> str:
    if not effect.new:
        return "all of them are already protected or unprotected"
    return f"{plan.method} keeps all of them anyway"


def _sparsity(plan: PruningPlan) -> str:
    asked = f"{plan.sparsity:.4g} asked"
    if plan.layers is None and not plan.stack:
        return f"{asked}, {plan.sparsity_reached:.4g} reached"
    layers = [] if plan.layers is None else [f"layers {plan.layers}"]
    scope = " of ".join([*layers, *([", ".join(plan.stack)] if plan.stack else [])])
    return f"{asked}, {plan.scope_sparsity_reached:.4g} reached in {scope}; {plan.sparsity_reached:.4g} of the whole model"


def _is_rounded(plan: PruningPlan) -> bool:
    """Whether rounding moved the share so far that it shows."""
    return not plan.invert and abs(plan.scope_sparsity_reached - plan.sparsity) >= _SHOWN


def _rounding(plan: PruningPlan) -> str:
    """Why the share reached is not the share asked."""
    cut = {block.n_channels for block in plan.blocks if block.is_cut}
    steps = {plan.multiple_of or default_multiple(width, width - math.floor(plan.sparsity * width)) for width in cut}
    if plan.multiple_of is None and plan.allocation == "uniform" and len(steps) == 1:
        [step] = steps
        return f"kept widths are multiples of {step}, which fast kernels and quantised types need; --multiple-of 1 cuts exactly"
    if plan.multiple_of is None:
        return "kept widths are multiples that fast kernels and quantised types need; --multiple-of 1 cuts exactly"
    return f"kept widths are multiples of {plan.multiple_of}, as --multiple-of asks"


def _widths(plan: PruningPlan) -> str:
    """Old widths, each with the range of the kept widths."""
    groups: dict[tuple[int, int], list[int]] = {}
    for block in plan.blocks:
        groups.setdefault((block.n_channels, block.n_experts), []).append(block.n_kept)
    texts = []
    for (before, experts), kept in groups.items():
        cut = [width for width in kept if width < before]
        whole = len(kept) - len(cut)
        parts = []
        if cut:
            low, high = min(cut), max(cut)
            after = f"{low:,}" if low == high else f"between {low:,} and {high:,}"
            parts.append(f"{before:,} to {after} in {_number_of(len(cut), 'FFN')}")
        if whole:
            parts.append(f"{before:,} as before in {_number_of(whole, 'FFN')}")
        texts.append(", ".join(parts) + (f" (each of its {experts} experts keeps the same number)" if experts and cut else ""))
    return "; ".join(texts)


def _number_of(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _padding_text(report: Report) -> str:
    """Which FFNs are wider in the file than the number of channels they keep, and why."""
    padded = report.padded
    fixed = [block for block in padded if not report.set_by.get(block.name)]
    shared = len(padded) - len(fixed)
    texts = []
    if shared:
        names = sorted({report.set_by[block.name].partition("[")[0] for block in padded if report.set_by.get(block.name)})
        verb = "sets" if len(names) == 1 else "set"
        texts.append(
            f"{_number_of(shared, 'FFN')} padded with zeros: {', '.join(names)} {verb} the width together with that of FFNs that "
            "keep more"
        )
    if fixed:
        texts.append(
            f"in {_number_of(len(fixed), 'FFN')} the removed channels are zeros, and the file is not smaller there: "
            "no config field sets another width"
        )
    return "; ".join(texts)


def _logit_text(report: Report) -> str:
    if report.logits is None:
        return f"not run: {report.logits_skipped}"
    check = report.logits
    return (
        f"{check.relative_error:.2g} relative to the masked dense model, {check.tolerance:g} allowed "
        f"({check.count} {check.text}, {check.dtype})"
    )


def _lp_summary(plan: PruningPlan) -> str:
    shares = [block.lp_kept for block in plan.blocks if block.lp_kept is not None]
    if not shares:
        return "unknown"
    return f"{percent(statistics.median(shares))} (median; {percent(min(shares))} to {percent(max(shares))})"
