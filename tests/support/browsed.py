"""Unusual atlases, made from the factory's."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import h5py

from chanfmt.format.writer import write_atlas
from tests.support.factory import random_content

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

    from chanfmt.format.records import AtlasContent


def two_stacks(path: Path, *, names: tuple[str, str] = ("decoder", "decoder-64")) -> Path:
    """Layers 0 to 2 with 96 channels, layers 3 and 4 with 64."""
    first, second = random_content(layers=3), random_content(layers=2, channels=64, seed=1)
    wide = dataclasses.replace(first.stacks[0], name=names[0])
    narrow = dataclasses.replace(second.stacks[0], name=names[1], layers=second.stacks[0].layers + 3)
    blocks = [dataclasses.replace(block, stack=names[0]) for block in first.blocks]
    blocks += [
        dataclasses.replace(block, index=block.index + 3, layer_index=block.layer_index + 3, stack=names[1])
        for block in second.blocks
    ]
    content = dataclasses.replace(first, blocks=tuple(blocks), stacks=(wide, narrow))
    write_atlas(content, path)
    return path


def with_lp(path: Path, lp: np.ndarray) -> Path:
    """Four layers of 96 channels with this LP, (4, 96)."""
    return _with_variables(path, random_content(), {"lp": lp})


def without(path: Path, *names: str) -> Path:
    """Four layers without these arrays; the writer would refuse to leave them out."""
    write_atlas(random_content(), path)
    with h5py.File(path, "r+") as file:
        for name in names:
            del file["stacks/decoder"][name]
    return path


def last_layers(path: Path, first: int) -> Path:
    """The layers from ``first`` on of four, as a build that goes backwards has measured them."""
    content = random_content()
    blocks = tuple(dataclasses.replace(block, index=index) for index, block in enumerate(content.blocks[first:]))
    write_atlas(dataclasses.replace(content, blocks=blocks), path)
    return path


def with_rho(path: Path, rho: float) -> Path:
    """Four layers that are labelled by this share of the channels."""
    content = random_content()
    write_atlas(dataclasses.replace(content, labels=dataclasses.replace(content.labels, rho=rho)), path)
    return path


def with_names(path: Path, name: str) -> Path:
    """An atlas whose model and modules are called ``name``."""
    content = random_content()
    blocks = tuple(dataclasses.replace(block, module=name) for block in content.blocks)
    model = dataclasses.replace(content.model, id=name)
    write_atlas(dataclasses.replace(content, blocks=blocks, model=model), path)
    return path


def _with_variables(path: Path, content: AtlasContent, arrays: dict[str, np.ndarray]) -> Path:
    stack = content.stacks[0]
    changed = dataclasses.replace(stack, variables={**stack.variables, **arrays})
    write_atlas(dataclasses.replace(content, stacks=(changed,)), path)
    return path
