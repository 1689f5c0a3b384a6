"""The experiments by name."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from surgery.experiments.ablation.channels import plan_channels
from surgery.experiments.ablation.dose import plan_dose
from surgery.experiments.ablation.halo import plan_halo
from surgery.experiments.ablation.removal import plan_removal

if TYPE_CHECKING:
    from collections.abc import Callable

    from chanfmt.format.reader import Atlas
    from surgery.experiments.ablation.experiment import Experiment

EXPERIMENTS: dict[str, Callable[[Atlas, Any], Experiment]] = {
    "remove": partial(plan_removal, mean=False),
    "mean-replace": partial(plan_removal, mean=True),
    "halo": plan_halo,
    "dose": plan_dose,
    "channels": plan_channels,
}


def plan_experiment(name: str, atlas: Atlas, options: Any) -> Experiment:
    """The conditions of the experiment ``name`` under its own options. Raises as it does."""
    return EXPERIMENTS[name](atlas, options)
