"""The measured losses of single channels, as the columns of an atlas."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.format.columns import ABLATION_LOSS, MEAN_ABLATION_LOSS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from surgery.experiments.ablation.experiment import Experiment

EXPERIMENT = "channels"
"""The experiment that removes one channel at a time."""


def column_names(experiment: Experiment) -> tuple[str, str]:
    """The columns of the loss that ``experiment`` measures, and of its standard error."""
    name = ABLATION_LOSS if experiment.means is None else MEAN_ABLATION_LOSS
    return name, f"{name}_error"


def channels_of(experiment: Experiment) -> dict[int, np.ndarray]:
    """Block index to the channels that any condition removes, bool of `Block.shape`."""
    masks: dict[int, np.ndarray] = {}
    for condition in experiment.conditions:
        for index, mask in condition.removed.items():
            masks[index] = masks[index] | mask if index in masks else mask
    return masks


def losses_by_column(experiment: Experiment, rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, np.ndarray]]:
    """Name of each column to block index to the rises of the loss in ``rows``, which belong to the conditions in their order."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for name, value in zip(column_names(experiment), ("delta_nll", "delta_standard_error"), strict=True):
        arrays = found[name] = {index: np.full(mask.shape, np.nan) for index, mask in channels_of(experiment).items()}
        for condition, row in zip(experiment.conditions, rows, strict=True):
            [(index, mask)] = condition.removed.items()
            arrays[index][mask] = np.nan if row[value] is None else row[value]
    return found
