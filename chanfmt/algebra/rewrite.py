"""What the commands that write an atlas anew from others share."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra import labels
from chanfmt.base.errors import AtlasError
from chanfmt.base.version import __version__
from chanfmt.format import schema

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from chanfmt.format.records import AtlasContent, LabelSettings, StackData

WRITE_VARIABLES = ("write_dimension", "write_share")
"""Variables that refer to the write support, and so to ``support_size``, too."""
CORE_VARIABLES = (
    "connectivity",
    "connectivity_at",
    "read_connectivity",
    "redundancy",
    "redundancy_null",
    "redundancy_partner",
    "redundancy_pair",
    *WRITE_VARIABLES,
)
"""Variables that refer to the core, and so to ``core_rho``."""
REDUNDANCY_VARIABLES = (
    "redundancy",
    "redundancy_null",
    "redundancy_tokens",
    "core_covered",
    "redundancy_partner",
    "redundancy_pair",
)
"""Variables that a pass over text measured against the core."""


def check_complete(content: AtlasContent, score: str) -> None:
    """Raise `AtlasError` where ``content`` cannot be labelled: an unfinished build, or without the metric ``score``."""
    if content.status != "complete":
        raise AtlasError("the atlas is the checkpoint of an unfinished build", hint="finish that one first")
    for stack in content.stacks:
        if score not in schema.METRIC_BY_NAME or score not in stack.variables:
            raise AtlasError(f"the atlas holds no {score!r} for {stack.name}, by which supernodes are ranked")


def label_variables(variables: Mapping[str, np.ndarray], settings: LabelSettings) -> dict[str, np.ndarray]:
    """``label`` and ``protection`` of every FFN of a stack, from its other ``variables`` (spec section "Labels").

    Returns:
        uint8 and float32 arrays (layer[, expert], channel).
    """
    score, conn, redundancy = (variables.get(name) for name in (settings.score, "connectivity", "redundancy"))
    assert score is not None
    label = np.empty(score.shape, dtype=np.uint8)
    protection = np.empty(score.shape, dtype=np.float32)
    for at in np.ndindex(score.shape[:-1]):
        label[at], protection[at] = labels.label_ffn(
            score[at], None if conn is None else conn[at], None if redundancy is None else redundancy[at], settings
        )
    return {"label": label, "protection": protection}


def core_rho(stacks: Iterable[StackData], before: float, settings: LabelSettings) -> float:
    """``before`` while something still refers to that core, and rho where nothing does."""
    return before if any(name in stack.variables for stack in stacks for name in CORE_VARIABLES) else settings.rho


def dropped_names(candidates: Iterable[str], stacks: Iterable[StackData]) -> tuple[str, ...]:
    """The root's ``dropped``: stack variables among ``candidates`` that no stack holds, in the schema's order."""
    missing = set(candidates).difference(*(stack.variables for stack in stacks))
    return tuple(variable.name for variable in schema.STACK_VARIABLES if variable.name in missing)


def noted(content: AtlasContent, command: str, inputs: Sequence[str], sources: Sequence[str] = (), **more: Any) -> AtlasContent:
    """``content`` with one more line of history.

    Args:
        command: ``merge``, ``label``, ...
        inputs: ``content_sha256`` of the files read.
        sources: Where each of them was on the Hub, empty where it was not; the line says it where one was.
        more: What else the line says.
    """
    line = {"command": command, "version": __version__, "inputs": list(inputs), **more}
    if any(sources):
        line["sources"] = list(sources)
    producer = dataclasses.replace(content.producer, history=(*content.producer.history, line))
    return dataclasses.replace(content, producer=producer)
