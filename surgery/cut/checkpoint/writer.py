"""Write the cut checkpoint shard by shard. Several threads read, cut and write parts of tensors at the same time."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from chanfmt.base.files import reserve, write_at
from chanfmt.models.safetensors import DTYPE_BITS, INDEX_FILE, SINGLE_FILE, CheckpointIndex, TensorEntry
from surgery.cut.checkpoint.reader import Part, copy_parts, cut_parts
from surgery.cut.checkpoint.rounding import rounded, scaled, stored_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from surgery.cut.checkpoint.cuts import Cut

THREADS = 4
"""Number of threads, whatever the number of cores: one thread waits for the disk while another works."""


@dataclass(frozen=True)
class Shard:
    """One file of the result: its name, and the names of its tensors in order."""

    name: str
    tensors: Sequence[str]


def output_bytes(index: CheckpointIndex, cuts: Mapping[str, Cut], dtype: str | None = None) -> int:
    """Bytes of all tensors after ``cuts``, in ``dtype`` (see `surgery.cut.checkpoint.rounding.stored_dtype`)."""
    return sum(_bytes(name, entry, cuts, dtype) for name, entry in index.tensors.items())


def plan_shards(
    index: CheckpointIndex, cuts: Mapping[str, Cut], shard_bytes: int | None = None, dtype: str | None = None
) -> list[Shard]:
    """The files of the result with their tensors, named as the Hub expects.

    Args:
        shard_bytes: Largest size of a file in bytes (a larger tensor has a file of its own); None for files that correspond
            to the source's.
    """
    groups: list[list[str]] = []
    by_file: dict[Path, list[str]] = {file: [] for file in index.files}
    for name, entry in index.tensors.items():
        by_file[entry.file].append(name)
    if shard_bytes is None:
        groups = [names for names in by_file.values() if names]
    else:
        filled = 0
        for name in (name for names in by_file.values() for name in names):
            size = _bytes(name, index.tensors[name], cuts, dtype)
            if not groups or filled + size > shard_bytes:
                groups.append([])
                filled = 0
            groups[-1].append(name)
            filled += size
    if len(groups) == 1:
        return [Shard(SINGLE_FILE, groups[0])]
    return [Shard(f"model-{number:05d}-of-{len(groups):05d}.safetensors", names) for number, names in enumerate(groups, start=1)]


def write_checkpoint(
    index: CheckpointIndex,
    cuts: Mapping[str, Cut],
    directory: Path,
    advance: Callable[[int], object],
    shard_bytes: int | None = None,
    dtype: str | None = None,
) -> None:
    """Write the checkpoint ``index`` after ``cuts`` into ``directory``, as safetensors files with an index.

    The header of a file comes first, because all shapes are known, and then its tensors in order. Tensors without a cut
    are copied as bytes. The space of a file is reserved before anything is written to it.

    Args:
        advance: Called with the number of bytes just written.
        shard_bytes: See `plan_shards`.
        dtype: Dtype of floating tensors; None to leave them as they are stored.

    Raises:
        ModelError: The source is shorter than its header says, or a number is too large for ``dtype``.
        OSError: The destination cannot be written.
    """
    shards = plan_shards(index, cuts, shard_bytes, dtype)
    metadata = {"format": "pt", **index.metadata}
    for shard in shards:
        _write_shard(directory / shard.name, index, shard, cuts, metadata, advance, dtype)
    # A single file has an index too: vLLM and SGLang take every file with the suffix of safetensors that no index leaves out, and
    # a result holds one that is not a weight, the kept channels.
    parameters = sum(math.prod(_shape(name, entry, cuts)) for name, entry in index.tensors.items())
    weight_map = {name: shard.name for shard in shards for name in shard.tensors}
    document = {
        "metadata": {"total_parameters": parameters, "total_size": output_bytes(index, cuts, dtype)},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (directory / INDEX_FILE).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _write_shard(
    path: Path,
    index: CheckpointIndex,
    shard: Shard,
    cuts: Mapping[str, Cut],
    metadata: Mapping[str, str],
    advance: Callable[[int], object],
    dtype: str | None,
) -> None:
    header: dict[str, object] = {"__metadata__": metadata}
    position = 0
    offsets = {}
    for name in shard.tensors:
        entry = index.tensors[name]
        offsets[name], stop = position, position + _bytes(name, entry, cuts, dtype)
        header[name] = {
            "dtype": stored_dtype(entry, dtype),
            "shape": list(_shape(name, entry, cuts)),
            "data_offsets": [position, stop],
        }
        position = stop
    raw = json.dumps(header, separators=(",", ":")).encode()
    # Readers of safetensors may map tensors in place, so the data starts at a multiple of 8 bytes.
    raw += b" " * (-len(raw) % 8)
    data = 8 + len(raw)
    sources = {file: os.open(file, os.O_RDONLY) for file in {index.tensors[name].file for name in shard.tensors}}
    target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        reserve(path, data + position)
        write_at(target, len(raw).to_bytes(8, "little") + raw, 0)

        def parts() -> Iterator[tuple[str, Part]]:
            for name in shard.tensors:
                entry = index.tensors[name]
                for part in cut_parts(entry, cuts[name]) if name in cuts else copy_parts(entry):
                    yield name, part

        def work(name: str, part: Part) -> int:
            entry = index.tensors[name]
            new, read = stored_dtype(entry, dtype), part.read(sources[entry.file])
            if new != entry.dtype:
                read = rounded(read, entry.dtype, new, name)
            return write_at(target, read, data + offsets[name] + scaled(part.offset, entry.dtype, new))

        _in_threads(work, parts(), advance)
    finally:
        for descriptor in (target, *sources.values()):
            os.close(descriptor)


def _in_threads(work: Callable[[str, Part], int], parts: Iterator[tuple[str, Part]], advance: Callable[[int], object]) -> None:
    """Work on a few of ``parts`` at a time, so that only these few are in memory."""
    running: deque[Future[int]] = deque()
    with ThreadPoolExecutor(THREADS) as pool:
        try:
            for part in parts:
                running.append(pool.submit(work, *part))
                if len(running) > THREADS:
                    advance(running.popleft().result())
            while running:
                advance(running.popleft().result())
        finally:
            for future in running:
                future.cancel()


def _shape(name: str, entry: TensorEntry, cuts: Mapping[str, Cut]) -> tuple[int, ...]:
    return cuts[name].shape if name in cuts else entry.shape


def _bytes(name: str, entry: TensorEntry, cuts: Mapping[str, Cut], dtype: str | None) -> int:
    return math.prod(_shape(name, entry, cuts)) * DTYPE_BITS[stored_dtype(entry, dtype)] // 8
