"""Write the cut checkpoint shard by shard, tensor by tensor."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, BinaryIO

from chanfmt.errors import ModelError
from chanfmt.models.checkpoint import DTYPE_BITS, INDEX_FILE, SINGLE_FILE, CheckpointIndex, TensorEntry
from surgery.checkpoint.reader import CHUNK_BYTES, gather

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from surgery.checkpoint.cuts import Cut


def output_bytes(index: CheckpointIndex, cuts: Mapping[str, Cut]) -> int:
    """Bytes of all tensors after ``cuts``."""
    return sum(_shape_bytes(entry, _shape(name, entry, cuts)) for name, entry in index.tensors.items())


def write_checkpoint(
    index: CheckpointIndex, cuts: Mapping[str, Cut], directory: Path, advance: Callable[[int], object]
) -> None:
    """Write the checkpoint ``index`` with ``cuts`` made into ``directory``.

    Shards correspond to the source's, one to one, and are named as the Hub expects. Headers come
    first, all shapes being known, and then tensors in their order; untouched ones are copied.

    Args:
        advance: Called with the number of bytes just written.

    Raises:
        ModelError: The source cannot be read to its end.
        OSError: The destination cannot be written.
    """
    count = len(index.files)
    weight_map: dict[str, str] = {}
    metadata = {"format": "pt", **index.metadata}
    for number, source in enumerate(index.files, start=1):
        name = SINGLE_FILE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        entries = {tensor: entry for tensor, entry in index.tensors.items() if entry.file == source}
        weight_map |= dict.fromkeys(entries, name)
        with (directory / name).open("xb") as output:
            _write_shard(output, source, entries, cuts, metadata, advance)
    if count > 1:
        parameters = sum(math.prod(_shape(name, entry, cuts)) for name, entry in index.tensors.items())
        document = {
            "metadata": {"total_parameters": parameters, "total_size": output_bytes(index, cuts)},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (directory / INDEX_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _write_shard(
    output: BinaryIO,
    source: Path,
    entries: Mapping[str, TensorEntry],
    cuts: Mapping[str, Cut],
    metadata: Mapping[str, str],
    advance: Callable[[int], object],
) -> None:
    header: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for name, entry in entries.items():
        shape = _shape(name, entry, cuts)
        stop = position + _shape_bytes(entry, shape)
        header[name] = {"dtype": entry.dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    raw = json.dumps(header, separators=(",", ":")).encode()
    # safetensors readers may map tensors in place, so the data starts on a multiple of 8.
    raw += b" " * (-len(raw) % 8)
    output.write(len(raw).to_bytes(8, "little") + raw)
    with source.open("rb", buffering=0) as stream:
        for name, entry in entries.items():
            if name in cuts:
                for part in gather(entry, cuts[name].axis, cuts[name].positions):
                    advance(output.write(part.data))
            else:
                _copy(stream, entry, output, advance)


def _copy(stream: BinaryIO, entry: TensorEntry, output: BinaryIO, advance: Callable[[int], object]) -> None:
    stream.seek(entry.start)
    remaining = entry.nbytes
    while remaining:
        part = stream.read(min(CHUNK_BYTES, remaining))
        if not part:
            raise ModelError(f"{entry.file} became shorter while it was read")
        remaining -= len(part)
        advance(output.write(part))


def _shape(name: str, entry: TensorEntry, cuts: Mapping[str, Cut]) -> tuple[int, ...]:
    return cuts[name].shape if name in cuts else entry.shape


def _shape_bytes(entry: TensorEntry, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * DTYPE_BITS[entry.dtype] // 8
