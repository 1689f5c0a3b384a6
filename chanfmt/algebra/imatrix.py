"""An atlas as llama.cpp's importance matrix: the mean squared input of every down projection.

llama-quantize weighs the error of a weight by the mean squared input that the weight multiplies. For the down projection of an
FFN this is the activation power of the channel, sum_u2 / tokens (spec section 6). The file has the GGUF layout of llama.cpp's
tools/imatrix: ``NAME.in_sum2``, float32 (matrix, input), and ``NAME.counts``, float32 (matrix, 1), a matrix per expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra.gguf_names import down_projection, gguf_package, tensor_names, text_type
from chanfmt.base.errors import AtlasError
from chanfmt.base.text import one_line
from chanfmt.format.texts import configuration

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from chanfmt.format.reader import Atlas, Stack
    from chanfmt.format.records import Block

_PURPOSE = "an importance matrix for llama.cpp"


@dataclass(frozen=True, eq=False)
class Entry:
    """The importance of one weight, such as a down projection.

    Attributes:
        name: Its name in llama.cpp, such as ``blk.0.ffn_down.weight``.
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
    entries, record = list(imatrix_entries(atlas)), atlas.calibration
    datasets = dict.fromkeys(one_line(row.source) for row in record.contributions)
    write_entries(path, entries, tuple(datasets), record.sequences, record.seq_len)
    return len(entries)


def write_entries(path: Path, entries: Iterable[Entry], datasets: Sequence[str], chunks: int, chunk_size: int) -> None:
    """Write an importance matrix in the GGUF layout to ``path``.

    Args:
        datasets: Names of the texts.
        chunks, chunk_size: Number of chunks of text, and tokens of a chunk.

    Raises:
        MissingPackageError: The package gguf is not installed.
        OSError: The file cannot be written.
    """
    gguf = gguf_package(_PURPOSE)
    writer = gguf.GGUFWriter(path, "imatrix")
    # llama.cpp's own files name a type and no architecture.
    writer.kv_data[0].pop("general.architecture", None)
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(datasets) or ["unknown"])
    writer.add_uint32("imatrix.chunk_count", max(1, chunks))
    writer.add_uint32("imatrix.chunk_size", max(1, chunk_size))
    for entry in entries:
        writer.add_tensor(f"{entry.name}.in_sum2", entry.sums)
        writer.add_tensor(f"{entry.name}.counts", entry.counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def imatrix_entries(atlas: Atlas) -> Iterator[Entry]:
    """The entries of the importance matrix, in model order.

    Raises:
        AtlasError: As `write_imatrix`.
        MissingPackageError: The package gguf is not installed.
    """
    names = _names(atlas)
    seen: set[str] = set()
    for block, stack in atlas.rows():
        name = down_projection(names, {item.tensor for item in block.tensors if item.role == "write"})
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
    model_type = text_type(configuration(atlas.model.config) or {})
    found = tensor_names(model_type, 1 + max(block.layer_index for block in atlas.blocks), _PURPOSE)
    if found is None:
        raise AtlasError(f"{atlas.path}: llama.cpp does not know the model type {one_line(model_type) or 'of this atlas'}")
    return found
