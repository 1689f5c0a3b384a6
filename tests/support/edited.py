"""Atlases with chosen arrays replaced."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.format.reader import Atlas
from chanfmt.format.writer import write_atlas

if TYPE_CHECKING:
    from pathlib import Path

    from chanfmt.format.records import AtlasContent


def edited(path: Path, content: AtlasContent, **variables: np.ndarray | None) -> Atlas:
    """``content`` with variables of its stack replaced, or left out if their value is None."""
    stack = content.stacks[0]
    merged = {name: value for name, value in {**stack.variables, **variables}.items() if value is not None}
    write_atlas(dataclasses.replace(content, stacks=(dataclasses.replace(stack, variables=merged),)), path)
    return Atlas.open(path)


def with_metric(path: Path, content: AtlasContent, name: str, values: np.ndarray) -> Atlas:
    """``content`` with a metric of another program, ``x_lab/name``, of its first stack: float (layer, channel)."""
    from chanfmt.format.records import ExtensionGroup, ExtensionVariable

    stack = content.stacks[0]
    scales = [
        ExtensionVariable("layer", ("layer",), np.asarray(stack.layers, "i4"), "layer index in the model", "1", ""),
        ExtensionVariable("channel", ("channel",), np.arange(stack.n_channels, dtype="i4"), "channel index in the FFN", "1", ""),
    ]
    group = ExtensionGroup(
        f"x_lab/{stack.name}", {}, (*scales, ExtensionVariable(name, ("layer", "channel"), values, "a metric", "nats", "sum"))
    )
    write_atlas(dataclasses.replace(content, extensions=(group,)), path)
    return Atlas.open(path)
