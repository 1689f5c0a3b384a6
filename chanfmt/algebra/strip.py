"""An atlas for sharing: metrics and labels without the sums behind them (spec sections "Calibration", "Stacks")."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from chanfmt.algebra.rewrite import check_finished, dropped_names
from chanfmt.format import schema

if TYPE_CHECKING:
    from chanfmt.format.records import AtlasContent


def stripped(content: AtlasContent, *, keep_tokens: bool = False) -> AtlasContent:
    """``content`` without `chanfmt.format.schema.STRIPPED` and, unless ``keep_tokens``, without the calibration token ids.

    ``dropped`` names the stack variables that are left out. The result cannot be merged. Everything else stays
    unchanged, including extensions.

    Raises:
        AtlasError: The build is unfinished, so nothing would be left.
    """
    check_finished(content)
    stacks = tuple(
        dataclasses.replace(
            stack, variables={name: values for name, values in stack.variables.items() if name not in schema.STRIPPED}
        )
        for stack in content.stacks
    )
    calibration = content.calibration
    if not keep_tokens:
        calibration = dataclasses.replace(calibration, token_ids=None)
    dropped = dropped_names({*content.dropped, *schema.STRIPPED}, stacks)
    return dataclasses.replace(content, calibration=calibration, stacks=stacks, dropped=dropped)
