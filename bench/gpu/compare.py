"""How much two atlases of the same tokens differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

import chanfmt
from chanfmt.format import schema

if TYPE_CHECKING:
    from pathlib import Path

METRICS = ("lp", "taylor", "curvature", "activation_power", "redundancy", "connectivity", "wanda_group")
LABELS = {"halo": 1, "supernode": 2}


def differences(expected: Path, path: Path) -> dict[str, Any]:
    """How far the metrics and the labels of ``path`` are from those of ``expected``.

    Relative differences are the median and the 99th percentile over channels. Labels have Jaccard indices: None for a label that
    no channel has.
    """
    found: dict[str, Any] = {}
    with chanfmt.open(path) as ours, chanfmt.open(expected) as theirs:
        for metric in METRICS:
            relative = []
            for name, stack in theirs.stacks.items():
                there, here = (np.asarray(item[metric], np.float64).ravel() for item in (stack, ours.stacks[name]))
                known = np.isfinite(there) & np.isfinite(here)
                scale = np.abs(there[known])
                positive = scale > 0
                relative.append(np.abs(here - there)[known][positive] / scale[positive])
            values = np.concatenate(relative)
            if len(values):
                found[metric] = [float(f"{number:.2g}") for number in (np.median(values), np.quantile(values, 0.99))]
        for label, number in LABELS.items():
            there, here = (
                np.concatenate([np.asarray(stack["label"]).ravel() == number for stack in atlas.stacks.values()])
                for atlas in (theirs, ours)
            )
            either = int((there | here).sum())
            found[f"{label}_jaccard"] = round(int((there & here).sum()) / either, 4) if either else None
        found["loss_difference"] = float(f"{abs(ours.calibration.mean_loss / theirs.calibration.mean_loss - 1):.2g}")
    return found


def bits(expected: Path, path: Path) -> dict[str, Any]:
    """Whether all variables of two atlases have the same bits, and the names of those that differ."""
    differing = []
    with chanfmt.open(path) as ours, chanfmt.open(expected) as theirs:
        for name, stack in theirs.stacks.items():
            for variable in schema.STACK_VARIABLES:
                if (
                    variable.name in stack
                    and np.asarray(stack[variable.name]).tobytes() != np.asarray(ours.stacks[name][variable.name]).tobytes()
                ):
                    differing.append(f"{name}/{variable.name}")
    return {"same": not differing, "differing": differing[:8]}
