"""Refuse a cut whose file would hardly shrink: zero channels would take the place of the removed ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chanfmt.base.errors import UsageError
from surgery.planning.formats import GGUF
from surgery.planning.layouts import CUSTOM, DECI, UNIFORM, layout_rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from surgery.planning.plan import PruningPlan
    from surgery.planning.written import Size


def check_plan(plan: PruningPlan) -> None:
    """Raise `UsageError` as `check_size`, as far as the atlas of ``plan`` can tell."""
    if plan.layout == UNIFORM and plan.size is not None and all(block.width_field is not None for block in plan.blocks):
        check_size(plan, [block.width_field for block in plan.blocks], plan.widths, plan.size)


def check_size(plan: PruningPlan, fields: Sequence[str | None], widths: Sequence[int], size: Size) -> None:
    """Refuse a cut whose file shrinks by less than half of what was asked.

    Args:
        fields: Name of the config field that sets the width of each FFN of ``plan``; empty if there is none.
        widths: Width of each FFN in the result.

    Raises:
        UsageError: The file would hardly shrink.
    """
    if not size.is_small:
        return
    padded = [
        (block, field)
        for block, field, width in zip(plan.blocks, fields, widths, strict=True)
        if block.is_cut and width > block.n_kept
    ]
    without = [block for block, field in padded if not field]
    shared = [(block, field) for block, field in padded if field]
    reasons = []
    if without:
        reasons.append(
            f"stock transformers knows no config field that sets the width of {_ffns([block.module for block in without])} alone"
        )
    if shared:
        names = sorted({field.partition("[")[0] for _, field in shared if field})
        reasons.append(
            f"{', '.join(names)} sets the width of {_ffns([block.module for block, _ in shared])} together with that of FFNs "
            "that keep more"
        )
    raise UsageError(
        f"the file would shrink by {size.written:,} of the {size.asked:,} parameters of the removed channels, because "
        f"{' and '.join(reasons) or 'zero channels fill it up'}",
        hint=_ways_out(plan, linked=bool(shared)),
    )


def _ffns(modules: Sequence[str]) -> str:
    return modules[0] + (f" and {len(modules) - 1} other FFNs" if len(modules) > 1 else "")


def _ways_out(plan: PruningPlan, *, linked: bool) -> str:
    ways = []
    if linked and plan.allocation != "uniform":
        ways.append("use --allocation uniform")
    if linked and (plan.layers is not None or plan.stack):
        ways.append(
            f"leave out {' and '.join(name for name, used in (('--layers', plan.layers), ('--stack', plan.stack)) if used)}"
        )
    rule = layout_rule(UNIFORM, plan.blocks, plan.model_config)
    other = next((layout for layout in (DECI, CUSTOM) if layout not in rule.obstacles), None)
    if plan.format != GGUF and linked and other:
        ways.insert(0, f"use --layout {other}")
    return ", or ".join((*ways, "add --allow-padding to write zeros in place of the removed channels"))
