"""The tensors of a safetensors checkpoint directory, read from the headers alone, and the checkpoint's fingerprint.

Checkpoints are untrusted input: every byte range is checked before it is used. The module needs neither torch nor
safetensors, so it knows every dtype.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from chanfmt.base.errors import ModelError
from chanfmt.base.inputs import file_size
from chanfmt.base.parsed import no_duplicates

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PICKLED_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_PICKLED_MODEL = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin")
_NOT_WEIGHTS = (
    "training_args.bin",
    "optimizer.pt",
    "optimizer.bin",
    "scheduler.pt",
    "scheduler.bin",
    "rng_state.pth",
    "scaler.pt",
)
"""Pickled files that a trainer leaves beside the weights."""

DTYPE_BITS: dict[str, int] = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
"""Bits per element of every safetensors dtype."""
CONTAINERS = {8: "u1", 16: "<u2", 32: "<u4", 64: "<u8"}
"""Unsigned integer type that holds an element, by the element's bits. Elements smaller than a byte have none."""

_MAX_HEADER = 100_000_000
_MAX_INDEX = 100_000_000
_MAX_RANK = 16
_SAMPLE = 256


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor's bytes lie.

    Attributes:
        file: The shard.
        dtype: safetensors dtype name, such as ``BF16``.
        shape: Lengths of its axes, slowest first.
        start, stop: Byte range in ``file``, counted from the file's first byte.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.stop - self.start

    @property
    def elements(self) -> int:
        """Elements of the tensor."""
        count = 1
        for length in self.shape:
            count *= length
        return count


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of a checkpoint directory.

    Attributes:
        directory: The checkpoint directory.
        tensors: Name to `TensorEntry`, shard by shard, in the order of the bytes.
        metadata: ``__metadata__`` of the shards, merged; usually ``{"format": "pt"}``.
        files: Shards, in the order of their names.
        described: Whether the index of the shards has the field ``metadata``, which only transformers needs.
    """

    directory: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    described: bool = True

    @classmethod
    def open(cls, directory: Path) -> CheckpointIndex:
        """Read the headers of the checkpoint in ``directory``; no weights are read.

        Raises:
            ModelError: There is no safetensors checkpoint, or it is damaged, incomplete or unsafe.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise ModelError(f"{directory} is not a directory")
        if (directory / SINGLE_FILE).is_file():
            if (directory / INDEX_FILE).is_file():
                _check_one_checkpoint(directory)
            weight_map: dict[str, str] = {}
            described, names = True, [SINGLE_FILE]
        elif (directory / INDEX_FILE).is_file():
            weight_map, described = _read_weight_map(directory / INDEX_FILE)
            names = sorted(set(weight_map.values()))
        else:
            raise _nothing_to_read(directory)
        tensors: dict[str, TensorEntry] = {}
        metadata: dict[str, str] = {}
        for name in names:
            file = directory / name
            if not file.is_file():
                raise ModelError(f"the shard {name} of {directory} is missing", hint="download the checkpoint again")
            entries, shard_metadata = read_header(file)
            twice = tensors.keys() & entries.keys()
            if twice:
                raise ModelError(f"{directory} holds the tensor {min(twice)!r} in two shards")
            tensors |= entries
            metadata |= shard_metadata
        for tensor, name in weight_map.items():
            if tensor not in tensors or tensors[tensor].file.name != name:
                raise ModelError(
                    f"{INDEX_FILE} says that {name} holds {tensor!r}, but {name} does not",
                    hint="download the checkpoint again",
                )
        return cls(directory, tensors, metadata, tuple(directory / name for name in names), described)

    @property
    def unused(self) -> list[str]:
        """Files in the directory that are named as weights of a model are, and do not belong to the checkpoint."""
        used = {file.name for file in self.files}
        return sorted(path.name for path in self.directory.glob("model*.safetensors") if path.name not in used)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    @property
    def parameters(self) -> int:
        """Elements of all tensors."""
        return sum(entry.elements for entry in self.tensors.values())


def read_header(file: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Tensors of one safetensors file in the order of their bytes, and its ``__metadata__``.

    Raises:
        ModelError: The header is damaged, or its byte ranges do not tile the file exactly.
    """
    try:
        size = file_size(file)
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(_MAX_HEADER, size - 8):
                raise ModelError(f"{file} is not a safetensors file, or it is cut short")
            raw = stream.read(length)
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}") from None
    try:
        header = json.loads(raw, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"the header of {file} is damaged: {error}") from None
    if not isinstance(header, dict):
        raise ModelError(f"the header of {file} is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ModelError(f"the metadata of {file} is not a JSON object of strings")
    base = 8 + length
    entries = {name: _entry(file, name, item, base) for name, item in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    position = base
    for name, entry in ordered.items():
        if entry.stop > size:
            raise ModelError(
                f"{file} is cut short: {name!r} ends at byte {entry.stop} of {size}",
                hint="download the checkpoint again",
            )
        if entry.start < position:
            raise ModelError(f"{file}: the bytes of {name!r} overlap another tensor's")
        if entry.start > position:
            raise ModelError(f"{file}: the bytes before {name!r} belong to no tensor")
        position = entry.stop
    if position != size:
        raise ModelError(f"{file} holds {size - position} bytes that belong to no tensor")
    return ordered, metadata


def fingerprint(index: CheckpointIndex) -> str:
    """SHA-256 that identifies a checkpoint's values, whatever its shards are; hexadecimal.

    For every tensor in the order of names, the digest covers its name, dtype and shape as one JSON line, then 256 bytes
    each from its start, its middle and its end. A tensor of up to 768 bytes is covered whole.

    Raises:
        ModelError: A shard cannot be read.
    """
    samples: dict[str, bytes] = {}
    for file in index.files:
        try:
            with file.open("rb", buffering=0) as stream:
                for name, entry in index.tensors.items():
                    if entry.file == file:
                        samples[name] = b"".join(
                            os.pread(stream.fileno(), stop - start, start) for start, stop in _sample_ranges(entry)
                        )
        except OSError as error:
            raise ModelError(f"cannot read {file}: {error.strerror}") from None
    digest = hashlib.sha256()
    for name in sorted(index.tensors):
        entry = index.tensors[name]
        digest.update(json.dumps([name, entry.dtype, list(entry.shape)]).encode() + b"\n")
        digest.update(samples[name])
    return digest.hexdigest()


def _sample_ranges(entry: TensorEntry) -> Iterable[tuple[int, int]]:
    if entry.nbytes <= 3 * _SAMPLE:
        return [(entry.start, entry.stop)]
    middle = entry.start + (entry.nbytes - _SAMPLE) // 2
    return [(start, start + _SAMPLE) for start in (entry.start, middle, entry.stop - _SAMPLE)]


def _entry(file: Path, name: str, item: Any, base: int) -> TensorEntry:
    where = f"{file}: the tensor {name!r}"
    if not isinstance(item, dict):
        raise ModelError(f"{where} is not described")
    dtype, shape, offsets = item.get("dtype"), item.get("shape"), item.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ModelError(f"{where} has the unknown dtype {dtype!r}")
    if not _counts(shape) or len(shape) > _MAX_RANK or not _counts(offsets) or len(offsets) != 2:
        raise ModelError(f"{where} has no valid shape and byte range")
    entry = TensorEntry(file, dtype, tuple(shape), base + offsets[0], base + offsets[1])
    if entry.elements * DTYPE_BITS[dtype] != entry.nbytes * 8:
        raise ModelError(f"{where} has {entry.nbytes} bytes, which is not {dtype} of shape {list(shape)}")
    return entry


def _counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)


def _read_weight_map(path: Path) -> tuple[dict[str, str], bool]:
    """Tensor to shard, and whether the index has ``metadata``. Raises `ModelError`."""
    try:
        if file_size(path) > _MAX_INDEX:
            raise ModelError(f"{path} is larger than {_MAX_INDEX} bytes")
        index = json.loads(path.read_bytes(), object_pairs_hook=no_duplicates)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is damaged: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path} has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or Path(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise ModelError(f"{path} names the shard {name!r}, which is not a safetensors file of its directory")
    return weight_map, isinstance(index.get("metadata"), dict)


def _check_one_checkpoint(directory: Path) -> None:
    """Raise `ModelError` if the single file and the shards of the index, which both lie in ``directory``, differ.

    transformers reads the single file, other programs the index. An interrupted save or download leaves one of them stale.
    """
    single, index = directory / SINGLE_FILE, directory / INDEX_FILE
    shards = sorted(set(_read_weight_map(index)[0].values()))
    if SINGLE_FILE in shards or not all((directory / name).is_file() for name in shards):
        # Programs that read the index fail, and say so. transformers reads the single file.
        return
    try:
        own = CheckpointIndex(directory, read_header(single)[0], files=(single,))
    except ModelError as error:
        raise ModelError(
            f"{error.message}; the shards of {INDEX_FILE} lie beside it",
            hint=f"if these shards are the complete checkpoint, remove {SINGLE_FILE}, which transformers reads first",
        ) from None
    others: dict[str, TensorEntry] = {}
    for name in shards:
        others |= read_header(directory / name)[0]
    sharded = CheckpointIndex(directory, others, files=tuple(directory / name for name in shards))
    if fingerprint(own) != fingerprint(sharded):
        raise ModelError(
            f"{directory} holds two different checkpoints: {SINGLE_FILE}, and the shards of {INDEX_FILE}",
            hint="programs differ in which of the two they read; remove the stale one",
        )


def _nothing_to_read(directory: Path) -> ModelError:
    try:
        names = sorted(path.name for path in directory.iterdir() if path.is_file())
    except OSError as error:
        return ModelError(f"cannot read {directory}: {error.strerror}")
    pickled = next((name for name in names if _PICKLED_MODEL.fullmatch(name)), "")
    if pickled:
        loader = _class_name(directory)
        return ModelError(
            f"{directory} has only pickled weights ({pickled}), and reading pickled weights can run code",
            hint=f"convert it once, on a machine where you trust it: transformers.{loader}.from_pretrained({str(directory)!r})"
            ".save_pretrained(DIRECTORY) writes safetensors; then copy the tokenizer's files to DIRECTORY",
        )
    other = next((name for name in names if name.endswith(PICKLED_SUFFIXES) and name not in _NOT_WEIGHTS), "")
    if other:
        return ModelError(
            f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}, and {other} is not a checkpoint that transformers reads",
            hint="convert it with the script that transformers has for this model, or use a checkpoint in transformers' format",
        )
    if directory.parent.name == "snapshots":
        return ModelError(
            f"the model's repository holds neither {SINGLE_FILE} nor {INDEX_FILE} at this commit",
            hint="if it holds pickled weights (pytorch_model.bin), which can run code when they are read, convert it once, on a "
            f"machine where you trust it: transformers.{_class_name(directory)}.from_pretrained(ID).save_pretrained(DIRECTORY); "
            "or give --revision with a commit that has safetensors",
        )
    return ModelError(
        f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}",
        hint="it is not a checkpoint directory as transformers saves it",
    )


def _class_name(directory: Path) -> str:
    """The class that ``config.json`` names, which loads the model with its head; ``AutoModel`` if it names none."""
    try:
        named = json.loads((directory / "config.json").read_bytes())["architectures"][0]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, IndexError):
        return "AutoModel"
    return named if isinstance(named, str) and named.isidentifier() else "AutoModel"
