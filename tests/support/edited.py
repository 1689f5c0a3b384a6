"""Atlases with chosen arrays replaced."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from chanfmt.format.reader import Atlas
from chanfmt.format.writer import write_atlas

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from chanfmt.format.records import AtlasContent


def edited(path: Path, content: AtlasContent, **variables: np.ndarray | None) -> Atlas:
    """``content`` with variables of its stack replaced, or left out if their value is None."""
    stack = content.stacks[0]
    merged = {name: value for name, value in {**stack.variables, **variables}.items() if value is not None}
    write_atlas(dataclasses.replace(content, stacks=(dataclasses.replace(stack, variables=merged),)), path)
    return Atlas.open(path)
