"""The rotary embedding of a config in the fields that transformers wrote up to version 4."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def older_fields(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    """``rope_theta``, and ``rope_scaling`` if positions are scaled, from ``rope_parameters``; empty if a model has two rotations.

    transformers 5 writes ``rope_parameters`` alone. Programs that do not know it take a base of their own for granted, and
    compute something else without an error.
    """
    scaling = dict(parameters or {})
    if "rope_theta" not in scaling:
        return {}
    theta = scaling.pop("rope_theta")
    return {"rope_theta": theta} | ({"rope_scaling": scaling} if scaling.get("rope_type", "default") != "default" else {})
