"""Read an importance atlas: numpy and h5py only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np

from chanfmt import schema
from chanfmt.container import dtype_code, open_container, read_text
from chanfmt.digest import SEAL, SEAL_BYTES, content_sha256, dimensions, file_sha256
from chanfmt.errors import AtlasError, UsageError, first_line
from chanfmt.records import (
    AtlasContent,
    Block,
    CalibrationRecord,
    Contribution,
    ExtensionGroup,
    ExtensionVariable,
    LabelSettings,
    ModelRecord,
    ProducerRecord,
    StackData,
)

if TYPE_CHECKING:
    from collections.abc import Container, Iterator
    from types import TracebackType

READ_WHOLE_BYTES = 32 << 20
"""An array up to this size is read at once: each read costs more than a megabyte of contiguous data."""


class Stack:
    """FFNs of one kind, place and width; its arrays are read on demand and kept.

    Attributes:
        name: ``decoder``, ``encoder``, ...
        kind: ``dense``, ``experts`` or ``shared``.
        gated: Whether the FFNs have a gate projection.
        activation: Activation function named by the model's config.
        layers: Layer index of every row, int32 (layer,).
        n_channels, n_experts, splits: Lengths of the other dimensions (0 experts where dense).
        supports: Write support sizes that ``connectivity_at`` holds.
    """

    def __init__(self, group: h5py.Group, *, needed: Container[str]) -> None:
        self._group = group
        self._cache: dict[str, np.ndarray] = {}
        self.name = str(group.name).rsplit("/", 1)[-1]
        where = str(group.name)
        self.kind: str = _attribute(group, where, "kind", str)
        if self.kind not in schema.STACK_KINDS:
            raise AtlasError(f"{where} has the unknown kind {self.kind!r}")
        self.gated = bool(_attribute(group, where, "gated", int))
        self.activation: str = _attribute(group, where, "activation", str)
        lengths: dict[str, int] = {}
        for variable in schema.INDEX_VARIABLES:
            if variable.name in group:
                _check_variable(group, variable, self.kind, lengths)
        for name in ("layer", "channel", "split", *(("expert",) if self.kind == "experts" else ())):
            if name not in lengths:
                raise AtlasError(f"{where} lacks the dimension {name!r}")
        for variable in schema.STACK_VARIABLES:
            if variable.name in group:
                _check_variable(group, variable, self.kind, lengths)
            elif variable.name in needed and (self.gated or not variable.gated_only):
                raise AtlasError(f"{where} lacks {variable.name!r}")
        self.layers: np.ndarray = group["layer"][...]
        self.n_channels = lengths["channel"]
        self.n_experts = lengths.get("expert", 0)
        self.splits = lengths["split"]
        self.supports: tuple[int, ...] = tuple(group["support"][...].tolist()) if "support" in lengths else ()

    def __contains__(self, name: str) -> bool:
        return name in self._group

    def __getitem__(self, name: str) -> np.ndarray:
        """The array ``name``, dimensions per `chanfmt.schema`. Raises `AtlasError` where it is absent."""
        if name not in self._cache:
            self._cache[name] = self._read(name, None)
        return self._cache[name]

    def row(self, name: str, row: int) -> np.ndarray:
        """One layer's values of ``name``; the others are read along where they are few."""
        if name in self._cache or self._dataset(name).nbytes <= READ_WHOLE_BYTES:
            return self[name][row]
        return self._read(name, row)

    @property
    def variables(self) -> list[str]:
        """Names of the arrays this stack holds, in the schema's order."""
        return [variable.name for variable in schema.STACK_VARIABLES if variable.name in self._group]

    @property
    def metrics(self) -> list[str]:
        """Names of the per-channel metrics this stack holds, in the schema's order."""
        return [metric.name for metric in schema.METRICS if metric.name in self._group]

    def data(self) -> StackData:
        """Everything this stack holds, in memory."""
        return StackData(
            self.name, self.kind, self.gated, self.activation, self.layers, self.n_channels,
            self.n_experts, self.splits, {name: self[name] for name in self.variables}, self.supports,
        )

    def _read(self, name: str, row: int | None) -> np.ndarray:
        dataset = self._dataset(name)
        try:
            return dataset[...] if row is None else dataset[row]
        except (OSError, RuntimeError) as error:
            raise AtlasError(f"{name} cannot be read: {first_line(error)}") from None

    def _dataset(self, name: str) -> h5py.Dataset:
        if name not in self._group:
            raise AtlasError(f"the atlas holds no {name!r} for {self.name}", hint="build it again with this chanfmt")
        return self._group[name]


class Atlas:
    """An open importance atlas. Use as a context manager, or call `close`.

    Attributes:
        path: The file.
        status: ``complete`` or ``partial``.
        dropped: Variables left out because they could not be merged or recomputed.
        core_rho: Share of channels in the core that connectivity and redundancy refer to.
        model, calibration, labels, producer: What the file says of each.
        blocks: One `Block` per FFN, in model order.
        stacks: Name to `Stack`.
        content_sha256: Digest the file states (checked by `verify` only).
    """

    def __init__(self, file: h5py.File, path: Path) -> None:
        self._file = file
        self.path = path
        root = {item.name: _attribute(file, "/", item.name, str) for item in schema.ATTRIBUTES["/"]}
        self.format_version: str = root["format_version"]
        self.status: str = root["status"]
        if self.status not in schema.STATUSES:
            raise AtlasError(f"the status {self.status!r} is not one of {', '.join(schema.STATUSES)}")
        self.dropped: tuple[str, ...] = tuple(root["dropped"].split())
        self.title: str = root["title"]
        self.producer_name: str = root["producer"]
        self.created: str = root["created"]
        self.content_sha256: str = root["content_sha256"]
        self.model = _read_model(_group(file, "model"))
        self.calibration = _read_calibration(_group(file, "calibration"))
        settings = _attributes(_group(file, "labels"), "/labels")
        self.core_rho: float = settings.pop("core_rho")
        self.labels = LabelSettings(**settings)
        try:
            self.labels.check()
        except UsageError as error:
            raise AtlasError(f"/labels: {error.message.removeprefix('--')}") from None
        self.producer = _read_producer(_group(file, "producer"))
        stacks = _group(file, "stacks")
        needed = frozenset(
            variable.name for variable in schema.STACK_VARIABLES
            if self.status == "complete" and variable.required and variable.name not in self.dropped
        )
        self.stacks: dict[str, Stack] = {name: Stack(_group(stacks, name), needed=needed) for name in stacks}
        self.blocks = _read_blocks(_group(file, "block"), self.stacks)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> Atlas:
        """Open ``path`` for reading; with ``verify`` its digest is recomputed (0.1 s per 40 MB).

        Raises:
            AtlasError: Missing, not an atlas, newer major version, damaged or unsafe.
        """
        path = Path(path)
        file = open_container(path)
        try:
            atlas = cls(file, path)
            if verify:
                atlas.verify()
        except AtlasError as error:
            file.close()
            if str(path) in error.message:
                raise
            raise AtlasError(f"{path}: {error.message}", hint=error.hint) from None
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, RecursionError) as error:
            file.close()
            raise AtlasError(f"{path} is damaged: {error}", hint="copy it again, or rebuild it") from None
        return atlas

    def verify(self) -> None:
        """Recompute both digests. Raises `AtlasError` where one differs from what the file states."""
        hint = "copy it again, or rebuild it"
        if content_sha256(self._file) != self.content_sha256:
            raise AtlasError(f"{self.path} does not match its content_sha256: its data changed after it was written",
                             hint=hint, code="E401", where="/@content_sha256")
        if SEAL in self._file:
            seal = self._file[SEAL]
            if seal.nbytes != SEAL_BYTES or file_sha256(self.path, seal.id.get_offset()) != seal[...].tobytes():
                raise AtlasError(f"{self.path} does not match its file_sha256: its bytes changed after it was written",
                                 hint=hint, code="E402", where="/" + SEAL)

    def content(self) -> AtlasContent:
        """The whole atlas in memory."""
        return AtlasContent(
            self.title, self.model, self.calibration, self.labels, self.core_rho, self.blocks,
            tuple(stack.data() for stack in self.stacks.values()), self.producer, self.status, self.dropped,
            self.extensions(),
        )

    def extensions(self) -> tuple[ExtensionGroup, ...]:
        """What other programs put into the file, values read (spec section "Extensions")."""
        groups: list[ExtensionGroup] = []
        for name in self._file:
            if name.startswith(schema.EXTENSION_PREFIX) and isinstance(self._file[name], h5py.Group):
                groups += _read_extension(self._file[name])
        return tuple(groups)

    def block(self, layer: int, stack: str | None = None) -> Block:
        """The FFN of model layer ``layer`` (in ``stack``, where a layer has several).

        Raises:
            AtlasError: There is none, or there are several and ``stack`` does not say which.
        """
        if stack is not None and stack not in self.stacks:
            raise AtlasError(f"there is no stack {stack!r}", hint=f"stacks: {', '.join(self.stacks)}")
        found = [block for block in self.blocks
                 if block.layer_index == layer and stack in (None, block.stack)]
        if not found:
            layers = sorted({block.layer_index for block in self.blocks})
            raise AtlasError(f"there is no layer {layer}", hint=f"layers: {layers[0]} to {layers[-1]}")
        if len(found) > 1:
            names = ", ".join(block.stack for block in found)
            raise AtlasError(f"layer {layer} has several FFNs", hint=f"add --stack, one of: {names}")
        return found[0]

    def rows(self) -> Iterator[tuple[Block, Stack]]:
        """Every FFN with the stack that holds its arrays, in model order."""
        for block in self.blocks:
            yield block, self.stacks[block.stack]

    def close(self) -> None:
        """Close the file; arrays already read stay readable."""
        self._file.close()

    def __enter__(self) -> Atlas:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _group(parent: h5py.Group, name: str) -> h5py.Group:
    if name not in parent or not isinstance(parent[name], h5py.Group):
        raise AtlasError(f"the group {name!r} is missing")
    return parent[name]


def _attribute(item: h5py.Group, where: str, name: str, kind: type) -> Any:
    if name not in item.attrs:
        raise AtlasError(f"{where} lacks the attribute {name!r}")
    value = item.attrs[name]
    if kind is str:
        return read_text(value, f"{where}@{name}")
    if np.ndim(value) != 0 or np.asarray(value).dtype.kind not in ("iu" if kind is int else "iuf"):
        raise AtlasError(f"{where}@{name} is not a number")
    return kind(value)


def _attributes(group: h5py.Group, table: str) -> dict[str, Any]:
    kinds = {"str": str, "int": int, "float": float}
    return {
        attribute.name: _attribute(group, table, attribute.name, kinds[attribute.type])
        for attribute in schema.ATTRIBUTES[table]
    }


def _check_variable(group: h5py.Group, variable: schema.Variable, kind: str, lengths: dict[str, int]) -> None:
    dataset = group[variable.name]
    where = variable.name
    if not isinstance(dataset, h5py.Dataset):
        raise AtlasError(f"{where} is not a dataset")
    if dtype_code(dataset) != variable.dtype:
        raise AtlasError(f"{where} has type {dataset.dtype}, not {variable.dtype}")
    expected = schema.stack_dimensions(variable, kind)
    if len(dataset.shape) != len(expected) or dimensions(dataset) != list(expected):
        raise AtlasError(f"{where} has dimensions {dimensions(dataset)}, not {list(expected)}")
    for name, length in zip(expected, dataset.shape, strict=True):
        if lengths.setdefault(name, length) != length:
            raise AtlasError(f"{where} has {length} along {name}, others have {lengths[name]}")


def _read_table(group: h5py.Group, table: tuple[schema.Variable, ...]) -> dict[str, Any]:
    lengths: dict[str, int] = {}
    columns: dict[str, Any] = {}
    for variable in table:
        if variable.name not in group:
            if variable.required:
                raise AtlasError(f"{group.name} lacks {variable.name!r}")
            continue
        _check_variable(group, variable, "dense", lengths)
        values = group[variable.name][...]
        if variable.dtype == "str":
            columns[variable.name] = [read_text(value, variable.name) for value in values]
        else:
            columns[variable.name] = values
    return columns


def _read_model(group: h5py.Group) -> ModelRecord:
    values = _attributes(group, "/model")
    try:
        architectures = tuple(str(name) for name in json.loads(values["architectures"]))
    except (ValueError, TypeError, RecursionError):
        raise AtlasError("/model@architectures is not a JSON list") from None
    return ModelRecord(**(values | {"architectures": architectures}))


def _read_calibration(group: h5py.Group) -> CalibrationRecord:
    values = _attributes(group, "/calibration")
    columns = _read_table(group, schema.CALIBRATION_VARIABLES)
    fields = ("id", "source", "revision", "range", "sequences", "tokens", "producer")
    contributions = tuple(
        Contribution(row_id, source, revision, drawn, int(sequences), int(tokens), producer)
        for row_id, source, revision, drawn, sequences, tokens, producer in zip(
            *(columns[f"contribution_{name}"] for name in fields), strict=True
        )
    )
    return CalibrationRecord(
        **values,
        sequence_sha256=tuple(columns["sequence_sha256"]),
        source_of=columns["source_of"],
        split_of=columns["split_of"],
        contributions=contributions,
        token_ids=columns.get("token_ids"),
    )


def _read_blocks(group: h5py.Group, stacks: dict[str, Stack]) -> tuple[Block, ...]:
    columns = _read_table(group, schema.BLOCK_VARIABLES)
    blocks = []
    for index in range(len(columns["block"])):
        block = Block(
            index=index,
            layer_index=int(columns["layer_index"][index]),
            place=columns["place"][index],
            module=columns["module"][index],
            stack=columns["stack"][index],
            row=int(columns["row"][index]),
            n_channels=int(columns["n_channels"][index]),
            n_experts=int(columns["n_experts"][index]),
            tensors=Block.tensors_from_json(columns["tensors"][index]),
        )
        stack = stacks.get(block.stack)
        if (
            stack is None
            or not 0 <= block.row < len(stack.layers)
            or block.n_channels != stack.n_channels
            or block.n_experts != stack.n_experts
        ):
            raise AtlasError(f"the FFN table's row {index} does not match a stack")
        blocks.append(block)
    return tuple(blocks)


def _read_extension(group: h5py.Group) -> list[ExtensionGroup]:
    attributes: dict[str, str | int | float] = {}
    for name, value in group.attrs.items():
        if isinstance(value, str | bytes):
            attributes[name] = read_text(value, f"{group.name}@{name}")
        elif np.ndim(value) == 0 and np.asarray(value).dtype.kind in "iuf":
            attributes[name] = value.item()
    variables, inner = [], []
    for name in group:
        item = group[name]
        if isinstance(item, h5py.Group):
            inner += _read_extension(item)
            continue
        values = item[...]
        texts = {key: read_text(item.attrs.get(key, ""), f"{item.name}@{key}") for key in ("long_name", "units", "merge")}
        if dtype_code(item) == "str":
            values = [read_text(value, name) for value in values.ravel()]
        variables.append(ExtensionVariable(name, tuple(dimensions(item)), values, **texts))
    return [ExtensionGroup(group.name.lstrip("/"), attributes, tuple(variables)), *inner]


def _read_producer(group: h5py.Group) -> ProducerRecord:
    values = _attributes(group, "/producer")
    try:
        versions = {str(key): str(value) for key, value in json.loads(values["versions"]).items()}
        history = tuple(json.loads(line) for line in values["history"].splitlines())
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise AtlasError("/producer holds invalid JSON") from None
    return ProducerRecord(
        versions, values["command"], values["hardware"], values["seconds"], values["peak_memory_bytes"], history
    )
