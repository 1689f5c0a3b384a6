"""Widths and parameters of a plan's result as stock code can load it: FFNs that share a config field have linked widths."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from surgery.planning.width import least_multiple, unit_step

if TYPE_CHECKING:
    from collections.abc import Sequence


class Linked(Protocol):
    """An FFN with what sets its width, in an atlas (`chanfmt.format.records.Block`) and in a plan alike."""

    @property
    def n_channels(self) -> int: ...
    @property
    def n_experts(self) -> int: ...
    @property
    def width_field(self) -> str | None: ...
    @property
    def width_factor(self) -> int: ...
    @property
    def channel_parameters(self) -> int: ...


@dataclass(frozen=True)
class Size:
    """Parameters that a cut takes away.

    Attributes:
        asked: Parameters of the removed channels.
        written: Parameters by which the file becomes smaller. It is less if zero channels fill FFNs up.
    """

    asked: int
    written: int

    @property
    def is_small(self) -> bool:
        """Whether the file shrinks by less than half of what was asked."""
        return 2 * self.written < self.asked


def field_groups(blocks: Sequence[Linked]) -> list[list[int]]:
    """Positions of the FFNs in ``blocks``, by the field that sets their width, in order. Any other FFN is alone."""
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for place, block in enumerate(blocks):
        groups[(block.width_field, 0) if block.width_field else ("", place)].append(place)
    return list(groups.values())


def written_widths(
    blocks: Sequence[Linked], kept: Sequence[int], multiple_of: int | None = None, groups: Sequence[Sequence[int]] | None = None
) -> list[int]:
    """Width of each FFN in the result: the kept channels, followed by zero channels up to this width.

    FFNs that share a field get the smallest widths that the field can give them all. An FFN whose width no field sets keeps
    its width. If an atlas does not say what sets a width, the FFN is as wide as the number of its kept channels.

    Args:
        kept: Channels that each FFN keeps (in each expert).
        multiple_of: Multiple of the kept widths; None for the default.
        groups: `field_groups` of ``blocks``, if they are known.
    """
    widths = [0] * len(blocks)
    for places in field_groups(blocks) if groups is None else groups:
        first = blocks[places[0]]
        if not first.width_field:
            widths[places[0]] = kept[places[0]] if first.width_field is None else first.n_channels
            continue
        units = first.n_channels // first.width_factor
        needed = {-(-kept[place] // blocks[place].width_factor) for place in places}
        most = max(needed)
        factors = sorted({blocks[place].width_factor for place in places})
        if len(needed) > 1 and len(factors) > 1:
            # The widest FFN decides, and the other widths must be multiples as well.
            step = unit_step(factors, multiple_of or least_multiple(units * factors[0], factors))
            most = min(-(-most // step) * step, units)
        for place in places:
            widths[place] = blocks[place].width_factor * most
    return widths


def size_of(blocks: Sequence[Linked], kept: Sequence[int], widths: Sequence[int]) -> Size | None:
    """Parameters that go if ``blocks`` keep ``kept`` channels and are written ``widths`` wide; None if the atlas does not say."""
    each = [max(1, block.n_experts) * block.channel_parameters for block in blocks]
    if not all(each):
        return None
    return Size(
        sum(count * (block.n_channels - number) for count, block, number in zip(each, blocks, kept, strict=True)),
        sum(count * (block.n_channels - width) for count, block, width in zip(each, blocks, widths, strict=True)),
    )


def width_warnings(blocks: Sequence[Linked], widths: Sequence[int]) -> tuple[str, ...]:
    """A warning if the result has a width that programs which run models do not take."""
    odd = [
        (block, width)
        for block, width in zip(blocks, widths, strict=True)
        if width < block.n_channels and width % 32 and block.n_channels >= 64
    ]
    if not odd:
        return ()
    widths = sorted({width for _, width in odd})
    experts = (
        ", and torch's grouped products of experts multiples of 8 in bfloat16 and of 4 in float32"
        if any(block.n_experts for block, _ in odd)
        else ""
    )
    said = f"the width {widths[0]} is not a multiple" if len(widths) == 1 else f"widths such as {widths[0]} are not multiples"
    return (
        f"{said} of 32: llama.cpp's quantised "
        f"types need multiples of 32 or 256, vLLM's tensor parallelism 64 or 128 times the number of GPUs{experts}; leave out "
        "--multiple-of for widths that they take",
    )
