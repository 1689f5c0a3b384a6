"""Write an atlas whole or not at all, and check it (spec section "Writing").

A small atlas is built in memory. A larger atlas is built in the file, one stack row after the other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from h5py import h5f, h5g, h5p

from chanfmt.base.errors import AtlasError, CheckError
from chanfmt.base.files import atomic_file, check_space, reserve, temporary_name
from chanfmt.base.version import __version__
from chanfmt.format import schema
from chanfmt.format.container import MAX_ATTRIBUTES, NUMPY, Container, read_text
from chanfmt.format.digest import SEAL, SEAL_BYTES, content_sha256, file_sha256, sealed
from chanfmt.format.reader import Atlas
from chanfmt.format.records import Stacked
from chanfmt.format.unlocked import Unlocked, open_unlocked

if TYPE_CHECKING:
    from chanfmt.format.records import AtlasContent, ExtensionGroup, SpecialTokens, StackData

IMAGE_STEP = 1 << 20
"""Bytes by which an image in memory grows."""
IN_MEMORY = 16 << 20
"""Bytes up to which an atlas is built in memory, which takes several times its size."""
MARGIN = 1 << 20
"""Bytes allowed for everything in a file besides the arrays."""


def write_atlas(content: AtlasContent, path: str | Path, *, overwrite: bool = True, must_read_back: bool = True) -> str:
    """Write ``content`` to ``path``, whole or not at all. Returns the content digest.

    Args:
        overwrite: Whether an atlas that is there by now is replaced.
        must_read_back: Whether it is an error if the system refuses to open the written file again. For a partial atlas it is
            not: it holds what was measured, and is checked when the build continues.

    Raises:
        OutputAppearedError: ``path`` exists, and ``overwrite`` is False. The atlas is kept beside it.
        CheckError: The written file does not read back as the same atlas.
        ChanfmtError: The disk is full, or the path cannot be written.
    """
    path = Path(path)
    size = _size(content)
    check_space(path.absolute().parent, size)
    image, digest = atlas_image(content) if size <= IN_MEMORY else (None, "")
    with atomic_file(path, overwrite=overwrite) as temporary:
        if image is None:
            digest = _write_file(content, temporary, size)
        else:
            temporary.write_bytes(image)
        try:
            _read_back(temporary, digest)
        except AtlasError as error:
            # Without a code, the file breaks no rule: it could not be opened.
            if error.code or must_read_back:
                raise
    return digest


def _read_back(path: Path, digest: str) -> None:
    with Atlas.open(path, verify=True) as atlas:
        if atlas.content_sha256 != digest:
            raise CheckError("the written atlas does not read back with its own digest")


def atlas_image(content: AtlasContent) -> tuple[bytes, str]:
    """The bytes of ``content`` as an atlas file, and its content digest."""
    with _new_file() as file:
        digest = _fill(file, content)
        file.flush()
        return sealed(file.id.get_file_image(), file[SEAL].id.get_offset()), digest


def _write_file(content: AtlasContent, path: Path, size: int) -> str:
    """Write ``content``, of about ``size`` bytes, into the empty file ``path``. Returns the content digest.

    On a full disk HDF5 can crash while it closes a file, so the space is reserved before HDF5 opens the file.
    """
    with _new_file() as file:
        file.flush()
        path.write_bytes(file.id.get_file_image())
    reserve(path, size)
    opened = open_unlocked(path, write=True)
    with opened.closing:
        # No flush before the close: a flush would give reserved space back that is not used yet.
        digest = _fill(opened.file, content)
        offset = opened.file[SEAL].id.get_offset()
    with path.open("r+b", buffering=0) as raw:
        os.pwrite(raw.fileno(), file_sha256(raw.fileno(), offset), offset)
    return digest


def _fill(file: h5py.File, content: AtlasContent) -> str:
    """Write ``content`` without the seal. Returns the content digest."""
    _write_root(file, content)
    _write_model(file, content)
    _write_calibration(file, content)
    _write_labels(file, content)
    _write_blocks(file, content)
    stacks = _new_group(file, "stacks")
    for stack in content.stacks:
        _write_stack(stacks, stack)
    _write_producer(file, content)
    for extension in content.extensions:
        _write_extension(file, extension)
    digest = content_sha256(Container(Unlocked(file, -1, contextlib.ExitStack()), None, sys.maxsize))
    file.attrs["content_sha256"] = digest
    return digest


def _size(content: AtlasContent) -> int:
    """Estimate how many bytes ``content`` takes in a file; the estimate is rather too high than too low."""
    arrays: list[tuple[Any, Any]] = [
        (values, NUMPY[schema.STACK_VARIABLE_BY_NAME[name].dtype])
        for stack in content.stacks
        for name, values in stack.variables.items()
    ]
    arrays += [(item.values, np.float64) for group in content.extensions for item in group.variables]
    arrays.append((content.calibration.token_ids, np.int32))
    numbers = sum(np.dtype(kind).itemsize * math.prod(np.shape(values)) for values, kind in arrays)
    texts = sum(len(block.tensors_json()) for block in content.blocks) + len(content.model.config)
    return numbers + 2 * texts + 1024 * (len(content.blocks) + content.calibration.sequences) + MARGIN


def _new_file() -> h5py.File:
    access = h5p.create(h5p.FILE_ACCESS)
    access.set_fapl_core(IMAGE_STEP, False)
    # HDF5 takes two files of one name in memory for the same file, so each thread needs a name of its own.
    name = temporary_name("atlas").encode()
    return h5py.File(h5f.create(name, h5f.ACC_TRUNC, _ordered(h5p.FILE_CREATE), access))


def _new_group(parent: h5py.Group, name: str) -> h5py.Group:
    return h5py.Group(h5g.create(parent.id, name.encode(), gcpl=_ordered(h5p.GROUP_CREATE)))


def _ordered(kind: Any) -> Any:
    """Creation properties of a group or a file that keep the order, and keep all attributes inside the header.

    By default, HDF5 puts more than eight attributes into a heap and a B-tree, which takes 13 kB more and makes opening a
    third slower.
    """
    properties = h5p.create(kind)
    # The same content gives the same bytes at any time.
    properties.set_obj_track_times(False)
    order = h5p.CRT_ORDER_TRACKED | h5p.CRT_ORDER_INDEXED
    properties.set_link_creation_order(order)
    properties.set_attr_creation_order(order)
    properties.set_attr_phase_change(MAX_ATTRIBUTES, 0)
    return properties


def _write_root(file: h5py.File, content: AtlasContent) -> None:
    file.attrs["format"] = schema.FORMAT
    file.attrs["format_version"] = schema.FORMAT_VERSION
    file.attrs["features_required"] = ""
    file.attrs["status"] = content.status
    file.attrs["dropped"] = " ".join(content.dropped)
    file.attrs["Conventions"] = schema.CONVENTIONS
    file.attrs["title"] = content.title
    file.attrs["producer"] = f"chanfmt {__version__}"
    file.attrs["created"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _write_model(file: h5py.File, content: AtlasContent) -> None:
    group = _new_group(file, "model")
    values = dataclasses.asdict(content.model) | {"architectures": json.dumps(content.model.architectures)}
    _set_attributes(group, "/model", values)


def _write_calibration(file: h5py.File, content: AtlasContent) -> None:
    record = content.calibration
    group = _new_group(file, "calibration")
    _set_attributes(
        group,
        "/calibration",
        {
            "loss": record.loss,
            "metric_definition": record.metric_definition,
            "tokenizer": record.tokenizer,
            "seq_len": record.seq_len,
            "seed": record.seed,
            "mean_loss": record.mean_loss,
            "special_tokens": _json_or_none(record.special_tokens),
            "tokenizer_special_tokens": _json_or_none(record.tokenizer_special_tokens),
        },
    )
    rows = record.contributions
    arrays: dict[str, Any] = {
        "sequence": np.arange(record.sequences),
        "sequence_sha256": list(record.sequence_sha256),
        "source_of": record.source_of,
        "split_of": record.split_of,
        "contribution": np.arange(len(rows)),
        **{
            f"contribution_{name}": [getattr(row, name) for row in rows]
            for name in ("id", "source", "revision", "range", "sequences", "tokens", "producer")
        },
    }
    if any(row.inputs for row in rows):
        arrays["contribution_inputs"] = [row.inputs for row in rows]
    if record.token_ids is not None:
        arrays["position"] = np.arange(record.seq_len)
        arrays["token_ids"] = record.token_ids
    _write_variables(group, schema.CALIBRATION_VARIABLES, arrays, "dense")


def _json_or_none(tokens: SpecialTokens | None) -> str | None:
    return None if tokens is None else tokens.to_json()


def _write_labels(file: h5py.File, content: AtlasContent) -> None:
    _set_attributes(_new_group(file, "labels"), "/labels", dataclasses.asdict(content.labels) | {"core_rho": content.core_rho})


def _write_blocks(file: h5py.File, content: AtlasContent) -> None:
    blocks = content.blocks
    arrays: dict[str, Any] = {
        name: [getattr(block, name) for block in blocks]
        for name in ("layer_index", "place", "module", "stack", "row", "n_channels", "n_experts")
    }
    arrays["block"] = np.arange(len(blocks))
    arrays["tensors"] = [block.tensors_json() for block in blocks]
    if blocks and all(block.width_field is not None for block in blocks):
        arrays["width_field"] = [block.width_field for block in blocks]
        arrays["width_factor"] = [block.width_factor for block in blocks]
    if blocks and all(block.channel_parameters for block in blocks):
        arrays["channel_parameters"] = [block.channel_parameters for block in blocks]
    _write_variables(_new_group(file, "block"), schema.BLOCK_VARIABLES, arrays, "dense")


def _write_stack(parent: h5py.Group, stack: StackData) -> None:
    group = _new_group(parent, stack.name)
    _set_attributes(
        group,
        "/stacks/*",
        {
            "kind": stack.kind,
            "gated": int(stack.gated),
            "activation": stack.activation,
        },
    )
    arrays: dict[str, Any] = {
        "layer": stack.layers,
        "channel": np.arange(stack.n_channels),
        "split": np.arange(stack.splits),
    }
    if stack.kind == "experts":
        arrays["expert"] = np.arange(stack.n_experts)
    if stack.supports:
        arrays["support"] = stack.supports
    if any("nearest" in schema.STACK_VARIABLE_BY_NAME[name].dimensions for name in stack.variables):
        arrays["nearest"] = np.arange(schema.NEAREST)
    arrays |= stack.variables
    _write_variables(group, (*schema.INDEX_VARIABLES, *schema.STACK_VARIABLES), arrays, stack.kind)
    if "label" in group:
        group["label"].attrs["flag_values"] = np.array(list(schema.LABELS), dtype="u1")
        group["label"].attrs["flag_meanings"] = " ".join(schema.LABELS.values())


def _write_producer(file: h5py.File, content: AtlasContent) -> None:
    record = content.producer
    group = _new_group(file, "producer")
    _write_variables(
        group,
        schema.PRODUCER_VARIABLES,
        {
            "byte": np.arange(SEAL_BYTES),
            "file_sha256": np.zeros(SEAL_BYTES),
        },
        "dense",
    )
    _set_attributes(
        group,
        "/producer",
        {
            "versions": json.dumps(dict(record.versions), sort_keys=True),
            "command": record.command,
            "hardware": record.hardware,
            "seconds": record.seconds,
            "peak_memory_bytes": record.peak_memory_bytes,
            "history": "\n".join(json.dumps(dict(line), sort_keys=True) for line in record.history),
        },
    )


def _write_extension(file: h5py.File, extension: ExtensionGroup) -> None:
    group = file
    for part in extension.path.split("/"):
        group = group[part] if part in group else _new_group(group, part)
    for name, value in extension.attributes.items():
        group.attrs[name] = value
    table = tuple(
        schema.Variable(item.name, _code(item.values), item.dimensions, item.long_name, item.units, item.merge)
        for item in extension.variables
    )
    _write_variables(group, table, {item.name: item.values for item in extension.variables}, "dense")
    for item in extension.variables:
        if item.merge:
            group[item.name].attrs["merge"] = item.merge


def _code(values: Any) -> str:
    array = np.asarray(values)
    code = next((code for code, name in NUMPY.items() if array.dtype == np.dtype(name)), None)
    if code is None and array.dtype.kind not in "UO":
        raise CheckError(f"an extension's array has the type {array.dtype}, which an atlas may not hold")
    return code or "str"


def _set_attributes(group: h5py.Group, table: str, values: dict[str, Any]) -> None:
    convert = {"str": str, "int": np.int64, "float": np.float64}
    for attribute in schema.ATTRIBUTES[table]:
        if attribute.required or values[attribute.name] is not None:
            group.attrs[attribute.name] = convert[attribute.type](values[attribute.name])


def _write_variables(group: h5py.Group, table: tuple[schema.Variable, ...], arrays: dict[str, Any], kind: str) -> None:
    scales = [variable for variable in table if variable.dimensions == (variable.name,)]
    for variable in [*scales, *(variable for variable in table if variable not in scales)]:
        if variable.name not in arrays:
            continue
        dataset = _create(group, variable, arrays[variable.name])
        dataset.attrs["long_name"] = variable.long_name
        if variable.units:
            dataset.attrs["units"] = variable.units
        if variable in scales:
            dataset.make_scale(variable.name)
            continue
        dimensions = schema.stack_dimensions(variable, kind)
        for axis, dimension in enumerate(dimensions):
            if dataset.shape[axis] != group[dimension].shape[0]:
                raise CheckError(f"{dataset.name}: axis {dimension} has length {dataset.shape[axis]}")
            dataset.dims[axis].attach_scale(group[dimension])


def _create(group: h5py.Group, variable: schema.Variable, values: Any) -> h5py.Dataset:
    if variable.dtype == "str":
        texts = np.array(values, dtype=object)
        for value in texts.ravel():
            read_text(value, variable.name)
        return group.create_dataset(variable.name, data=texts, dtype=h5py.string_dtype("utf-8"), track_order=True)
    if isinstance(values, Stacked):
        dataset = group.create_dataset(variable.name, values.shape, NUMPY[variable.dtype], track_order=True)
        for number, row in enumerate(values):
            dataset[(*[slice(None)] * values.axis, number)] = _checked(group, variable, row)
        return dataset
    return group.create_dataset(variable.name, data=_checked(group, variable, values), track_order=True)


def _checked(group: h5py.Group, variable: schema.Variable, values: Any) -> np.ndarray:
    """``values`` in the type of ``variable``. Raises `CheckError` if one is infinite."""
    array: np.ndarray = np.asarray(values, dtype=NUMPY[variable.dtype], order="C")
    if array.dtype.kind == "f" and np.isinf(array).any():
        raise CheckError(f"{group.name}/{variable.name} would hold an infinite value")
    return array
