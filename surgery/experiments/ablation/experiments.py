"""The experiments by name."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from chanfmt.base.errors import UsageError
from surgery.experiments.ablation.channels import ChannelOptions, plan_channels
from surgery.experiments.ablation.dose import DoseOptions, plan_dose
from surgery.experiments.ablation.halo import HaloOptions, plan_halo
from surgery.experiments.ablation.removal import RemovalOptions, plan_removal
from surgery.experiments.ablation.weights import WeightOptions, plan_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from chanfmt.format.reader import Atlas
    from surgery.experiments.ablation.experiment import Experiment


class Kind(NamedTuple):
    """A kind of experiment.

    Attributes:
        options: Dataclass of its options.
        plan: Makes the conditions from an atlas and the options.
    """

    options: type[Any]
    plan: Callable[[Atlas, Any], Experiment]


EXPERIMENTS = {
    "remove": Kind(RemovalOptions, partial(plan_removal, mean=False)),
    "mean-replace": Kind(RemovalOptions, partial(plan_removal, mean=True)),
    "halo": Kind(HaloOptions, plan_halo),
    "dose": Kind(DoseOptions, plan_dose),
    "channels": Kind(ChannelOptions, plan_channels),
    "weights": Kind(WeightOptions, plan_weights),
}


def kind_of(name: str) -> Kind:
    """The kind of experiment called ``name``. Raises `UsageError` if there is none."""
    if name not in EXPERIMENTS:
        raise UsageError(f"unknown experiment {name!r}; choose from {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]
