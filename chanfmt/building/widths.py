"""What sets the widths of a model's FFNs, as an atlas records it, and what `surgery prune` will refuse because of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chanfmt.base.errors import ModelError
from chanfmt.models.own import is_own
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
) -> tuple[list[FFNWidth], str, str]:
    """What sets the width of each of ``ffns``; why ``surgery prune`` will refuse the model; a note on FFNs that it will not narrow.

    The two texts are empty if there is nothing to say.

    Args:
        slices: For each FFN, where its weights lie in the checkpoint.
    """
    placed = [Placed(ffn.layer_index, ffn.width, ffn.experts, items) for ffn, items in zip(ffns, slices, strict=True)]
    found: list[WidthField | None] = [None] * len(ffns)
    refusal = ""
    try:
        found = width_fields(source.config_fields, placed)
    except ModelError as error:
        # The model can be measured with code from its repository, and a result must load without that code.
        refusal = error.message
    widths = [
        FFNWidth(field.name if field else "", field.factor if field else 0, channel_parameters(ffn, source.index))
        for ffn, field in zip(placed, found, strict=True)
    ]
    if refusal or is_own(source.config_fields):
        # Of an earlier result with uneven widths, surgery prune writes another one.
        return widths, refusal, ""
    return widths, *_unset(ffns, widths)


def _unset(ffns: Sequence[FFN], widths: Sequence[FFNWidth]) -> tuple[str, str]:
    """Why a cut of the model is refused, and a note, because of FFNs whose width no field sets; empty if there are none."""
    sizes = [len(ffn.members) * ffn.width * width.channel_parameters for ffn, width in zip(ffns, widths, strict=True)]
    without = [place for place, width in enumerate(widths) if not width.field]
    if not without:
        return "", ""
    more = f" and {len(without) - 1} more" if len(without) > 1 else ""
    which = f"{ffns[without[0]].container}{more}"
    # A cut of the same share of every FFN makes the file smaller by this share of what is asked.
    if 2 * sum(sizes[place] for place in without) > sum(sizes):
        return (
            f"no config field sets the width of {which} alone; with --allow-padding, prune writes zeros in place of removed "
            "channels",
            "",
        )
    return (
        "",
        f"surgery prune will write zeros in place of removed channels in {which}, because no config field sets their width "
        "alone, and will narrow the other FFNs",
    )
