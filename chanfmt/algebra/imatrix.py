"""An atlas as llama.cpp's importance matrix: the mean squared input of every linear map that the atlas knows.

llama-quantize weighs the error of a weight by the mean squared input that the weight multiplies. For the down projection of an
FFN this is the activation power of the channel, sum_u2 / tokens (spec section 6). For read projections, attention and routers
it is in the atlas's inputs (`chanfmt.algebra.inputs`), where a build has them. The file has the GGUF layout of llama.cpp's
tools/imatrix: ``NAME.in_sum2``, float32 (matrix, input), and ``NAME.counts``, float32 (matrix, 1), a matrix per expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra.gguf_names import down_projection, gguf_package, tensor_names, text_type, weight_name
from chanfmt.algebra.inputs import read_inputs
from chanfmt.base.errors import AtlasError
from chanfmt.base.narrate import say
from chanfmt.base.text import one_line
from chanfmt.format.records import READ_ROLES
from chanfmt.format.texts import configuration

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from chanfmt.algebra.inputs import Input
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
    """Write the importance matrix of ``atlas`` to ``path``, and say what it does not cover. Returns the number of its entries.

    Raises:
        AtlasError: llama.cpp has no name for the architecture or for a down projection, the atlas holds no activations, or its
            inputs are not as the specification says.
        MissingPackageError: The package gguf is not installed.
    """
    entries, record = list(imatrix_entries(atlas)), atlas.calibration
    if left_out := not_covered(atlas):
        say(f"note: {left_out}")
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
    """The entries of the importance matrix: the down projections in model order, and then the other weights.

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
    for name, rows in _of_inputs(atlas, names).items():
        if name is not None and name not in seen:
            counts = np.array([row.tokens for row in rows], dtype=np.float32)
            yield Entry(name, np.stack([row.sums for row in rows]).astype(np.float32), counts[:, None])


def not_covered(atlas: Atlas) -> str:
    """A sentence, without a full stop, about what the importance matrix of ``atlas`` lacks; empty if that is nothing.

    llama-imatrix leaves out token embeddings and the output head by default, and so does this matrix.

    Raises:
        AtlasError, MissingPackageError: As `write_imatrix`.
    """
    inputs = read_inputs(atlas)
    if not inputs:
        return (
            "the atlas holds no inputs of attention and of read projections, so the matrix covers the down projections only; "
            "an atlas built now has them"
        )
    names = _names(atlas)
    held = {weight for row in inputs for weight in row.weights}
    reads = {item.tensor for block in atlas.blocks for item in block.tensors if item.role in READ_ROLES}
    lacking = [weight for weight in sorted(held | reads) if weight not in held or weight_name(names, weight) is None]
    if not lacking:
        return ""
    more = f" and {len(lacking) - 1:,} more weights" if len(lacking) > 1 else ""
    why = "llama.cpp has no name for" if lacking[0] in held else "the atlas holds no inputs of"
    return f"the matrix does not cover all weights: {why} {one_line(lacking[0])}{more}"


def _of_inputs(atlas: Atlas, names: Any) -> dict[str | None, list[Input]]:
    """Name of each weight in llama.cpp to what it reads, expert by expert. Under None is what has no name."""
    found: dict[str | None, dict[int | None, Input]] = {}
    for row in read_inputs(atlas):
        for weight in row.weights:
            found.setdefault(weight_name(names, weight), {}).setdefault(row.expert, row)
    return {
        name: [rows[expert] for expert in sorted(rows, key=lambda expert: -1 if expert is None else expert)]
        for name, rows in found.items()
        if len({len(row.sums) for row in rows.values()}) == 1
    }


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
