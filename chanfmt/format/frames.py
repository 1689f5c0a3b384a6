"""An atlas's arrays as xarray and pandas objects, for notebooks. xarray and pandas are imported when they are needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.errors import AtlasError, MissingPackageError
from chanfmt.format import schema

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.format.arrays import AtlasArrays, StackArrays


def stack_dataset(stack: StackArrays) -> Any:
    """Make the dataset of `chanfmt.format.reader.Stack.to_xarray`."""
    try:
        import xarray
    except ImportError:
        raise MissingPackageError("xarray", "notebook", "atlases as xarray datasets") from None
    variables = {}
    for variable in (*(schema.STACK_VARIABLE_BY_NAME[name] for name in stack.variables), *stack.extension_metrics):
        attributes: dict[str, Any] = {"long_name": variable.long_name, "units": variable.units}
        if variable.name == "label":
            attributes |= {"flag_values": list(schema.LABELS), "flag_meanings": " ".join(schema.LABELS.values())}
        variables[variable.name] = (schema.stack_dimensions(variable, stack.kind), stack[variable.name], attributes)
    coordinates: dict[str, Any] = {"layer": stack.layers, "channel": np.arange(stack.n_channels)}
    held = {name for dimensions, _, _ in variables.values() for name in dimensions}
    for name, values in (
        ("expert", np.arange(stack.n_experts)),
        ("split", np.arange(stack.splits)),
        ("support", stack.supports),
        ("nearest", np.arange(schema.NEAREST)),
    ):
        if name in held:
            coordinates[name] = np.asarray(values)
    return xarray.Dataset(variables, coordinates, {"stack": stack.name, "kind": stack.kind, "activation": stack.activation})


def channel_frame(atlas: AtlasArrays, metrics: Sequence[str] | None = None) -> Any:
    """Make the frame of `chanfmt.format.reader.Atlas.to_pandas`."""
    try:
        import pandas as pd
    except ImportError:
        raise MissingPackageError("pandas", "notebook", "atlases as pandas frames") from None
    held = {metric.name: None for stack in atlas.stacks.values() for metric in stack.all_metrics}
    for name in metrics or ():
        if name not in held:
            raise AtlasError(f"{atlas.path} holds no {name!r}", hint=f"metrics it holds: {', '.join(held)}")
    names = list(held if metrics is None else metrics)
    frames = []
    for block, stack in atlas.rows():
        experts = max(1, stack.n_experts)
        columns: dict[str, Any] = {"block": block.index, "layer": block.layer_index, "stack": stack.name}
        if any(other.n_experts for other in atlas.stacks.values()):
            columns["expert"] = np.repeat(np.arange(experts), stack.n_channels) if stack.n_experts else -1
        columns["channel"] = np.tile(np.arange(stack.n_channels), experts)
        if "label" in stack:
            columns["label"] = np.array([schema.LABELS.get(value, str(value)) for value in range(256)])[
                stack.row("label", block.row).ravel()
            ]
        columns |= {name: stack.row(name, block.row).ravel() if name in stack else np.float32(np.nan) for name in names}
        frames.append(pd.DataFrame(columns))
    frame = pd.concat(frames, ignore_index=True)
    for name in ("stack", "label"):
        if name in frame:
            frame[name] = frame[name].astype("category")
    return frame
