"""Write floating tensors in another dtype than that in which they are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chanfmt.base.errors import ModelError
from chanfmt.models.safetensors import DTYPE_BITS
from surgery.cut.options import DTYPES

if TYPE_CHECKING:
    from chanfmt.models.safetensors import TensorEntry

_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def stored_dtype(entry: TensorEntry, dtype: str | None) -> str:
    """The safetensors dtype of ``entry`` in a result of ``dtype``: every float changes, and integers stay.

    Args:
        dtype: A key of `surgery.cut.options.DTYPES`; None to leave the tensor as it is stored.
    """
    return DTYPES[dtype] if dtype is not None and entry.dtype in _FLOATS else entry.dtype


def rounded(data: memoryview, old: str, new: str, name: str) -> memoryview:
    """The elements ``data`` of the tensor ``name``, rounded from the safetensors dtype ``old`` to the nearest of ``new``.

    Raises:
        ModelError: A finite number is too large for ``new``.
    """
    import torch

    from chanfmt.models.stored.tensors import DTYPES as TORCH

    if not len(data):
        return data
    values = torch.frombuffer(bytearray(data) if data.readonly else data, dtype=TORCH[old])
    result = values.to(TORCH[new])
    # float16 ends at 65504, where the other formats go on.
    if new == "F16" and bool((result.isinf() & values.isfinite()).any()):
        raise ModelError(f"the tensor {name!r} holds numbers that are too large for float16", hint="use --dtype bfloat16")
    if not bool((result.isfinite() | ~values.isfinite()).all()):
        raise ModelError(f"the tensor {name!r} holds numbers that are too large for {new}", hint="leave out --dtype")
    return memoryview(result.view(torch.uint8).numpy().data)


def scaled(offset: int, old: str, new: str) -> int:
    """The byte offset in a tensor of dtype ``new`` of the element at byte ``offset`` in a tensor of dtype ``old``."""
    return offset * 8 // DTYPE_BITS[old] * DTYPE_BITS[new] // 8
