"""The config field that says in which dtype a checkpoint is stored."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from surgery.cut.config_width import config_fields, edit_config
from surgery.planning.plan import Change

if TYPE_CHECKING:
    from surgery.cut.config_width import FieldPath, Layout

_NAMES = ("dtype", "torch_dtype")
"""transformers wrote ``torch_dtype`` up to version 4."""


def in_dtype(layout: Layout, dtype: str | None) -> Layout:
    """``layout`` with `config_in_dtype`; the changes are among its ``switched`` fields."""
    fields = _changed(layout.config, dtype)
    switched = {".".join(path): Change(value, dtype) for path, value in fields.items()}
    return replace(layout, config=config_in_dtype(layout.config, dtype), switched=dict(layout.switched) | switched)


def config_in_dtype(config: dict[str, Any], dtype: str | None) -> dict[str, Any]:
    """A copy of ``config`` with ``dtype`` in every such field, or in a new one; unchanged if ``dtype`` is None."""
    return edit_config(config, dict.fromkeys(_changed(config, dtype), dtype))


def _changed(config: dict[str, Any], dtype: str | None) -> dict[FieldPath, Any]:
    """The fields that do not say ``dtype`` yet, with their values."""
    if dtype is None:
        return {}
    fields = {path: value for path, value in config_fields(config) if path[-1] in _NAMES}
    if not any(len(path) == 1 for path in fields):
        fields[_NAMES[:1]] = None
    return {path: value for path, value in fields.items() if value != dtype}
