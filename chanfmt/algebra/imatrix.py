"""An atlas as llama.cpp's importance matrix: the mean squared input of every down projection.

llama-quantize weighs the error of a weight by the mean squared input that the weight multiplies. For the down projection of an
FFN this is the activation power of the channel, sum_u2 / tokens (spec section 6). The file has the GGUF layout of llama.cpp's
tools/imatrix: ``NAME.in_sum2``, float32 (matrix, input), and ``NAME.counts``, float32 (matrix, 1), a matrix per expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra.gguf_names import gguf_package, tensor_name, tensor_names
from chanfmt.base.errors import AtlasError
from chanfmt.base.text import one_line
from chanfmt.format.texts import configuration

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from chanfmt.format.reader import Atlas, Stack
    from chanfmt.format.records import Block

_PURPOSE = "an importance matrix for llama.cpp"


@dataclass(frozen=True, eq=False)
class Entry:
    """The importance of one down projection.

    Attributes:
        name: Its weight in llama.cpp, such as ``blk.0.ffn_down.weight``.
        sums: Sum of the squared inputs, float32 (expert, channel); one row for a dense FFN.
        counts: Tokens that reached each expert, float32 (expert, 1).
    """

    name: str
    sums: np.ndarray
    counts: np.ndarray


def write_imatrix(atlas: Atlas, path: Path) -> int:
    """Write the importance matrix of ``atlas`` to ``path``. Returns the number of its entries.

    Raises:
        AtlasError: llama.cpp has no name for the architecture or for a down projection, or the atlas holds no activations.
        MissingPackageError: The package gguf is not installed.
    """
    entries = list(imatrix_entries(atlas))
    gguf = gguf_package(_PURPOSE)
    writer = gguf.GGUFWriter(path, "imatrix")
    # llama.cpp's own files name a type and no architecture.
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_type("imatrix")
    record = atlas.calibration
    writer.add_array("imatrix.datasets", list(dict.fromkeys(one_line(row.source) for row in record.contributions)) or ["unknown"])
    writer.add_uint32("imatrix.chunk_count", max(1, record.sequences))
    writer.add_uint32("imatrix.chunk_size", max(1, record.seq_len))
    for entry in entries:
        writer.add_tensor(f"{entry.name}.in_sum2", entry.sums)
        writer.add_tensor(f"{entry.name}.counts", entry.counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return len(entries)


def imatrix_entries(atlas: Atlas) -> Iterator[Entry]:
    """The entries of the importance matrix, in model order.

    Raises:
        AtlasError: As `write_imatrix`.
        MissingPackageError: The package gguf is not installed.
    """
    names = _names(atlas)
    seen: set[str] = set()
    for block, stack in atlas.rows():
        name = _name(names, block)
        if name is None or name in seen:
            raise AtlasError(
                f"{atlas.path}: llama.cpp has no {'name' if name is None else 'second place'} for the down projection of "
                f"{one_line(block.module)}"
            )
        seen.add(name)
        sums, counts = _sums(atlas, block, stack)
        yield Entry(name, np.atleast_2d(sums).astype(np.float32), np.atleast_1d(counts).astype(np.float32)[:, None])


def _sums(atlas: Atlas, block: Block, stack: Stack) -> tuple[np.ndarray, np.ndarray]:
    if "tokens" not in stack or not ("sum_u2" in stack or "activation_power" in stack):
        raise AtlasError(f"{atlas.path} holds no activation power of the stack {one_line(stack.name)}")
    counts = np.asarray(stack.row("tokens", block.row), dtype=np.float64)
    if "sum_u2" in stack:
        return np.asarray(stack.row("sum_u2", block.row), dtype=np.float64), counts
    power = np.asarray(stack.row("activation_power", block.row), dtype=np.float64)
    # An expert that no token reached has no power, and counts nothing.
    return np.where(np.isfinite(power), power, 0.0) * counts[..., None], counts


def _names(atlas: Atlas) -> Any:
    """llama.cpp's names of the tensors of the model's architecture."""
    config = configuration(atlas.model.config) or {}
    text = config.get("text_config")
    model_type = str((text if isinstance(text, dict) else config).get("model_type") or config.get("model_type") or "")
    found = tensor_names(model_type, 1 + max(block.layer_index for block in atlas.blocks), _PURPOSE)
    if found is None:
        raise AtlasError(f"{atlas.path}: llama.cpp does not know the model type {one_line(model_type) or 'of this atlas'}")
    return found


def _name(names: Any, block: Block) -> str | None:
    """The weight of the down projection of ``block``."""
    found = {tensor_name(names, tensor) for tensor in {item.tensor for item in block.tensors if item.role == "write"}}
    name = found.pop() if len(found) == 1 else None
    # A fused tensor of experts has no suffix in the checkpoint.
    return name if name is None or name.endswith(".weight") else f"{name}.weight"
