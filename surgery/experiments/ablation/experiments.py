"""The experiments by name."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from chanfmt.base.errors import UsageError
from surgery.experiments.ablation.channels import ChannelOptions, plan_channels
from surgery.experiments.ablation.dose import DoseOptions, plan_dose
from surgery.experiments.ablation.halo import HaloOptions, plan_halo
from surgery.experiments.ablation.removal import RemovalOptions, plan_removal

if TYPE_CHECKING:
    from collections.abc import Callable

    from chanfmt.format.reader import Atlas
    from surgery.experiments.ablation.experiment import Experiment


class Kind(NamedTuple):
    """A kind of experiment.

    Attributes:
        summary: What it does, for ``--help``.
        options: Dataclass of its options.
        plan: Makes the conditions from an atlas and the options.
    """

    summary: str
    options: type[Any]
    plan: Callable[[Atlas, Any], Experiment]


EXPERIMENTS = {
    "remove": Kind("remove chosen channels", RemovalOptions, partial(plan_removal, mean=False)),
    "mean-replace": Kind("replace each chosen channel by its mean", RemovalOptions, partial(plan_removal, mean=True)),
    "halo": Kind("remove the halo with supernodes kept and removed, against channels of equal LP", HaloOptions, plan_halo),
    "dose": Kind("at one sparsity, remove a growing share of the supernodes in place of other channels", DoseOptions, plan_dose),
    "channels": Kind(
        "remove single channels across the range of LP, and compare their cost with LP", ChannelOptions, plan_channels
    ),
}


def kind_of(name: str) -> Kind:
    """The kind of experiment called ``name``. Raises `UsageError` if there is none."""
    if name not in EXPERIMENTS:
        raise UsageError(f"unknown experiment {name!r}; choose from {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]
