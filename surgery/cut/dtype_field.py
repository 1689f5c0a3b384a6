"""The config field that says in which dtype a checkpoint is stored."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from surgery.cut.config_width import config_fields, edit_config
from surgery.planning.plan import Change

if TYPE_CHECKING:
    from surgery.cut.config_width import Layout

_NAMES = ("dtype", "torch_dtype")
"""transformers wrote ``torch_dtype`` up to version 4."""


def in_dtype(layout: Layout, dtype: str | None) -> Layout:
    """``layout`` with ``dtype`` in every such field of its config, or in a new one; ``layout`` itself if ``dtype`` is None."""
    if dtype is None:
        return layout
    fields = {path: value for path, value in config_fields(layout.config) if path[-1] in _NAMES}
    if not any(len(path) == 1 for path in fields):
        fields[_NAMES[:1]] = None
    changed = {path: value for path, value in fields.items() if value != dtype}
    switched = {".".join(path): Change(value, dtype) for path, value in changed.items()}
    return replace(
        layout,
        config=edit_config(layout.config, dict.fromkeys(changed, dtype)),
        switched=dict(layout.switched) | switched,
    )
