"""The weights of one FFN straight from the checkpoint files, with numpy only: no model is built.

The FFN table of an atlas is untrusted input. Every slice in it is checked against the checkpoint before it is read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from chanfmt.base.errors import ModelError
from chanfmt.format.records import READ_ROLES
from chanfmt.models.safetensors import CONTAINERS, DTYPE_BITS, CheckpointIndex, TensorEntry

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chanfmt.format.records import Block, ModelRecord, TensorSlice
    from chanfmt.models.source import ModelSource

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Safetensors dtypes that can be read here, and their names in an atlas."""
_WEIGHTS = ("write", "up", "gate")


class Described(Protocol):
    """The fields that describe an FFN, in an atlas (`chanfmt.format.records.Block`) and in a pruning plan alike."""

    @property
    def module(self) -> str: ...
    @property
    def n_channels(self) -> int: ...
    @property
    def n_experts(self) -> int: ...


class HasTensors(Described, Protocol):
    """An FFN with the places of its weights in the checkpoint."""

    @property
    def tensors(self) -> Sequence[TensorSlice]: ...


@dataclass(frozen=True)
class StoredFFN:
    """The weights of one dense FFN or of one expert, float32; float64 if the model was measured in float64.

    Attributes:
        write: Write vectors as columns, (d, m).
        reads: Rows of the gate, if there is one, and of the up projection, each (m, d).
    """

    write: np.ndarray
    reads: list[np.ndarray]


class StoredWeights:
    """A checkpoint that is known to be the one an atlas was measured on.

    Args:
        index: The checkpoint.
        dtype: Dtype that the model was measured in. Weights are rounded to it first, as they are when a model is loaded.

    Raises:
        ModelError: Weights cannot be rounded to ``dtype`` here.
    """

    def __init__(self, index: CheckpointIndex, dtype: str) -> None:
        if dtype not in _DTYPES.values():
            raise ModelError(f"the model was measured in {dtype}, and stored weights cannot be rounded to that dtype here")
        self.index = index
        self.dtype = dtype

    @classmethod
    def of(cls, source: ModelSource, record: ModelRecord) -> StoredWeights:
        """The weights in ``source``, after checking that they are the weights of ``record``.

        Raises:
            ModelError: The fingerprint of ``source`` differs from the fingerprint in ``record``.
        """
        found = source.fingerprint
        if found != record.fingerprint:
            raise ModelError(
                f"{source.id} is not the model that was measured: its weights have the fingerprint {found[:12]}, "
                f"the atlas's {record.id} has {record.fingerprint[:12]}",
                hint="give the model, and the revision, that the atlas was built from",
            )
        return cls(source.index, record.dtype)

    def ffn(self, block: Block, expert: int = 0) -> StoredFFN:
        """Weights of ``block``, or of its expert number ``expert`` if it has experts (spec section "FFNs").

        Raises:
            ModelError: The FFN table does not fit the checkpoint, or a dtype cannot be read.
        """
        items = _items(block, expert)
        write = self.write(block, expert)
        reads = [self._matrix(block, items[role], channel_axis=0) for role in READ_ROLES if role in items]
        return StoredFFN(write, reads)

    def write(self, block: HasTensors, expert: int = 0) -> np.ndarray:
        """Write vectors of ``block``, or of its expert number ``expert`` if it has experts, as columns (d, m).

        Raises:
            ModelError: As for `ffn`.
        """
        return self._matrix(block, _items(block, expert)["write"], channel_axis=1)

    def _matrix(self, block: HasTensors, item: TensorSlice, *, channel_axis: int) -> np.ndarray:
        entry = self.index.tensors.get(item.tensor)
        if entry is None:
            raise ModelError(f"the checkpoint has no tensor {item.tensor!r}, which the atlas names for {block.module}")
        shape, axis, bits = entry.shape, item.axis, None
        if item.index is not None and axis is not None and shape and item.index < shape[0]:
            shape, axis, bits = shape[1:], axis - 1, view(entry)[item.index]
        last = item.start + (block.n_channels - 1) * item.step
        if len(shape) != 2 or axis not in (0, 1) or last >= shape[axis]:
            raise ModelError(
                f"{block.module}: channels {item.start} to {last} of axis {item.axis} are not in the tensor "
                f"{item.tensor!r}, whose shape is {list(entry.shape)}"
            )
        bits = view(entry) if bits is None else bits
        part = slice(item.start, last + 1, item.step)
        bits = bits[part] if axis == 0 else bits[:, part]
        values = _rounded(_values(bits, entry.dtype, item.tensor), _DTYPES[entry.dtype], self.dtype)
        return values if axis == channel_axis else values.T


def view(entry: TensorEntry) -> np.ndarray:
    """The tensor mapped from its file, read-only, as unsigned integers of its element size.

    Raises:
        ModelError: The dtype packs several values in a byte, or the file cannot be mapped.
    """
    bits = DTYPE_BITS[entry.dtype]
    if bits not in CONTAINERS:
        raise ModelError(f"{entry.dtype} packs several values in a byte")
    if not entry.elements:
        return np.empty(entry.shape, dtype=CONTAINERS[bits])
    try:
        return np.memmap(entry.file, dtype=CONTAINERS[bits], mode="r", offset=entry.start, shape=entry.shape)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {entry.file}: {error}") from None


def numbers(entry: TensorEntry) -> np.ndarray:
    """The numbers of a tensor, float32; float64 if it is stored in float64.

    Raises:
        ModelError: The tensor is not stored as a kind of float that is known here, or cannot be read.
    """
    return _values(view(entry), entry.dtype, entry.file.name)


def _items(block: HasTensors, expert: int) -> Mapping[str, TensorSlice]:
    """Role to slice of the weights of one expert. The FFN table lists each role once per expert, in the order of the experts."""
    found: dict[str, TensorSlice] = {}
    for role in _WEIGHTS:
        items = [item for item in block.tensors if item.role == role]
        if len(items) != max(1, block.n_experts) and (items or role != "gate"):
            raise ModelError(
                f"the atlas names {len(items)} {role} tensors for {block.module}, which has {block.n_experts or 'no'} experts",
                hint="check the file with: atlas validate",
            )
        if items:
            found[role] = items[expert]
    return found


def _values(bits: np.ndarray, dtype: str, tensor: str) -> np.ndarray:
    """The floats that unsigned integers stand for: float64, or float32 for every narrower dtype."""
    if dtype not in _DTYPES:
        raise ModelError(
            f"the tensor {tensor!r} is stored as {dtype}, which cannot be read as numbers here",
            hint="save the model in bfloat16, float16 or float32, and build its atlas from that",
        )
    bits = np.asarray(bits)
    if dtype == "BF16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return bits.view("<f2").astype(np.float32)
    return bits.view("<f4" if dtype == "F32" else "<f8")


def _rounded(values: np.ndarray, stored: str, dtype: str) -> np.ndarray:
    """``values`` as a model in ``dtype`` holds them, float32; float64 if ``dtype`` is float64."""
    if dtype == "float64":
        return values.astype(np.float64, copy=False)
    values = values.astype(np.float32, copy=False)
    if dtype in ("float32", stored):
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).astype(np.float32)
    bits = values.view(np.uint32)
    # To the nearest 16 bits, ties to even. NaN stays as it is, because the rounding could carry into its sign.
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(values), values, nearest.view(np.float32))
