"""Recognise that memory ran out, however a library spells it, and give back what a device keeps for later."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

SPELLINGS = ("out of memory", "allocate memory", "not enough memory", "status_alloc_failed")
"""Parts of the messages of CUDA, HIP, MPS and the CPU's allocator, and of cuBLAS and cuDNN, in lower case."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that the memory of a device, or of the CPU, does not suffice."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # Only some accelerators have an exception of their own for memory that runs out.
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in SPELLINGS)


@contextlib.contextmanager
def out_of_memory_recognised() -> Iterator[None]:
    """Turn every error of the body that `is_out_of_memory` recognises into `torch.OutOfMemoryError`."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(str(error) or "out of memory") from None


def free_cached_memory(device: torch.device) -> None:
    """Give back the memory that torch keeps on ``device`` for later, if it keeps any there."""
    import torch

    empty = getattr(getattr(torch, device.type, None), "empty_cache", None)
    if empty is not None:
        empty()
