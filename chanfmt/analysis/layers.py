"""A statistic of one FFN, for every layer of an array. numpy, and xarray if xarray arrays are given."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OWN = ("split", "channel")
"""Axes that a statistic of one FFN takes, in its order. A DataArray may have others, such as layer and expert."""


def over_layers(function: Callable[..., Any], *arrays: Any, **settings: Any) -> Any:
    """Call ``function`` for every layer, and for every expert.

    Args:
        function: A statistic of one FFN, such as `concentration`.
        arrays: Its arrays, of all layers: numpy arrays (layer, channel) or (layer, expert, channel), or xarray DataArrays as
            `Stack.to_xarray` gives them. Only DataArrays may have an axis ``split``, because its place is in their names.
        settings: Arguments of ``function`` that are the same for every layer, such as ``rho``.

    Returns:
        For a function that returns a number: an array (layer,) or (layer, expert). For a function that returns an array: the
        arrays, stacked; the last axis of a DataArray is ``channel`` if it has that length, and ``point`` otherwise. For a function that returns several numbers: a dictionary from their names to arrays. DataArrays
        give a DataArray, and a Dataset in place of the dictionary, with the coordinates of the layers and experts.
        A layer for which ``function`` returns None has NaN. If it returns None for every layer, the dictionary is empty.

    Raises:
        UsageError: The arrays have different layers, or numpy arrays and DataArrays are mixed.

    >>> from chanfmt.analysis import concentration
    >>> over_layers(concentration, np.array([[6.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0]]), rho=0.25)["top_share"].tolist()
    [0.75, 0.25]
    """
    named = [hasattr(array, "dims") for array in arrays]
    if any(named) and not all(named):
        raise UsageError(
            "some of the arrays are xarray DataArrays, and some are not", hint="pass DataArrays alone, or their .values"
        )
    if not arrays:
        raise UsageError("no array was given", hint="pass one array per argument of the function")
    if all(named):
        return _over_named(function, arrays, settings)
    plain = [np.asarray(array) for array in arrays]
    shapes = {array.shape[:-1] for array in plain}
    if len(shapes) > 1:
        raise UsageError(
            f"the arrays have different layers: {', '.join(str(array.shape) for array in plain)}",
            hint="pass arrays of one stack; their last axis is the channel",
        )
    shape = shapes.pop()
    return _gathered([function(*(array[place] for array in plain), **settings) for place in np.ndindex(shape)], shape)


def _over_named(function: Callable[..., Any], arrays: Sequence[Any], settings: dict[str, Any]) -> Any:
    import xarray

    sizes: dict[str, int] = {}
    for array in arrays:
        for name, size in array.sizes.items():
            if sizes.setdefault(name, size) != size:
                raise UsageError(
                    f"the arrays have different axes: {name} is {sizes[name]} in one and {size} in another",
                    hint="pass arrays of one stack",
                )
    outer = [name for name in sizes if name not in OWN]
    ordered = [array.transpose(*outer, *OWN, missing_dims="ignore") for array in arrays]
    shape = tuple(sizes[name] for name in outer)
    results = []
    for place in np.ndindex(shape):
        at = dict(zip(outer, place, strict=True))
        results.append(function(*(array.isel(at, missing_dims="ignore").values for array in ordered), **settings))
    found = _gathered(results, shape)
    coordinates = {name: array[name] for array in reversed(ordered) for name in array.dims if name in array.coords}

    def named(values: np.ndarray) -> Any:
        # A function of all channels gives one value for each of them, or a row of another length, such as a curve.
        rest = ["channel" if size == sizes.get("channel") else "point" for size in values.shape[len(outer) :]]
        dims = [*outer, *rest]
        return xarray.DataArray(values, {name: coordinates[name] for name in dims if name in coordinates}, dims)

    return xarray.Dataset({name: named(values) for name, values in found.items()}) if isinstance(found, dict) else named(found)


def _gathered(results: Sequence[Any], shape: tuple[int, ...]) -> Any:
    """The results of all layers as an array, or as one array for each number of a dataclass."""
    first = next((result for result in results if result is not None), None)
    if first is None:
        return {}
    if not dataclasses.is_dataclass(first):
        own = np.shape(first)
        unknown = np.full(own, np.nan)
        return np.array([unknown if result is None else result for result in results]).reshape(*shape, *own)
    names = [field.name for field in dataclasses.fields(first) if np.isscalar(getattr(first, field.name))]
    return {
        name: np.array([np.nan if result is None else getattr(result, name) for result in results]).reshape(shape)
        for name in names
    }
