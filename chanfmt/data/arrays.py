"""Calibration on a file of arrays: the inputs of the model's ``forward``, samples along the first axis (``--calib FILE.npz``)."""

from __future__ import annotations

import hashlib
import json
import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from chanfmt.base.errors import UsageError, first_line
from chanfmt.base.narrate import say
from chanfmt.data.source import Source
from chanfmt.data.tokens import canonical_order, check_context

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chanfmt.models.source import ModelSource

IDS = "input_ids"
LABELS = "labels"
_MASK = "attention_mask"


@dataclass(frozen=True)
class InputFile:
    """The arrays of a file, each with the same number of samples, without padding.

    Attributes:
        name: Name of the file, without its directory.
        sha256: SHA-256 of the file, hexadecimal.
        arrays: Name to values (sample, ...), all finite.
    """

    name: str
    sha256: str
    arrays: Mapping[str, np.ndarray]

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def holds_tokens(self) -> bool:
        """Whether the file holds sequences of tokens and nothing else. Such a file is treated as text is."""
        return IDS in self.arrays and not self.arrays.keys() - {IDS, _MASK}

    @property
    def layout(self) -> str:
        """The arrays as an atlas records them: JSON, name to type and shape of one sample."""
        return json.dumps({name: [_code(values), list(values.shape[1:])] for name, values in sorted(self.arrays.items())})


@dataclass(frozen=True)
class Samples:
    """A batch of samples, ready for the model.

    Attributes:
        arrays: Name to values (sample, ...), on the device of the model.
        sha256: SHA-256 of each sample, hexadecimal.
    """

    arrays: Mapping[str, torch.Tensor]
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class CalibrationInputs:
    """The samples that a model is measured on, in canonical order; see `chanfmt.data.tokens.CalibrationTokens`.

    Attributes:
        arrays: Name to values (sample, ...).
        sha256: SHA-256 of each sample, hexadecimal.
        split_of: Split of each sample, uint8.
        source_of: Number of the source of each sample, int32.
        seq_len: Rows of one sample in an FFN of the decoder; if there is no decoder, in the FFN with the most rows.
        rows: Rows of one sample in the FFN with the most rows.
    """

    arrays: Mapping[str, np.ndarray]
    sha256: tuple[str, ...]
    split_of: np.ndarray
    source_of: np.ndarray
    seq_len: int
    rows: int

    def __len__(self) -> int:
        return len(self.sha256)

    def batch(self, start: int, stop: int, model: Any) -> Samples:
        """Samples ``start`` to ``stop`` (excluded) as ``model`` and its loss take them."""
        arrays = {name: values[start:stop] for name, values in self.arrays.items()}
        return Samples(placed(arrays, model), self.sha256[start:stop])


def read_inputs(path: Path) -> InputFile:
    """Read the arrays in ``path``, a ``.npz`` or ``.safetensors`` file.

    Raises:
        UsageError: The file cannot be read, or its arrays are not a set of whole samples.
    """
    try:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        arrays = _load(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from None
    if not arrays:
        raise UsageError(f"{path} holds no array")
    for name, values in arrays.items():
        if values.dtype.kind not in "fiub":
            raise UsageError(f"{path}: {name} has the type {values.dtype}", hint="save numbers: float32 values, int64 ids")
        if values.ndim == 0:
            raise UsageError(f"{path}: {name} is a single number", hint="the first axis of every array runs over samples")
        if values.size and not np.isfinite(values).all():
            raise UsageError(
                f"{path}: {name} holds NaN or infinite values, in sample {int(np.argwhere(~np.isfinite(values))[0, 0])} first"
            )
        if name.endswith(_MASK) and not values.all():
            raise UsageError(
                f"{path}: {name} hides part of sample {int(np.argwhere(values == 0)[0, 0])}; padding would count as tokens",
                hint="cut all samples to the length of the shortest",
            )
    counts = {name: len(values) for name, values in arrays.items()}
    if len(set(counts.values())) > 1:
        raise UsageError(
            f"{path}: its arrays have different numbers of samples: "
            + ", ".join(f"{name} {count}" for name, count in counts.items()),
            hint="the first axis of every array runs over samples",
        )
    if not all(values.size for values in arrays.values()):
        raise UsageError(f"{path} holds no samples")
    if LABELS in arrays:
        _check_labels(arrays[LABELS], path)
    return InputFile(path.name, sha256, arrays)


def draw_tokens(file: InputFile, sequences: int, seq_len: int, seed: int, *, model: ModelSource) -> Source:
    """Draw ``sequences`` of the token sequences in ``file``, cut to ``seq_len``; all of them if there are fewer.

    Raises:
        UsageError: The sequences are not token ids, ``model`` has no embedding for one, or they are longer than its context.
    """
    ids = file.arrays[IDS]
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.shape[1] < 2:
        raise UsageError(f"{file.name}: {IDS} is {ids.dtype} of shape {ids.shape}, not token ids (sample, position)")
    rows = model.config.get_text_config().vocab_size
    if ids.min() < 0 or ids.max() >= rows:
        raise UsageError(
            f"{file.name}: {IDS} run from {ids.min()} to {ids.max()}, and the embedding of {model.id} has {rows} rows",
            hint="make the file with the model's own tokenizer",
        )
    if ids.shape[1] > seq_len:
        say(
            f"note: the sequences of {file.name} have {ids.shape[1]} tokens; the first {seq_len} of each are used (--seq-len)",
        )
        ids = ids[:, :seq_len]
    check_context(model.config, ids.shape[1], model.id)
    different = np.unique(ids.astype(np.int32), axis=0)
    chosen = _chosen(len(different), sequences, seed, file.name)
    return Source(file.name, file.sha256, len(file), different[chosen], file.layout)


def draw_samples(file: InputFile, sequences: int, seed: int, *, seq_len: int, rows: int) -> tuple[Source, CalibrationInputs]:
    """Draw ``sequences`` of the different samples in ``file``, in canonical order; all of them if there are fewer."""
    order, sha256, _ = canonical_order([_digest(file.arrays, index) for index in range(len(file))])
    chosen = _chosen(len(order), sequences, seed, file.name)
    _, sha256, split_of = canonical_order([sha256[index] for index in chosen])
    source = Source(file.name, file.sha256, len(file), np.zeros((0, 0), np.int32), file.layout)
    return source, CalibrationInputs(
        {name: values[order[chosen]] for name, values in file.arrays.items()},
        sha256,
        split_of,
        np.zeros(len(chosen), np.int32),
        seq_len,
        rows,
    )


def placed(arrays: Mapping[str, np.ndarray], model: Any) -> dict[str, torch.Tensor]:
    """``arrays`` on the device of ``model``: floats in the dtype of ``model``, whole numbers as int64."""
    parameter = next(model.parameters())
    wanted = {"f": parameter.dtype, "i": torch.int64, "u": torch.int64, "b": torch.bool}
    return {
        name: torch.from_numpy(np.array(values)).to(parameter.device, wanted[values.dtype.kind])
        for name, values in arrays.items()
    }


def _load(path: Path) -> dict[str, np.ndarray]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.numpy import load_file

        try:
            return load_file(path)
        except (SafetensorError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is not a readable .safetensors file of numpy's types: {first_line(error)}") from None
    if not zipfile.is_zipfile(path):
        raise UsageError(f"{path} is not a .npz file", hint="write it with numpy.savez(path, NAME=array, ...)")
    try:
        # An object array is a pickle, and a pickle can run code.
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise UsageError(
            f"{path} is not a readable .npz file of numbers: {first_line(error)}",
            hint="write it with numpy.savez(path, NAME=array, ...), each array of one shape",
        ) from None


def _check_labels(labels: np.ndarray, path: Path) -> None:
    if labels.dtype.kind not in "iu":
        raise UsageError(
            f"{path}: {LABELS} has the type {labels.dtype}; classes and token ids are whole numbers",
            hint="leave the labels out to measure against the embedding",
        )
    if labels.min() < 0:
        raise UsageError(
            f"{path}: {LABELS} holds {labels.min()}; positions without a label would count as tokens too",
            hint="cut all samples to the length of the shortest",
        )


def _chosen(available: int, sequences: int, seed: int, name: str) -> np.ndarray:
    """Indices of the samples that are used, out of ``available``, ascending."""
    if sequences < available:
        return np.sort(np.random.default_rng(seed).choice(available, sequences, replace=False))
    if sequences > available:
        say(f"note: {name} has {available} different samples, not {sequences}; using them all")
    return np.arange(available)


def _digest(arrays: Mapping[str, np.ndarray], index: int) -> str:
    """SHA-256 of one sample (spec section "Calibration")."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        values = arrays[name][index]
        digest.update(f"{name} {_code(values)} {','.join(map(str, values.shape))}\n".encode())
        digest.update(np.ascontiguousarray(values, values.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _code(values: Any) -> str:
    """Type of ``values`` as in the specification, such as f4 or i8."""
    return f"{values.dtype.kind}{values.dtype.itemsize}"
