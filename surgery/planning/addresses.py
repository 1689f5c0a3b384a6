"""The names that people give to layers, FFNs and channels: ``0-7,12``, ``decoder/3``, ``3/17``, ``1:313,1392-1400``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from chanfmt.base.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from chanfmt.format.reader import Atlas
    from chanfmt.format.records import Block

KEYS = "LAYER, STACK/LAYER, LAYER/EXPERT or STACK/LAYER/EXPERT"
# Each number has one spelling: "01" and "1" would name one layer twice.
_NUMBER = re.compile(r"(?:0|[1-9][0-9]{0,8})")
_RANGE = re.compile(rf"({_NUMBER.pattern})(?:-({_NUMBER.pattern}))?")


def parse_number(text: str, what: str) -> int:
    """``text`` as a number below 10^9. Raises `UsageError` ("... is not ``what``") if it is not one."""
    if not _NUMBER.fullmatch(text):
        raise UsageError(f"{_short(text)} is not {what}")
    return int(text)


def parse_ranges(text: str, what: str) -> list[tuple[int, int]]:
    """``3,7-9`` as pairs of first and last number.

    Args:
        what: The kind of number, such as "a layer", for the error.

    Raises:
        UsageError: ``text`` is not such a list.
    """
    ranges = []
    for item in text.split(","):
        match = _RANGE.fullmatch(item.strip())
        if match is None:
            raise UsageError(f"{_short(item)} is not {what}, nor a range of them", hint="write them as in 0-7,12")
        first = int(match[1])
        last = int(match[2] or first)
        if last < first:
            raise UsageError(f"the range {item.strip()} runs backwards")
        ranges.append((first, last))
    return ranges


def parse_layers(text: str, atlas: Atlas) -> frozenset[int]:
    """The layers that a list such as ``0-7,12`` names.

    Raises:
        UsageError: ``text`` is not such a list, or the model lacks one of the layers.
    """
    layers = {block.layer_index for block in atlas.blocks}
    chosen: set[int] = set()
    for first, last in parse_ranges(text, "a layer"):
        for end in (first, last):
            if end not in layers:
                raise UsageError(f"there is no layer {end}", hint=f"layers: {min(layers)} to {max(layers)}")
        chosen |= {layer for layer in layers if first <= layer <= last}
    return frozenset(chosen)


def chosen_layers(text: str | None, atlas: Atlas) -> frozenset[int]:
    """The layers that ``--layers`` names; all layers if ``text`` is None. Raises `UsageError` as `parse_layers`."""
    if text is None:
        return frozenset(block.layer_index for block in atlas.blocks)
    try:
        return parse_layers(text, atlas)
    except UsageError as error:
        raise UsageError(f"--layers: {error.message}", hint=error.hint) from None


def channel_ids(text: str, channels: int) -> Iterator[int]:
    """The channels that a list such as ``313,1392-1400`` names, one after the other, in an FFN of ``channels``.

    Raises:
        UsageError: ``text`` is not such a list, or the FFN lacks one of the channels.
    """
    for first, last in parse_ranges(text, "a channel"):
        check_channel(last, channels)
        yield from range(first, last + 1)


def check_channel(channel: int, channels: int) -> None:
    """Raise `UsageError` if an FFN of ``channels`` has no channel ``channel``."""
    if not 0 <= channel < channels:
        raise UsageError(f"there is no channel {channel}: the FFN has {channels}, counted from 0")


def find_unit(key: str, atlas: Atlas) -> tuple[Block, int | None]:
    """The FFN that ``key`` names (see `KEYS`), and the expert if the FFN has experts, else None.

    Raises:
        UsageError: ``key`` names no FFN, or more than one.
    """
    parts = key.split("/")
    stack = parts.pop(0) if len(parts) > 1 and not parts[0].isdecimal() else None
    if len(parts) > 2:
        raise UsageError(f"{_short(key)} is not a layer index", hint=f"write {KEYS}")
    return find_ffn(
        atlas,
        stack,
        parse_number(parts[0], "a layer index"),
        parse_number(parts[1], "an expert index") if len(parts) == 2 else None,
    )


def find_ffn(atlas: Atlas, stack: str | None, layer: int, expert: int | None) -> tuple[Block, int | None]:
    """The FFN of ``layer`` in ``stack`` (None: in any stack), and ``expert``.

    The FFN has experts if ``expert`` is a number, and is dense if ``expert`` is None.

    Raises:
        UsageError: There is no such FFN, or more than one.
    """
    if stack is not None and stack not in atlas.stacks:
        raise UsageError(f"there is no stack {_short(stack)}", hint=f"stacks: {', '.join(atlas.stacks)}")
    in_layer = [block for block in atlas.blocks if block.layer_index == layer and stack in (None, block.stack)]
    if not in_layer:
        layers = sorted({block.layer_index for block in atlas.blocks if stack in (None, block.stack)})
        raise UsageError(f"there is no layer {layer}", hint=f"layers: {layers[0]} to {layers[-1]}" if layers else None)
    found = [block for block in in_layer if bool(block.n_experts) == (expert is not None)]
    if not found and expert is None:
        raise UsageError(f"layer {layer} has experts", hint=f"name one as {layer}/EXPERT")
    if not found:
        raise UsageError(f"layer {layer} has no experts", hint="leave out the expert")
    if len(found) > 1:
        raise UsageError(f"layer {layer} has several FFNs", hint=f"name one of its stacks: {_stacks_of(found)}")
    if expert is not None and expert >= found[0].n_experts:
        raise UsageError(f"layer {layer} has no expert {expert}: it has {found[0].n_experts}, counted from 0")
    return found[0], expert


def unit_key(atlas: Atlas, block: Block, expert: int | None) -> str:
    """The shortest key by which `find_unit` finds ``block`` and ``expert``.

    Raises:
        UsageError: No key does, because the layer has two FFNs in one stack.
    """
    for stack in (None, block.stack):
        try:
            found, _ = find_ffn(atlas, stack, block.layer_index, expert)
        except UsageError:
            continue
        if found is block:
            return "/".join(str(part) for part in (stack, block.layer_index, expert) if part is not None)
    raise UsageError(f"layer {block.layer_index} has two FFNs in the stack {block.stack}, which no key tells apart")


def _stacks_of(blocks: Iterable[Block]) -> str:
    return ", ".join(dict.fromkeys(block.stack for block in blocks))


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:40] + "...")
