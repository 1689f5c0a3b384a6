"""What sets the widths of a model's FFNs, as an atlas records it, and what `surgery prune` will refuse because of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chanfmt.base.errors import ModelError
from chanfmt.models.widths import Placed, WidthField, channel_parameters, width_fields

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.format.records import TensorSlice
    from chanfmt.models.ffn import FFN
    from chanfmt.models.source import ModelSource


@dataclass(frozen=True)
class FFNWidth:
    """What sets one FFN's width: the columns of the FFN table (see `chanfmt.format.records.Block`)."""

    field: str
    factor: int
    channel_parameters: int


def find_widths(
    source: ModelSource, ffns: Sequence[FFN], slices: Sequence[tuple[TensorSlice, ...]]
) -> tuple[list[FFNWidth], str]:
    """What sets the width of each of ``ffns``, and what ``surgery prune`` will refuse (empty if nothing).

    Args:
        slices: For each FFN, where its weights lie in the checkpoint.
    """
    placed = [Placed(ffn.layer_index, ffn.width, ffn.experts, items) for ffn, items in zip(ffns, slices, strict=True)]
    found: list[WidthField | None] = [None] * len(ffns)
    refused = ""
    try:
        found = width_fields(source.config_fields, placed)
    except ModelError as error:
        # The model can be measured with code from its repository, and a result must load without that code.
        refused = f"stock transformers cannot load a smaller model: {error.message}"
    else:
        refused = _unset(ffns, found)
    widths = [
        FFNWidth(field.name if field else "", field.factor if field else 0, channel_parameters(ffn, source.index))
        for ffn, field in zip(placed, found, strict=True)
    ]
    return widths, refused


def _unset(ffns: Sequence[FFN], found: Sequence[WidthField | None]) -> str:
    """A text about the FFNs whose width no field sets; empty if there are none."""
    without = [ffn for ffn, field in zip(ffns, found, strict=True) if field is None]
    if not without:
        return ""
    more = f" and {len(without) - 1} more" if len(without) > 1 else ""
    rest = "" if len(without) == len(ffns) else f"; the other {len(ffns) - len(without)} FFNs can be narrowed"
    return (
        f"no config field sets the width of {without[0].container}{more} alone, so stock code could only load zeros in "
        f"place of removed channels (--allow-padding){rest}"
    )
