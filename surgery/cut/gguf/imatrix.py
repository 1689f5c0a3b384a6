"""An importance matrix of a dense model, sliced to the channels that a cut keeps, so that the cut can be quantised with it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra.gguf_names import down_projection, tensor_names, text_type
from chanfmt.algebra.imatrix import Entry, write_entries
from chanfmt.base.errors import ModelError, UsageError
from chanfmt.base.narrate import say
from chanfmt.base.text import one_line
from chanfmt.models.imatrix_file import PURPOSE, Imatrix, ImatrixEntry, read_imatrix

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from surgery.cut.checkpoint.cuts import Widths
    from surgery.planning.plan import BlockPlan, PruningPlan


def sliced(path: Path, plan: PruningPlan, widths: Widths, config: Mapping[str, Any]) -> Imatrix:
    """The importance matrix in ``path`` for the result of a cut.

    The entry of a down projection keeps the kept channels; a zero channel has the importance 0. All other entries stay.

    Args:
        path: Importance matrix of the dense model, as llama-imatrix or ``atlas export`` writes it.
        plan: Which channels stay.
        widths: Name of every FFN to its width in the result.
        config: The fields of the model's ``config.json``.

    Raises:
        UsageError: The file is not an importance matrix, or is one of another model.
        ModelError: llama.cpp does not know the model.
        MissingPackageError: The package gguf is not installed.
    """
    matrix, model_type = read_imatrix(path), text_type(config)
    names = tensor_names(model_type, 1 + max(block.layer_index for block in plan.blocks), PURPOSE)
    if names is None:
        raise ModelError(f"llama.cpp does not know the model type {one_line(model_type)}", hint="leave out --imatrix")
    entries = dict(matrix.entries)
    without = []
    for block in plan.blocks:
        name = _name(names, block)
        entry = entries.get(name)
        if entry is None:
            without.append(name)
        elif block.is_cut:
            entries[name] = _kept(path, name, entry, block, widths[block.name])
    if len(without) == len(plan.blocks):
        raise UsageError(
            f"{path} has no down projection of this model, such as {without[0]}",
            hint="name an importance matrix of the dense model",
        )
    if without:
        say(f"{path.name} has nothing for {without[0]}" + (f" and {len(without) - 1} more" if len(without) > 1 else ""))
    return replace(matrix, entries=entries)


def write_sliced(matrix: Imatrix, target: Path) -> None:
    """Write ``matrix`` to ``target``, in the GGUF layout. Raises `OSError`, and `MissingPackageError`."""
    entries = [
        Entry(name, entry.sums.astype(np.float32), entry.counts.astype(np.float32)[:, None])
        for name, entry in matrix.entries.items()
    ]
    write_entries(target, entries, matrix.datasets, matrix.chunks, matrix.chunk_size)


def _kept(path: Path, name: str, entry: ImatrixEntry, block: BlockPlan, width: int) -> ImatrixEntry:
    count = max(1, block.n_experts)
    entry = entry.by_expert(count, block.n_channels)
    sums = entry.sums
    if sums.shape != (count, block.n_channels):
        raise UsageError(
            f"{path}: {name} has {sums.shape[0]} x {sums.shape[1]} values, and the model has {count} x {block.n_channels} channels there",
            hint="name an importance matrix of the dense model",
        )
    kept = np.zeros((count, width))
    for expert in range(count):
        kept[expert, : block.n_kept] = sums[expert, block.kept_of(expert)]
    return ImatrixEntry(kept, entry.counts)


def _name(names: Any, block: BlockPlan) -> str:
    name = down_projection(names, (item.tensor for item in block.tensors if item.role == "write"))
    if name is None:
        raise ModelError(f"llama.cpp has no name for the down projection of {one_line(block.module)}", hint="leave out --imatrix")
    return name
