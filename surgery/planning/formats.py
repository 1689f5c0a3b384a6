"""Formats of a result, and what a plan knows of a file in one of them before it is written. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from chanfmt.base.errors import UsageError
from surgery.planning.layouts import needs_code

if TYPE_CHECKING:
    from collections.abc import Sequence

SAFETENSORS, GGUF = "safetensors", "gguf"
FORMATS = (SAFETENSORS, GGUF)
"""Formats that a result can have."""
ONE_WIDTH = (
    "the cut leaves layers with different widths; llama.cpp reads a width for each layer of a GGUF file, but transformers reads "
    "one for all layers, so the result could not be checked"
)
"""Why a cut with uneven widths does not become a GGUF file."""


class FileBytes(Protocol):
    """How large the file of a result will be, if its tensors do not all take the same bytes for a parameter."""

    @property
    def before(self) -> int:
        """Bytes of the source file."""
        ...

    def after(self, widths: Sequence[int]) -> int:
        """Bytes of the file at most, if the FFNs, in model order, have ``widths`` in the result."""
        ...


def check_layout_of_format(format: str, layout: str | None) -> None:
    """Raise `UsageError` if a result in ``format`` cannot have the ``layout`` that was asked for."""
    if format == GGUF and layout is not None and needs_code(layout):
        raise UsageError(
            f"--layout {layout} is for checkpoints: a GGUF file has a config of its own",
            hint="leave out --format gguf, or use --allocation uniform without --layout",
        )


def uneven_gguf(*, uniform: bool) -> UsageError:
    """The error for a cut with uneven widths whose result is to be a GGUF file.

    Args:
        uniform: Whether ``--allocation uniform`` cuts all layers alike.
    """
    first = "leave out --layers and --stack" if uniform else "use --allocation uniform"
    return UsageError(
        f"--format gguf is not possible: {ONE_WIDTH}",
        hint=f"{first}, or leave out --format gguf",
    )
