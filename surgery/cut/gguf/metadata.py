"""The metadata of a GGUF file after a cut: everything is taken over, and what names a width, a size or a type is changed."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING

from chanfmt.algebra.gguf_names import gguf_package
from chanfmt.base.errors import ModelError
from chanfmt.base.text import one_line
from chanfmt.models.gguf_header import ARRAY, BF16, F16, F32, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, UINT64, Value, header_bytes
from surgery.cut.gguf.layout import PURPOSE, architecture, matrix_shape, tensor_bytes
from surgery.planning.formats import ONE_WIDTH

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from chanfmt.models.gguf_header import Header, StoredTensor
    from surgery.cut.checkpoint.cuts import Widths
    from surgery.cut.gguf.layout import GgufLayout
    from surgery.planning.plan import BlockPlan, PruningPlan

_FILE_TYPES = {F32: 0, F16: 1, Q4_0: 2, Q4_1: 3, Q8_0: 7, Q5_0: 8, Q5_1: 9, BF16: 32}
"""Type of most weights to ``general.file_type``."""
_FFN = re.compile(r"(?:^|\.)ffn_(?:gate|up|gate_up|down)(_exps|_shexp|_chexp)?\.weight$")
_KEYS = {
    None: ("feed_forward_length",),
    "_exps": ("expert_feed_forward_length", "feed_forward_length"),
    "_shexp": ("expert_shared_feed_forward_length",),
    "_chexp": ("expert_chunk_feed_forward_length",),
}
"""Ending of an FFN's tensors to the keys that may hold its width. The first one that the file has does."""
_QUANTISATION_VERSION = 2
"""Version of the layout of blocks in llama.cpp."""


def narrowed(header: Header, layout: GgufLayout, plan: PruningPlan, widths: Widths, name: str) -> dict[str, Value]:
    """The metadata of the result, in the order of the source.

    Args:
        header: That of the source.
        widths: Name of every FFN to its width in the result.
        name: Name of the result.

    Raises:
        ModelError: The file does not say a width where llama.cpp reads it, or it holds one width for all layers and the result
            has several.
    """
    values = dict(header.values)
    values |= changed_widths(
        header, {item.source.name: [part.tensor for part in item.parts] for item in layout.tensors}, plan, widths
    )
    before, after = [item.source for item in layout.tensors], [item.target for item in layout.tensors]
    if _main_kind(before) != _main_kind(after):
        values["general.file_type"] = Value.of(_FILE_TYPES[_main_kind(after)])
    if any(item.kind not in (F32, F16, BF16) for item in after):
        values.setdefault("general.quantization_version", Value.of(_QUANTISATION_VERSION))
    if "general.parameter_count" in values:
        values["general.parameter_count"] = Value.of(sum(map(_elements, after)), UINT64)
    if "general.size_label" in values:
        values["general.size_label"] = Value.of(_size_label(header, after))
    old = header.text("general.name")
    if old and "general.base_model.count" not in values:
        values |= {"general.base_model.count": Value.of(1), "general.base_model.0.name": Value.of(old)}
    values["general.name"] = Value.of(name)
    return values


def described(tensors: Sequence[StoredTensor]) -> dict[str, Value]:
    """The values that say which types ``tensors`` have."""
    values = {"general.file_type": Value.of(_FILE_TYPES[_main_kind(tensors)])}
    if any(item.kind not in (F32, F16, BF16) for item in tensors):
        values["general.quantization_version"] = Value.of(_QUANTISATION_VERSION)
    return values


def changed_widths(header: Header, places: Mapping[str, Sequence[str]], plan: PruningPlan, widths: Widths) -> dict[str, Value]:
    """The keys of widths that change.

    Args:
        places: Name of every tensor of the file to the tensors of the checkpoint that it holds and that are cut.

    Raises:
        ModelError: As `narrowed`.
    """
    kind = architecture(header)
    holders: dict[str, str | None] = {}
    for name, held in places.items():
        if found := _FFN.search(name):
            holders |= dict.fromkeys(held, found[1])
    groups: dict[str, list[BlockPlan]] = defaultdict(list)
    endings: dict[str, str | None] = {}
    for block in plan.blocks:
        ending = next((holders[item.tensor] for item in block.tensors if item.tensor in holders), _UNCUT)
        if ending is _UNCUT:
            continue
        key = next((key for each in _KEYS[ending] if (key := f"{kind}.{each}") in header.values), None)
        if key is None:
            raise ModelError(
                f"the GGUF file has no value {kind}.{_KEYS[ending][0]}, so llama.cpp could not read another width",
                hint="leave out --format gguf",
            )
        groups[key].append(block)
        endings[key] = ending
    cut = {name for name, held in places.items() if held}
    return {key: _width(header, cut, key, endings[key], blocks, widths) for key, blocks in groups.items()}


_UNCUT = "uncut"


def _width(header: Header, cut: set[str], key: str, ending: str | None, blocks: list[BlockPlan], widths: Widths) -> Value:
    """The value of ``key``, which holds the widths of ``blocks``. ``cut`` names the tensors that are cut."""
    value = header.values[key]
    content = value.content
    if value.kind == ARRAY:
        items = list(content)
        for block in blocks:
            if block.layer_index >= len(items) or items[block.layer_index] != block.n_channels:
                raise ModelError(f"{key} of the GGUF file does not hold the width {block.n_channels} of {one_line(block.module)}")
            items[block.layer_index] = widths[block.name]
        return Value.array(items, value.item_kind)
    found = {widths[block.name] for block in blocks}
    if content not in {block.n_channels for block in blocks} or len({block.n_channels for block in blocks}) > 1:
        raise ModelError(
            f"{key} of the GGUF file is {content}, and {one_line(blocks[0].module)} has {blocks[0].n_channels} channels"
        )
    for tensor in header.tensors:
        match = _FFN.search(tensor)
        if match and match[1] == ending and tensor not in cut and found != {content}:
            raise ModelError(
                f"{key} of the GGUF file is one number, and the cut leaves {one_line(tensor)} as it is: {ONE_WIDTH}",
                hint="cut all layers alike, or leave out --format gguf",
            )
    if len(found) > 1:
        raise ModelError(
            f"{key} of the GGUF file is one number, and {ONE_WIDTH}",
            hint="use --allocation uniform, or leave out --format gguf",
        )
    return Value.of(found.pop(), value.kind)


def _main_kind(tensors: Iterable[StoredTensor]) -> int:
    """Type of the largest share of the numbers."""
    counts: dict[int, int] = defaultdict(int)
    for tensor in tensors:
        counts[tensor.kind] += _elements(tensor)
    return max(counts, key=lambda kind: counts[kind])


def _elements(tensor: StoredTensor) -> int:
    matrices, rows, columns = matrix_shape(tensor)
    return matrices * rows * columns


def _size_label(header: Header, tensors: list[StoredTensor]) -> str:
    """What llama.cpp calls the size, such as ``135M`` or ``8x7B``."""
    gguf = gguf_package(PURPOSE)
    total = sum(map(_elements, tensors))
    count = header.number(f"{architecture(header)}.expert_count") or 0
    inside = sum(_elements(tensor) for tensor in tensors if "_exps." in tensor.name)
    return str(gguf.size_label(total, total - inside, inside // count if count else 0, count))


def file_bytes(values: Mapping[str, Value], layout: GgufLayout, alignment: int) -> int:
    """Bytes of the whole file."""
    head = len(header_bytes(values, [item.target for item in layout.tensors], alignment))
    return head + sum(tensor_bytes(item.target) + alignment for item in layout.tensors)
