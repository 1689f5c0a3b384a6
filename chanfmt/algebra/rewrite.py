"""Functions that merging, relabelling and stripping share: each writes a new atlas from others."""

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

    from chanfmt.format.reader import Atlas
    from chanfmt.format.records import AtlasContent, LabelSettings, StackData

STORING = ("ablate", "replaceability")
"""Commands in a history that stored columns, and changed nothing else."""


def check_finished(content: AtlasContent) -> None:
    """Raise `AtlasError` if ``content`` comes from an unfinished build."""
    if content.status != "complete":
        raise AtlasError(
            "the atlas is partial: it comes from an unfinished build", hint="finish it with: atlas build ... --resume"
        )


def check_complete(content: AtlasContent, score: str) -> None:
    """Raise `AtlasError` if ``content`` cannot be labelled: the build is unfinished, or a stack lacks the metric ``score``."""
    check_finished(content)
    for stack in content.stacks:
        if score not in schema.METRIC_BY_NAME or score not in stack.variables:
            raise AtlasError(f"the atlas holds no {score!r} for {stack.name}, and its supernodes are ranked by {score!r}")


def label_variables(variables: Mapping[str, np.ndarray], settings: LabelSettings) -> dict[str, np.ndarray]:
    """``label`` and ``protection`` of every FFN of a stack, from the stack's other ``variables`` (spec section "Labels").

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
    """``before`` if a variable of ``stacks`` still refers to the core of that share, otherwise the rho of ``settings``."""
    return before if any(name in stack.variables for stack in stacks for name in schema.resting_on(schema.CORE)) else settings.rho


def dropped_names(candidates: Iterable[str], stacks: Iterable[StackData]) -> tuple[str, ...]:
    """Stack variables among ``candidates`` that no stack holds, in the schema's order: the root's ``dropped``."""
    missing = set(candidates).difference(*(stack.variables for stack in stacks))
    return tuple(variable.name for variable in schema.STACK_VARIABLES if variable.name in missing)


def noted(content: AtlasContent, command: str, inputs: Sequence[str], sources: Sequence[str] = (), **more: Any) -> AtlasContent:
    """``content`` with one more line of history.

    Args:
        command: ``merge``, ``label``, ...
        inputs: ``content_sha256`` of each input.
        sources: Address of each input on the Hub, empty for a local file. The line names them if one is not empty.
        more: Further keys of the line.
    """
    line = {"command": command, "version": __version__, "inputs": list(inputs), **more}
    if any(sources):
        line["sources"] = list(sources)
    producer = dataclasses.replace(content.producer, history=(*content.producer.history, line))
    return dataclasses.replace(content, producer=producer)


def measured_sha256(atlas: Atlas) -> str:
    """``content_sha256`` of ``atlas`` before measured effects of its channels were stored in it, by its history.

    Such columns say what an experiment found. They change neither the channels that it chooses among nor what it measures, so an
    experiment goes on with the atlas that holds its own numbers.
    """
    digest = atlas.content_sha256
    for line in reversed(atlas.producer.history):
        inputs = line.get("inputs")
        if line.get("command") not in STORING or not isinstance(inputs, list) or len(inputs) != 1:
            break
        digest = str(inputs[0])
    return digest
