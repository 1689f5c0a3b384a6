"""How large the GGUF file of a cut will be, from the header of the source file and the FFNs of an atlas."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chanfmt.algebra.gguf_names import tensor_name, tensor_names
from chanfmt.base.errors import ModelError, UsageError
from chanfmt.base.inputs import input_path
from chanfmt.base.text import one_line
from chanfmt.models.gguf_header import read_header
from chanfmt.models.source import ModelSource, local_source
from surgery.cut.gguf.convert import check_convertible
from surgery.cut.gguf.layout import PURPOSE, architecture, target_kind, tensor_bytes
from surgery.planning.formats import GGUF
from surgery.recovery.options import BIAS, GRADIENTS, BiasRecovery
from surgery.result.names import IMATRIX_FILE

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from chanfmt.format.records import Block
    from chanfmt.models.gguf_header import Header, StoredTensor
    from surgery.cut.options import CutOptions
    from surgery.planning.options import PlanOptions
    from surgery.planning.plan import BlockPlan, PruningPlan
    from surgery.recovery.options import Recovery

_MORE_HEADER = 1 << 12
"""Bytes by which the header may grow: the result has a longer name, and it names its base model."""


@dataclass(frozen=True, eq=False)
class _Held:
    """A tensor of the file that belongs to an FFN.

    Attributes:
        tensor: The tensor.
        channels: Channels of the FFN.
        axis: Axis of the tensor's shape that is cut.
        again: Whether its numbers are quantised again once the FFN is cut.
    """

    tensor: StoredTensor
    channels: int
    axis: int
    again: bool


@dataclass(frozen=True, eq=False)
class GgufBytes:
    """Bytes of the GGUF file of a cut (see `surgery.planning.formats.FileBytes`).

    Attributes:
        before: Bytes of the source file.
        header: Header of the source file.
        quant, cut_quant: As in `surgery.cut.options.CutOptions`.
        rest: Bytes of the result besides the tensors in ``held``.
        held: For every FFN, in model order, its tensors.
    """

    before: int
    header: Header
    quant: str | None
    cut_quant: str | None
    rest: int
    held: tuple[tuple[_Held, ...], ...]

    def after(self, widths: Sequence[int]) -> int:
        """Bytes of the file at most, if the FFNs have ``widths``."""
        return self.rest + sum(self._bytes(item, width) for items, width in zip(self.held, widths, strict=True) for item in items)

    def _bytes(self, item: _Held, width: int) -> int:
        shape = list(item.tensor.shape)
        # A fused projection has a multiple of the width.
        shape[item.axis] = shape[item.axis] * width // item.channels
        same = width == item.channels or not item.again
        return _written_bytes(self.header, item.tensor, tuple(shape), same=same, quant=self.quant, cut_quant=self.cut_quant)


def gguf_file(model: ModelSource | str | os.PathLike[str] | None) -> Path | None:
    """The GGUF file that ``model`` is or names; None if it is another kind of model."""
    if isinstance(model, ModelSource):
        return model.file
    if model is None or not os.fspath(model).endswith(".gguf"):
        return None
    return input_path(model)


def check_gguf_output(directory: Path) -> None:
    """Raise `UsageError` if ``directory`` cannot be the output of a cut as a GGUF file."""
    if directory.suffix == ".gguf":
        raise UsageError(
            f"the output {directory} is a directory, also with --format gguf: records and the card lie beside the file",
            hint=f"name the directory: -o {directory.with_suffix('')}",
        )
    if f"{directory.name}.gguf" == IMATRIX_FILE:
        raise UsageError(f"{IMATRIX_FILE} is the name of an importance matrix", hint="choose another -o")


def gguf_bytes(
    file: Path, blocks: Sequence[Block], *, quant: str | None = None, cut_quant: str | None = None, recover: str = "none"
) -> GgufBytes:
    """What counts the bytes of a GGUF file that is made from ``file``. Its header is read, and no tensor.

    Args:
        blocks: The model's FFNs, as an atlas lists them.
        quant, cut_quant: As in `surgery.cut.options.CutOptions`.
        recover: Name of the recovery.

    Raises:
        ModelError: The file cannot be read, or it has no place for a tensor of an FFN.
        MissingPackageError: The package gguf is not installed.
    """
    header = read_header(file)
    kind = architecture(header)
    names = tensor_names(kind, 1 + max(block.layer_index for block in blocks), PURPOSE)
    found: list[tuple[_Held, ...]] = []
    for block in blocks:
        held: dict[str, _Held] = {}
        for item in block.tensors:
            name = None if names is None else tensor_name(names, item.tensor)
            if name is None or name not in header.tensors:
                raise ModelError(f"{file} has no place for {item.tensor}", hint="name the .gguf file that was measured")
            tensor, writes = header.tensors[name], item.role == "write"
            if item.axis is None:
                continue
            # A recovery with gradients changes the read projections too.
            axis = len(tensor.shape) - (1 if writes or len(tensor.shape) == 1 else 2)
            held[name] = _Held(tensor, block.n_channels, axis, writes or recover in GRADIENTS)
        found.append(tuple(held.values()))
    inside = {item.tensor.name for items in found for item in items}
    rest = sum(
        _written_bytes(header, tensor, tensor.shape, same=True, quant=quant, cut_quant=cut_quant)
        for name, tensor in header.tensors.items()
        if name not in inside
    )
    return GgufBytes(file.stat().st_size, header, quant, cut_quant, header.data + _MORE_HEADER + rest, tuple(found))


def check_biases(blocks: Iterable[Block | BlockPlan], recover: str) -> None:
    """Raise `UsageError` if the recovery called ``recover`` adds biases to ``blocks``, which a GGUF file has no place for."""
    without = next((block for block in blocks if not any(item.role == "write_bias" for item in block.tensors)), None)
    if recover == BIAS and without is not None:
        raise UsageError(
            f"--recover {BIAS} adds a bias to {one_line(without.module)}, for which a GGUF file has no place",
            hint="use --recover lstsq, block or distill, or leave out --format gguf",
        )


def check_biases_of(plan: PruningPlan, recovery: Recovery | None) -> None:
    """`check_biases` for the FFNs that ``plan`` cuts and a recovery that is ready."""
    if isinstance(recovery, BiasRecovery):
        check_biases((block for block in plan.blocks if block.is_cut), BIAS)


def in_format(
    plan: PlanOptions,
    cut: CutOptions,
    blocks: Sequence[Block],
    model: ModelSource | str | os.PathLike[str] | None,
    recover: str = "none",
) -> PlanOptions:
    """``plan`` with the format of the result, and with what counts the bytes of its file if ``model`` names a GGUF file.

    Raises:
        UsageError: The file has no place for what the recovery adds.
        ModelError: As `gguf_bytes`, or ``model`` is a checkpoint in a directory that cannot be converted.
        MissingPackageError: The package gguf is not installed.
    """
    if cut.format != GGUF:
        return replace(plan, format=cut.format)
    check_biases(blocks, recover)
    file = gguf_file(model)
    if model is not None and file is None:
        source = model if isinstance(model, ModelSource) else local_source(os.fspath(model))
        # A model on the Hub is checked when it is fetched.
        if source is not None:
            check_convertible(source)
    counted = None if file is None else gguf_bytes(file, blocks, quant=cut.quant, cut_quant=cut.cut_quant, recover=recover)
    return replace(plan, format=GGUF, file_bytes=counted)


def _written_bytes(
    header: Header, tensor: StoredTensor, shape: tuple[int, ...], *, same: bool, quant: str | None, cut_quant: str | None
) -> int:
    kind, _ = target_kind(header, tensor, shape[-1], same=same, quant=quant, cut_quant=cut_quant)
    size = tensor_bytes(replace(tensor, shape=shape, kind=kind))
    return size + -size % header.alignment
