"""Read an importance atlas: numpy and h5py only."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chanfmt.base.errors import AtlasError, UsageError
from chanfmt.format import schema
from chanfmt.format.columns import ARRAY_BY_NAME, DRIVER, heading_of
from chanfmt.format.container import NUMPY, open_container, read_text
from chanfmt.format.digest import SEAL, SEAL_BYTES, content_sha256, file_sha256
from chanfmt.format.read_errors import COPY_AGAIN, read_error
from chanfmt.format.records import (
    AtlasContent,
    Block,
    CalibrationRecord,
    Contribution,
    ExtensionGroup,
    ExtensionVariable,
    LabelSettings,
    ModelRecord,
    ProducerRecord,
    SpecialTokens,
    StackData,
    StoredSlices,
    widths_complaint,
)
from chanfmt.format.sandbox import Crashed, run_contained
from chanfmt.format.show import atlas_text, ffns_text, short, table
from chanfmt.format.texts import object_lines, parsed
from chanfmt.format.unit import units_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence, Set
    from types import TracebackType

    from chanfmt.format.container import Container
    from chanfmt.format.unit import Unit

TRIAL_SECONDS = 10
"""Seconds of processor time in which the structure of any file can be read."""
READ_WHOLE_BYTES = 32 << 20
"""Bytes up to which an array is read at once, because each read costs more time than a megabyte of contiguous data."""

MOST_STACKS = 20
"""Stacks that the HTML table of an atlas lists."""


class Location(NamedTuple):
    """Where an array lies in its file: contiguous, from the byte ``offset``."""

    offset: int
    dtype: np.dtype
    shape: tuple[int, ...]


class Stack:
    """FFNs of one kind, place and width. The arrays are read on demand and kept.

    Attributes:
        name: ``decoder``, ``encoder``, ...
        kind: ``dense``, ``experts`` or ``shared``.
        gated: Whether the FFNs have a gate projection.
        activation: Activation function named by the model's config.
        layers: Layer index of every row, int32 (layer,).
        n_channels, n_experts, splits: Lengths of the other dimensions (0 experts in a stack of dense FFNs).
        supports: Write support sizes that ``connectivity_at`` holds.
    """

    def __init__(self, container: Container, name: str, *, needed: Set[str]) -> None:
        self._container = container
        self._path = f"stacks/{name}"
        self._held = frozenset(container.children(self._path))
        self._cache: dict[str, np.ndarray] = {}
        self.name = name
        where = "/" + self._path
        self.kind: str = _attribute(container, self._path, "kind", str)
        if self.kind not in schema.STACK_KINDS:
            raise AtlasError(f"{where} has the unknown kind {self.kind!r}")
        self.gated = bool(_attribute(container, self._path, "gated", int))
        self.activation: str = _attribute(container, self._path, "activation", str)
        lengths: dict[str, int] = {}
        for variable in schema.INDEX_VARIABLES:
            if variable.name in self._held:
                _check_variable(container, self._path, variable, self.kind, lengths)
        for name in ("layer", "channel", "split", *(("expert",) if self.kind == "experts" else ())):
            if name not in lengths:
                raise AtlasError(f"{where} lacks the dimension {name!r}")
        for variable in schema.STACK_VARIABLES:
            if variable.name in self._held:
                _check_variable(container, self._path, variable, self.kind, lengths)
            elif variable.name in needed and (self.gated or not variable.gated_only):
                raise AtlasError(f"{where} lacks {variable.name!r}")
        self.layers: np.ndarray = container.read(f"{self._path}/layer")
        self.n_channels = lengths["channel"]
        self.n_experts = lengths.get("expert", 0)
        self.splits = lengths["split"]
        self.supports: tuple[int, ...] = tuple(container.read(f"{self._path}/support").tolist()) if "support" in lengths else ()

    def __repr__(self) -> str:
        shape = (self.n_experts, self.n_channels) if self.n_experts else (self.n_channels,)
        return f"<Stack {short(self.name)!r}: {self.kind}, {ffns_text([shape] * len(self.layers))}>"

    def __contains__(self, name: str) -> bool:
        return name in self._held or name in self._extension_places or name in self._driving_places

    def __getitem__(self, name: str) -> np.ndarray:
        """The array ``name``, dimensions per `chanfmt.format.schema`. Raises `AtlasError` if the stack does not hold it."""
        if name not in self._cache:
            self._cache[name] = self._container.read(self._place(name))
        return self._cache[name]

    def row(self, name: str, row: int) -> np.ndarray:
        """One layer's values of ``name``. All rows of a small array are read at once and kept."""
        if name in self._cache or self._container.nodes[self._place(name)].nbytes <= READ_WHOLE_BYTES:
            return self[name][row]
        return self._container.rows(self._place(name), row, row + 1)[0]

    def location(self, name: str) -> Location:
        """Where the array ``name`` lies in the file. Raises `AtlasError` if the stack does not hold it."""
        node = self._container.nodes[self._place(name)]
        return Location(node.offset, np.dtype(NUMPY[node.code]), node.shape)

    @property
    def extension_metrics(self) -> list[schema.Variable]:
        """Numbers per channel that other programs added, each named ``x_owner/name`` (spec section "Extensions")."""
        found = []
        for name, path in self._extension_places.items():
            long_name, units, merge = (_text_or_empty(self._container, path, key) for key in ("long_name", "units", "merge"))
            found.append(
                schema.Variable(
                    name,
                    self._container.nodes[path].code,
                    ("layer", "channel"),
                    long_name,
                    units,
                    merge,
                    required=False,
                    heading=heading_of(name),
                )
            )
        return found

    @property
    def extension_names(self) -> list[str]:
        """Names of `extension_metrics`."""
        return list(self._extension_places)

    @property
    def all_metrics(self) -> list[schema.Variable]:
        """The metrics this stack holds in the schema's order, and then the metrics of other programs."""
        return [*(schema.METRIC_BY_NAME[name] for name in self.metrics), *self.extension_metrics]

    @functools.cached_property
    def _extension_places(self) -> dict[str, str]:
        dimensions = ("layer", "expert", "channel") if self.kind == "experts" else ("layer", "channel")
        lengths = {"layer": len(self.layers), "expert": self.n_experts, "channel": self.n_channels}
        places = {}
        for owner in self._container.children(""):
            if not owner.startswith(schema.EXTENSION_PREFIX) or owner == schema.RESUME_EXTENSION:
                continue
            group = f"{owner}/{self.name}"
            for name in self._container.children(group):
                path = f"{group}/{name}"
                node = self._container.nodes[path]
                fits = node.code not in ("", "str") and node.shape == tuple(lengths[item] for item in dimensions)
                if fits and self._container.dimensions(path) == dimensions:
                    places[f"{owner}/{name}"] = path
        return places

    @functools.cached_property
    def _driving_places(self) -> dict[str, str]:
        """Where the arrays of `chanfmt.format.columns.DRIVING_ARRAYS` are, if the stack has all of them."""
        experts = (self.n_experts,) if self.kind == "experts" else ()
        dimensions = ("layer", *(("expert",) if experts else ()), "channel", DRIVER)
        places, shapes = {}, set()
        for name, array in ARRAY_BY_NAME.items():
            owner, _, own = name.partition("/")
            path = f"{owner}/{self.name}/{own}"
            node = self._container.nodes[path] if path in self._container else None
            if node is None or node.code != array.dtype or self._container.dimensions(path) != dimensions:
                return {}
            places[name] = path
            shapes.add(node.shape)
        fits = len(shapes) == 1 and shapes.pop()[:-1] == (len(self.layers), *experts, self.n_channels)
        return places if fits else {}

    @property
    def variables(self) -> list[str]:
        """Names of the arrays this stack holds, in the schema's order."""
        return [variable.name for variable in schema.STACK_VARIABLES if variable.name in self._held]

    @property
    def metrics(self) -> list[str]:
        """Names of the per-channel metrics this stack holds, in the schema's order."""
        return [metric.name for metric in schema.METRICS if metric.name in self._held]

    def to_xarray(self) -> Any:
        """Everything this stack holds as an `xarray.Dataset` with named dimensions, coordinates, long names and units.

        Extension metrics are among the variables. The dataset shares the stack's arrays; it holds no copies.

        Raises:
            MissingPackageError: xarray is not installed (extra ``notebook``).
        """
        from chanfmt.format.frames import stack_dataset

        return stack_dataset(self)

    def data(self) -> StackData:
        """Everything this stack holds, in memory."""
        return StackData(
            self.name,
            self.kind,
            self.gated,
            self.activation,
            self.layers,
            self.n_channels,
            self.n_experts,
            self.splits,
            {name: self[name] for name in self.variables},
            self.supports,
        )

    def _place(self, name: str) -> str:
        if name in self._extension_places:
            return self._extension_places[name]
        if name in self._driving_places:
            return self._driving_places[name]
        if name not in self._held:
            raise AtlasError(f"the atlas holds no {name!r} for {self.name}", hint=self._way_to(name))
        return f"{self._path}/{name}"

    def _way_to(self, name: str) -> str:
        """How to get an atlas that holds the variable ``name``, which this stack does not hold."""
        variable = schema.STACK_VARIABLE_BY_NAME.get(name)
        if variable is None:
            return f"metrics that it holds: {', '.join(metric.name for metric in self.all_metrics)}"
        if (variable.units.startswith("nats") or variable.additive) and "lp" not in self and "activation_power" in self:
            return "the atlas holds activations and norms alone (methods: activation, wanda, magnitude); atlas build measures all"
        if variable.additive:
            return "use the atlas as it was built, before atlas strip"
        if variable.rests_on and schema.CORRELATIONS not in variable.rests_on:
            return "compute it from the weights: atlas label FILE --model MODEL -o NEW"
        if variable.merge == "drop":
            return "only a build measures it, and a merge drops it: use the atlas of one build, on one text or on several"
        return "build it again with this chanfmt"


class Atlas:
    """An open importance atlas. Use as a context manager, or call `close`.

    Attributes:
        path: The file, as it was named.
        file: Its absolute path, which still names it after the working directory has changed.
        hub_source: Address of the file's commit on the Hub, if the atlas was opened by its Hub address; empty otherwise.
        status: ``complete`` or ``partial``.
        dropped: Variables left out because they could not be merged or recomputed.
        core_rho: Share of channels in the core that connectivity and redundancy refer to.
        model, calibration, labels, producer: Records of what the file says. Calibration and producer are read at their
            first use, which may raise `AtlasError`.
        blocks: One `Block` per FFN, in model order.
        stacks: Name to `Stack`.
        content_sha256: Digest that the file states (only `verify` checks it).
    """

    def __init__(self, container: Container, path: Path) -> None:
        self._container = container
        self.path = path
        self.file = path.absolute()
        self.hub_source = ""
        root = _attributes(container, "", "/")
        self.format_version: str = root["format_version"]
        self.status: str = root["status"]
        if self.status not in schema.STATUSES:
            raise AtlasError(f"the status {self.status!r} is not one of {', '.join(schema.STATUSES)}")
        self.dropped: tuple[str, ...] = tuple(root["dropped"].split())
        self.title: str = root["title"]
        self.producer_name: str = root["producer"]
        self.created: str = root["created"]
        self.content_sha256: str = root["content_sha256"]
        self.model = _read_model(container)
        settings = _attributes(container, "labels", "/labels")
        self.core_rho: float = settings.pop("core_rho")
        self.labels = LabelSettings(**settings)
        try:
            self.labels.check()
        except UsageError as error:
            raise AtlasError(f"/labels: {error.message.removeprefix('--')}") from None
        _need_group(container, "stacks")
        needed = frozenset(
            variable.name
            for variable in schema.STACK_VARIABLES
            if self.status == "complete" and variable.required and variable.name not in self.dropped
        )
        self.stacks: dict[str, Stack] = {name: Stack(container, name, needed=needed) for name in container.children("stacks")}
        self.blocks = _read_blocks(container, self.stacks)

    def __repr__(self) -> str:
        about = atlas_text(self.model.id, (block.shape for block in self.blocks), self.status)
        return f"<Atlas {short(self.path.name)!r}: {about}>"

    def _repr_html_(self) -> str:
        model, labels = self.model, self.labels
        revision = f" at {short(model.revision, 12)}" if model.revision else ""
        try:
            sources = ", ".join(dict.fromkeys(row.source for row in self.calibration.contributions))
            text = f"{self.calibration.sequences:,} x {self.calibration.seq_len:,} tokens of {short(sources)}"
        except AtlasError as error:
            text = f"cannot be read: {short(error.message)}"
        shown = list(self.stacks.values())[:MOST_STACKS]
        return table(
            f"Importance atlas {short(self.path.name)}" + ("" if self.status == "complete" else " (partial)"),
            [
                ("model", f"{short(model.id)}{revision} ({short(model.model_type)}, {model.parameters:,} parameters)"),
                ("calibration", text),
                ("labels", f"rho {labels.rho:g}, eta {labels.eta:g}, support {labels.support_size}"),
                ("FFNs", ffns_text(block.shape for block in self.blocks)),
                *((f"stack {short(stack.name)}", _stack_summary(stack)) for stack in shown),
                *([("other stacks", f"{len(self.stacks) - len(shown):,}")] if len(self.stacks) > len(shown) else []),
            ],
        )

    @functools.cached_property
    def calibration(self) -> CalibrationRecord:
        return _read_calibration(self._container)

    @functools.cached_property
    def producer(self) -> ProducerRecord:
        return _read_producer(self._container)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False, contained: bool = False) -> Atlas:
        """Open ``path`` for reading.

        Args:
            path: The file. `chanfmt.open` takes an address on the Hub, too.
            verify: Whether to recompute the digests (0.1 s per 40 MB).
            contained: Whether to read structure and tables in a separate process first, and to recompute the digests there,
                so that a file on which the HDF5 library crashes or hangs gives an error like any other. Use it for
                untrusted files.

        Raises:
            AtlasError: The file is missing, not an atlas, of a newer major version, damaged or unsafe.
        """
        path = Path(path)
        verified = _try_contained(path, verify=verify) if contained else None
        container = open_container(path)
        try:
            atlas = cls(container, path)
            if verify and verified != _identity(container.descriptor):
                atlas.verify()
        except AtlasError as error:
            container.close()
            if str(path) in error.message:
                raise
            raise type(error)(f"{path}: {error.message}", hint=error.hint, code=error.code, where=error.where) from None
        except (OSError, RuntimeError, KeyError, ValueError, TypeError, RecursionError) as error:
            container.close()
            raise read_error(error, str(path)) from None
        return atlas

    def verify(self) -> None:
        """Recompute both digests. Raises `AtlasError` if one differs from the digest that the file states."""
        hint = COPY_AGAIN
        if content_sha256(self._container) != self.content_sha256:
            raise AtlasError(
                f"{self.path} does not match its content_sha256: its data changed after it was written",
                hint=hint,
                code="E401",
                where="/@content_sha256",
            )
        if SEAL in self._container:
            seal = self._container.nodes[SEAL]
            stated = self._container.read(SEAL).tobytes()
            if seal.nbytes != SEAL_BYTES or file_sha256(self._container.descriptor, seal.offset) != stated:
                raise AtlasError(
                    f"{self.path} does not match its file_sha256: its bytes changed after it was written",
                    hint=hint,
                    code="E402",
                    where="/" + SEAL,
                )

    def content(self) -> AtlasContent:
        """The whole atlas in memory."""
        return AtlasContent(
            self.title,
            self.model,
            self.calibration,
            self.labels,
            self.core_rho,
            self.blocks,
            tuple(stack.data() for stack in self.stacks.values()),
            self.producer,
            self.status,
            self.dropped,
            self.extensions(),
        )

    def identity(self) -> dict[str, Any]:
        """Format, producer and model as JSON-ready data, without the model's config."""
        model = dataclasses.asdict(self.model)
        del model["config"]
        return {
            "format": schema.FORMAT,
            "format_version": self.format_version,
            "status": self.status,
            "producer": self.producer_name,
            "created": self.created,
            "content_sha256": self.content_sha256,
            "model": model,
        }

    def extension(self, path: str) -> ExtensionGroup | None:
        """The extension group ``path`` with its values, without the groups in it; None if there is no such group."""
        return _read_extension(self._container, path)[0] if self._container.is_group(path) else None

    def extensions(self) -> tuple[ExtensionGroup, ...]:
        """Groups that other programs added, with their values (spec section "Extensions")."""
        groups: list[ExtensionGroup] = []
        for name in self._container.children(""):
            if name.startswith(schema.EXTENSION_PREFIX) and self._container.is_group(name):
                groups += _read_extension(self._container, name)
        return tuple(groups)

    def extension_attributes(self, path: str) -> dict[str, str | int | float]:
        """Attributes of the extension group ``path``, without its values; empty if there is no such group."""
        return _extension_attributes(self._container, path) if self._container.is_group(path) else {}

    def block(self, layer: int, stack: str | None = None) -> Block:
        """The FFN of model layer ``layer``. If the layer has several FFNs, ``stack`` says which one.

        Raises:
            AtlasError: There is no such FFN, or there are several and ``stack`` is not given.
        """
        if stack is not None and stack not in self.stacks:
            raise AtlasError(f"there is no stack {stack!r}", hint=f"stacks: {', '.join(self.stacks)}")
        found = [block for block in self.blocks if block.layer_index == layer and stack in (None, block.stack)]
        if not found:
            layers = sorted({block.layer_index for block in self.blocks})
            raise AtlasError(f"there is no layer {layer}", hint=f"layers: {layers[0]} to {layers[-1]}")
        if len(found) > 1:
            names = ", ".join(block.stack for block in found)
            raise AtlasError(f"layer {layer} has several FFNs", hint=f"add --stack, one of: {names}")
        return found[0]

    def rows(self) -> Iterator[tuple[Block, Stack]]:
        """Every FFN and the stack that holds its arrays, in model order."""
        for block in self.blocks:
            yield block, self.stacks[block.stack]

    def units(self, block: Block | None = None) -> Iterator[Unit]:
        """Every dense FFN and every expert in model order, or those of ``block``."""
        for one in self.blocks if block is None else (block,):
            yield from units_of(one, self.stacks[one.stack])

    def to_pandas(self, metrics: Sequence[str] | None = None) -> Any:
        """A `pandas.DataFrame` with a row per channel of every FFN and expert, in model order.

        Columns: block, layer, stack, expert (if the atlas holds experts; -1 in dense FFNs), channel, label, and the metrics.
        A metric is NaN in FFNs whose stack does not hold it.

        Args:
            metrics: Names of metrics; None for all that the atlas holds, including the metrics of other programs.

        Raises:
            AtlasError: The atlas does not hold one of the metrics.
            MissingPackageError: pandas is not installed (extra ``notebook``).
        """
        from chanfmt.format.frames import channel_frame

        return channel_frame(self, metrics)

    def close(self) -> None:
        """Close the file; arrays already read stay readable."""
        self._container.close()

    def __enter__(self) -> Atlas:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _stack_summary(stack: Stack) -> str:
    """Layers, shape and metrics of ``stack``, in one line."""
    low, high = int(stack.layers.min()), int(stack.layers.max())
    layers = f"layer {low}" if low == high else f"layers {low} to {high}"
    shape = (stack.n_experts, stack.n_channels) if stack.n_experts else (stack.n_channels,)
    return f"{layers}: {ffns_text([shape] * len(stack.layers))}, {len(stack.metrics)} metrics"


def _try_contained(path: Path, *, verify: bool) -> str:
    """Raise `AtlasError` if reading ``path`` crashes. Other faults of the file show when it is opened.

    Returns:
        The `_identity` of the file if its digests were recomputed and are right; otherwise an empty text.
    """

    def work() -> str:
        with contextlib.suppress(AtlasError), Atlas.open(path, verify=verify) as atlas:
            _ = atlas.calibration, atlas.producer
            return _identity(atlas._container.descriptor) if verify else ""
        return ""

    size = 0
    with contextlib.suppress(OSError):
        size = path.stat().st_size
    try:
        return run_contained(work, size=size, cpu_seconds=TRIAL_SECONDS)
    except Crashed as crash:
        raise AtlasError(f"{path} cannot be read: {crash}", hint=COPY_AGAIN, code="E017") from None


def _identity(descriptor: int) -> str:
    """A text that differs after an open file was written to, or replaced by another file."""
    status = os.fstat(descriptor)
    return f"{status.st_dev} {status.st_ino} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}"


def _need_group(container: Container, path: str) -> None:
    if not container.is_group(path):
        raise AtlasError(f"the group {path!r} is missing", code="E101", where=f"/{path}")


def _attribute(container: Container, path: str, name: str, kind: type) -> Any:
    value = container.attribute(path, name)
    where = f"/{path}@{name}"
    if value is None:
        raise AtlasError(f"/{path} lacks the attribute {name!r}", code="E103", where=where)
    if kind is str:
        return read_text(value, where)
    if np.ndim(value) != 0 or np.asarray(value).dtype.kind not in ("iu" if kind is int else "iuf"):
        raise AtlasError(f"{where} is not a number", code="E104", where=where)
    return kind(value)


def _text_or_empty(container: Container, path: str, name: str) -> str:
    value = container.attribute(path, name)
    return "" if value is None else read_text(value, f"/{path}@{name}")


def _attributes(container: Container, path: str, table: str) -> dict[str, Any]:
    if path:
        _need_group(container, path)
    kinds = {"str": str, "int": int, "float": float}
    return {
        attribute.name: _attribute(container, path, attribute.name, kinds[attribute.type])
        for attribute in schema.ATTRIBUTES[table]
        if attribute.required or container.attribute(path, attribute.name) is not None
    }


def _check_variable(container: Container, group: str, variable: schema.Variable, kind: str, lengths: dict[str, int]) -> None:
    path = f"{group}/{variable.name}"
    node = container.nodes[path]
    if node.code != variable.dtype:
        raise AtlasError(f"/{path} has type {node.code or 'group'}, not {variable.dtype}", code="E105", where=f"/{path}")
    expected = schema.stack_dimensions(variable, kind)
    found = container.dimensions(path)
    if found != expected:
        raise AtlasError(f"/{path} has dimensions {list(found)}, not {list(expected)}", code="E106", where=f"/{path}")
    for name, length in zip(expected, node.shape, strict=True):
        if lengths.setdefault(name, length) != length:
            raise AtlasError(
                f"/{path} has {length} along {name}, but other arrays have {lengths[name]}", code="E107", where=f"/{path}"
            )


def _read_table(container: Container, group: str, table: tuple[schema.Variable, ...]) -> dict[str, Any]:
    _need_group(container, group)
    lengths: dict[str, int] = {}
    columns: dict[str, Any] = {}
    for variable in table:
        path = f"{group}/{variable.name}"
        if path not in container:
            if variable.required:
                raise AtlasError(f"/{group} lacks {variable.name!r}", code="E102", where=f"/{path}")
            continue
        _check_variable(container, group, variable, "dense", lengths)
        values = container.read(path)
        columns[variable.name] = values.tolist() if variable.dtype == "str" else values
    return columns


def _read_model(container: Container) -> ModelRecord:
    values = _attributes(container, "model", "/model")
    architectures = parsed(values["architectures"], tuple[str, ...], "/model@architectures")
    return ModelRecord(**(values | {"architectures": architectures}))


def _read_calibration(container: Container) -> CalibrationRecord:
    values = _attributes(container, "calibration", "/calibration")
    for name in ("special_tokens", "tokenizer_special_tokens"):
        if name in values:
            values[name] = SpecialTokens.from_json(values[name], f"/calibration@{name}")
    columns = _read_table(container, "calibration", schema.CALIBRATION_VARIABLES)
    fields = ("id", "source", "revision", "range", "sequences", "tokens", "producer")
    inputs = columns.get("contribution_inputs", [""] * len(columns["contribution"]))
    contributions = tuple(
        Contribution(row_id, source, revision, drawn, int(sequences), int(tokens), producer, of_file)
        for row_id, source, revision, drawn, sequences, tokens, producer, of_file in zip(
            *(columns[f"contribution_{name}"] for name in fields), inputs, strict=True
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


def _read_blocks(container: Container, stacks: dict[str, Stack]) -> tuple[Block, ...]:
    columns = _read_table(container, "block", schema.BLOCK_VARIABLES)
    fields, factors = columns.get("width_field"), columns.get("width_factor")
    parameters = columns.get("channel_parameters")
    complaint = widths_complaint(columns["n_channels"], fields, factors, parameters)
    if complaint:
        raise AtlasError(f"the FFN table's {complaint}", code="E214", where="/block")
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
            tensors=StoredSlices(columns["tensors"][index]),
            width_field=None if fields is None else fields[index],
            width_factor=0 if factors is None else int(factors[index]),
            channel_parameters=0 if parameters is None else int(parameters[index]),
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


def _extension_attributes(container: Container, path: str) -> dict[str, str | int | float]:
    attributes: dict[str, str | int | float] = {}
    for name in container.attributes(path):
        value = container.attribute(path, name)
        if not isinstance(value, str) and np.ndim(value) != 0:
            raise AtlasError(f"/{path}@{name} is not a single text or number", code="E018", where=f"/{path}@{name}")
        attributes[name] = value if isinstance(value, str) else value.item()
    return attributes


def _read_extension(container: Container, path: str) -> list[ExtensionGroup]:
    variables, inner = [], []
    for name in container.children(path):
        place = f"{path}/{name}"
        if container.is_group(place):
            inner += _read_extension(container, place)
            continue
        values = container.read(place)
        texts = {key: _text_or_empty(container, place, key) for key in ("long_name", "units", "merge")}
        plain = values.tolist() if values.dtype.kind == "O" and values.ndim == 1 else values
        variables.append(ExtensionVariable(name, container.dimensions(place), plain, **texts))
    return [ExtensionGroup(path, _extension_attributes(container, path), tuple(variables)), *inner]


def _read_producer(container: Container) -> ProducerRecord:
    values = _attributes(container, "producer", "/producer")
    versions = parsed(values["versions"], dict[str, str], "/producer@versions")
    history = object_lines(values["history"], "/producer@history")
    return ProducerRecord(
        versions, values["command"], values["hardware"], values["seconds"], values["peak_memory_bytes"], history
    )
