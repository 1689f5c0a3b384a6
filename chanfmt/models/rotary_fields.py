"""The rotary embedding of a config, and the fields in which transformers wrote it up to version 4."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def rotation(config: Any) -> dict[str, Any]:
    """``rope_parameters`` of ``config`` itself; of a model with two rotations, of the layers that see all tokens. May be empty."""
    found: dict[str, Any] = getattr(config, "rope_parameters", None) or {}
    return found.get("full_attention", found)


def head_size(config: Any) -> int:
    """Numbers of one attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


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
