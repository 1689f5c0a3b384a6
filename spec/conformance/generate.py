"""Write the conformance files: valid/ and invalid/ atlases, and expected.json with the verdict on each.

    python spec/conformance/generate.py [DIRECTORY]   default: next to this script

Valid files come from chanfmt's writer. Invalid ones are edited with h5py and then sealed again with the
digests of ../reader.py, so that each has one defect. The bytes do not depend on when they are written.

Files that break the container (level 0) are stubs: a validator ends there, so the rest need not be there.
No file shows E017 (a crash of the HDF5 library), nor a text above 16 MiB or 20,000 objects (too large to keep).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from pathlib import Path

import h5py
import numpy as np
from h5py import h5a, h5d, h5f, h5g, h5p, h5s, h5t

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import contents  # noqa: E402
import reader  # noqa: E402
from contents import content  # noqa: E402

from chanfmt.algebra.columns import shape_of, with_columns  # noqa: E402
from chanfmt.format import columns, schema  # noqa: E402
from chanfmt.format.records import ExtensionGroup, ExtensionVariable, SpecialTokens  # noqa: E402
from chanfmt.format.writer import atlas_image  # noqa: E402

TEXT = h5py.string_dtype("utf-8")
STACK, DATA = "/stacks/decoder", "/x_demo/values"
EXPERTS = "/stacks/decoder.experts"
FIXED = {"created": "2026-01-01T00:00:00+00:00", "producer": "generate.py"}
_IMAGES: dict[tuple[int, bool], bytes] = {}
DROPPABLE = tuple(
    item.name
    for item in schema.STACK_VARIABLES
    if item.required and item.name not in ("tokens", "tokens_split", "label", "protection")
)
ARRAYS = '{"labels": ["i8", []], "pixel_values": ["f4", [3, 8, 8]]}'
BERTS = (SpecialTokens((101,), (102,)),) * 2
OPTIONAL = tuple(item.name for item in schema.STACK_VARIABLES if not item.required)


# --- Building and sealing --------------------------------------------------------------------------------------


def reseal(path: Path, content_too: bool = True) -> None:
    """Write the digests of the file's present content into the file."""
    with h5py.File(path) as file:
        old, new = file.attrs.get("content_sha256"), None
        if content_too and old:
            new = reader.content_sha256(reader.Atlas(reader.walk(file, path.stat().st_size)))
        offset = file[reader.FILE_DIGEST].id.get_offset() if reader.FILE_DIGEST in file else None
    if new:
        exchange(path, old, new)
    if offset is not None:
        patch(path, offset, reader.file_sha256(path, offset))


def exchange(path: Path, old: str, new: str) -> None:
    """Replace a text by a text of the same length, in place. With h5py the old text would stay in the file, unused."""
    image = path.read_bytes()
    if image.count(old.encode()) != 1 or len(old) != len(new):
        raise RuntimeError(f"{path.name}: cannot exchange {old!r}")
    path.write_bytes(image.replace(old.encode(), new.encode()))


def patch(path: Path, offset: int, data: bytes) -> None:
    with open(path, "r+b") as raw:
        raw.seek(offset)
        raw.write(data)


def slimmed(path: Path) -> None:
    """Store the file's attributes in its object headers, and so in two thirds of the bytes."""
    access = h5p.create(h5p.FILE_ACCESS)
    access.set_fapl_core(backing_store=False)

    def compact_attributes(kind: object) -> h5p.PropCreateID:
        plist = h5p.create(kind)
        plist.set_attr_phase_change(reader.MAX_ATTRIBUTES, 0)
        plist.set_obj_track_times(False)
        return plist

    with h5py.File(path) as old:
        nodes = reader.walk(old, path.stat().st_size)
        nodes["/"].attributes |= FIXED
        nodes["/"].attributes["content_sha256"] = reader.content_sha256(reader.Atlas(nodes))
        new = h5py.File(h5f.create(b"slim", h5f.ACC_TRUNC, compact_attributes(h5p.FILE_CREATE), access))
        # Groups first, then scales, then what they are attached to.
        for node in sorted(nodes.values(), key=lambda node: (node.type != "group", node.dimensions != [node.path])):
            if node.type == "group":
                gcpl = compact_attributes(h5p.GROUP_CREATE)
                item = new if node.path == "/" else h5py.Group(h5g.create(new.id, node.path.encode(), gcpl=gcpl))
            else:
                values = np.zeros(32, "u1") if node.path == reader.FILE_DIGEST else node.values()
                item = new.create_dataset(node.path, data=values, dtype=TEXT if node.type == "str" else values.dtype)
                if node.dimensions == [node.path]:
                    item.make_scale(node.path.rpartition("/")[2])
                else:
                    for axis, scale in enumerate(node.dimensions):
                        item.dims[axis].attach_scale(new[scale])
            for name, value in node.attributes.items():
                item.attrs[name] = value
    new.flush()
    image = new.id.get_file_image()
    new.close()
    path.write_bytes(image)


def write(path: Path, atlas: object, edit: object = None, after: object = None, slim: bool = True) -> None:
    """``edit`` changes the open file before it is sealed, ``after`` the closed one afterwards."""
    # Many files start from the same atlas.
    image = _IMAGES.get((id(atlas), slim))
    path.write_bytes(image or atlas_image(atlas)[0])
    if image is None:
        with h5py.File(path) as file:
            created = file.attrs["created"]
        exchange(path, created, FIXED["created"])
        if slim:
            slimmed(path)
        _IMAGES[id(atlas), slim] = path.read_bytes()
    if edit:
        with h5py.File(path, "r+") as file:
            edit(file)
    reseal(path)
    if after:
        after(path)


def only(*names: str, kinds: tuple = (contents.Kind(layers=(0,)),), **options: object) -> object:
    """A small atlas with few variables: of those that may be dropped or are optional, it holds only ``lp`` and ``names``."""
    keep = {"lp", *names}
    gates = () if any(kind.gated for kind in kinds) else ("gate_norm",)
    return content(
        *kinds,
        dropped=tuple(name for name in DROPPABLE if name not in (*keep, *gates)),
        without=tuple(name for name in OPTIONAL if name not in keep),
        **options,
    )


def stub(path: Path, edit: object = None, after: object = None, **options: object) -> None:
    """A file with an atlas's root attributes and one array."""
    with h5py.File(path, "w", **options) as file:
        for name, value in (("format", schema.FORMAT), ("format_version", "1.0"), ("features_required", "")):
            file.attrs[name] = value
        group = file.create_group("x_demo")
        group.create_dataset("item", data=np.arange(4, dtype="<i4")).make_scale("item")
        create(group, "values", data=np.arange(4, dtype="<f4"))
        group["item"].attrs["long_name"], group["item"].attrs["units"] = "item index", "1"
        if edit:
            edit(file)
    if after:
        after(path)


def create(group: h5py.Group, name: str, **how: object) -> h5py.Dataset:
    """An extension's array."""
    dataset = group.create_dataset(name, **how)
    dataset.attrs["long_name"], dataset.attrs["units"], dataset.attrs["merge"] = "values", "1", "sum"
    dataset.dims[0].attach_scale(group["item"]) if dataset.shape else None
    return dataset


def linked(atlas: object) -> object:
    """``atlas`` with what sets the widths: one field for all experts, routed and shared, and one for the dense FFNs."""
    blocks = []
    for block in atlas.blocks:
        field, factor = {
            "dense": ("intermediate_size", 1),
            "experts": ("moe_intermediate_size", 2),
            "shared": ("moe_intermediate_size", 3),
        }[next(stack.kind for stack in atlas.stacks if stack.name == block.stack)]
        blocks.append(dataclasses.replace(block, width_field=field, width_factor=factor, channel_parameters=24))
    return dataclasses.replace(atlas, blocks=tuple(blocks))


# --- Edits -----------------------------------------------------------------------------------------------------


def put(path: str, index: object, value: object):
    """Set values of a dataset, or of texts; ``value`` may be a function of the old ones."""

    def edit(file: h5py.File) -> None:
        values = file[path].asstr()[...] if file[path].dtype.kind == "O" else file[path][...]
        values[index] = value(values[index]) if callable(value) else value
        file[path][...] = values

    return edit


def attribute(path: str, name: str, value: object):
    def edit(file: h5py.File) -> None:
        del file[path].attrs[name]
        if value is not None:
            file[path].attrs[name] = value

    return edit


def new_attribute(path: str, name: str, value: object, **how: object):
    return lambda file: file[path].attrs.create(name, value, **how)


def remove(*paths: str):
    def edit(file: h5py.File) -> None:
        for path in paths:
            del file[path]

    return edit


def both(*edits: object):
    def edit(file: h5py.File) -> None:
        for one in edits:
            one(file)

    return edit


def remake(path: str, scales: tuple[str, ...] | None = None, change: object = lambda values: values, **how: object):
    """Store a dataset anew, changed, of another type, or with other scales (names, None for none)."""

    def edit(file: h5py.File) -> None:
        old, group = file[path], file[path].parent
        kept = {name: old.attrs[name] for name in ("long_name", "units", "flag_values", "flag_meanings") if name in old.attrs}
        names = [dimension[0].name for dimension in old.dims] if scales is None else scales
        values = change(old[...])
        del file[path]
        new = file.create_dataset(path, data=values, **how)
        for name, value in kept.items():
            new.attrs[name] = value
        for axis, name in enumerate(names):
            if name:
                new.dims[axis].attach_scale(group[name])

    return edit


def replaced(make: object):
    """Replace the stub's dataset by another."""

    def edit(file: h5py.File) -> None:
        del file[DATA]
        make(file)

    return edit


def typed(dtype: object, data: object = None):
    return replaced(lambda file: create(file["x_demo"], "values", data=np.zeros(4, dtype) if data is None else data, dtype=dtype))


def ascii_texts(file: h5py.File) -> None:
    create(file["x_demo"], "values", data=["a"] * 4, dtype=h5py.string_dtype("ascii"))


def low_level(file: h5py.File, space: h5s.SpaceID, layout: int) -> None:
    plist = h5p.create(h5p.DATASET_CREATE)
    plist.set_layout(layout)
    plist.set_obj_track_times(False)
    h5d.create(file["x_demo"].id, b"values", h5t.IEEE_F32LE, space, plist)


def null_space(file: h5py.File) -> None:
    low_level(file, h5s.create(h5s.NULL), h5d.CONTIGUOUS)


def compact(file: h5py.File) -> None:
    low_level(file, h5s.create_simple((4,)), h5d.COMPACT)


def virtual(file: h5py.File) -> None:
    plist = h5p.create(h5p.DATASET_CREATE)
    plist.set_virtual(h5s.create_simple((4,)), b"other.h5", b"values", h5s.create_simple((4,)))
    plist.set_obj_track_times(False)
    h5d.create(file["x_demo"].id, b"values", h5t.IEEE_F32LE, h5s.create_simple((4,)), plist)


def many_attributes(file: h5py.File) -> None:
    for index in range(65):
        file["x_demo"].attrs[f"a{index}"] = index


def not_utf8(file: h5py.File) -> None:
    kind = h5t.C_S1.copy()
    kind.set_size(4)
    kind.set_cset(h5t.CSET_UTF8)
    h5a.create(file["x_demo"].id, b"text", kind, h5s.create(h5s.SCALAR)).write(np.array(b"\xff\xfe\xfd", dtype="S4"), mtype=kind)


def moved(where: object):
    """Move the stub's array to another place in the file. Its header is of version 1, which has no checksum."""

    def after(path: Path) -> None:
        with h5py.File(path) as file:
            old, size, other = file[DATA].id.get_offset(), file[DATA].nbytes, file["x_demo/item"].id.get_offset()
        layout = old.to_bytes(8, "little") + size.to_bytes(8, "little")
        image = path.read_bytes()
        if image.count(layout) != 1:
            raise RuntimeError("the layout message is not where it was thought to be")
        patch(path, image.index(layout), where(path.stat().st_size, other).to_bytes(8, "little"))

    return after


def many_texts(file: h5py.File) -> None:
    file["x_demo"].attrs["a"] = "x" * 4000
    for index in range(60):
        file["x_demo"].attrs[f"a{index}"] = "shorten"


def shared_text(path: Path) -> None:
    """Let all texts of `many_texts` refer to the first one, whose bytes are in the file once."""
    image = path.read_bytes()

    def references(text: bytes) -> list[int]:
        """Where a header refers to ``text``: its length, the address of a heap, an index."""
        heaps = [match.start() for match in re.finditer(b"GCOL", image)]
        wanted = [len(text).to_bytes(4, "little") + heap.to_bytes(8, "little") for heap in heaps]
        return [match.start() for start in wanted for match in re.finditer(re.escape(start), image)]

    (first,) = references(b"x" * 4000)
    others = references(b"shorten")
    if len(others) != 60:
        raise RuntimeError("the references are not where they were thought to be")
    for other in others:
        patch(path, other, image[first : first + 16])


def resized(change: int):
    def after(path: Path) -> None:
        image = path.read_bytes()
        path.write_bytes(image[:change] if change < 0 else image + bytes(change))

    return after


def flipped(where: str):
    """Change the last byte of a dataset after the digests were taken."""

    def after(path: Path) -> None:
        with h5py.File(path) as file:
            last = file[where].id.get_offset() + file[where].nbytes - 1
        patch(path, last, bytes([path.read_bytes()[last] ^ 1]))

    return after


def stale(path: Path) -> None:
    """Another title, and only the file's own digest follows."""
    with h5py.File(path, "r+") as file:
        file.attrs["title"] = "not what was sealed"
    reseal(path, content_too=False)


def swap_labels(first: int, second: int):
    """Exchange the labels and protection of the channels that are ``first`` and ``second`` of their label."""

    def edit(file: h5py.File) -> None:
        label = file[f"{STACK}/label"][...]
        one, other = np.flatnonzero(label[0] == first)[0], np.flatnonzero(label[0] == second)[0]
        label[0, [one, other]] = label[0, [other, one]]
        file[f"{STACK}/label"][...] = label

    return edit


def on_label(name: str, label: int, value: object):
    """Set ``name`` of the last channel with ``label``."""

    def edit(file: h5py.File) -> None:
        channel = np.flatnonzero(file[f"{STACK}/label"][0] == label)[-1]
        put(f"{STACK}/{name}", (..., channel), value)(file)

    return edit


def lowest(name: str, value: object):
    """Set ``name`` of the channel with the smallest lp, which no label rests on."""

    def edit(file: h5py.File) -> None:
        put(f"{STACK}/{name}", (0, int(np.argmin(file[f"{STACK}/lp"][0]))), value)(file)

    return edit


def json_column(change: object):
    """Change the parsed ``tensors`` of the first FFN."""

    def edit(file: h5py.File) -> None:
        def changed(text: str) -> str:
            value = json.loads(text)
            return json.dumps(change(value) or value)

        put("/block/tensors", 0, changed)(file)

    return edit


def config(text: str):
    def edit(file: h5py.File) -> None:
        file["model"].attrs["config"] = text
        file["model"].attrs["config_sha256"] = hashlib.sha256(text.encode()).hexdigest()

    return edit


# --- Valid files -----------------------------------------------------------------------------------------------


def tie(u: np.ndarray, s: np.ndarray) -> None:
    """Three channels share the largest lp, and only two become supernodes."""
    u[:, [1, 4, 6]], s[:, [1, 4, 6]] = u[:, [1]], 50 * s[:, [1]]


def edges(u: np.ndarray, s: np.ndarray) -> None:
    u[:, 0], s[:, 0] = 0, 0  # Dead.
    u[:, 1] *= 1e-22  # Its activation power is subnormal in float32.
    u[:, 2], s[:, 2] = 2.0**64 - 2.0**40, 1e-20  # Its activation power is the largest float32.
    s[:, 3] = 0  # No gradient: lp 0, as in channel 0.


def edge_values(file: h5py.File) -> None:
    stack = file[STACK]
    for name in ("sum_u", "sum_q", "wanda_group"):
        put(stack[name].name, (..., 0), -0.0)(file)
    for name in ("write_norm", "write_norm_l1"):
        put(stack[name].name, (..., 2), np.finfo(np.float32).max)(file)
    put(stack["up_norm"].name, (..., 3), np.float32(1e-45))(file)


def future(file: h5py.File) -> None:
    file.attrs["format_version"] = "1.7"
    file["labels"].attrs["curve"] = "smooth"
    file.create_group("future").attrs["since"] = "1.7"
    unknown(file)


def another_definition(file: h5py.File) -> None:
    """Neither metrics nor labels follow the definition scar-1, and no rule can refuse them."""
    file["calibration"].attrs["metric_definition"] = "scar-2"
    file[STACK]["lp"][...] *= 3
    file[STACK]["label"][...] = 0


def unknown(file: h5py.File) -> None:
    stack = file[STACK]
    extra = stack.create_dataset("kurtosis", data=np.full(stack["lp"].shape, 3, dtype="<f4"))
    extra.attrs["long_name"], extra.attrs["units"] = "kurtosis of u", "1"
    for axis, name in enumerate(("layer", "channel")):
        extra.dims[axis].attach_scale(stack[name])


def extension() -> object:
    def array(name: str, values: object, merge: str, dimensions: tuple[str, ...] = ("layer", "channel")) -> ExtensionVariable:
        return ExtensionVariable(name, dimensions, values, f"{name} of a demo", "1", merge)

    base = only()
    grid = np.ones((1, 8))
    of_stack = (
        array("layer", np.array([0], "<i4"), "", ("layer",)),
        array("channel", np.arange(8, dtype="<i4"), "", ("channel",)),
        array("added", grid, "sum"),
        array("peak", grid.astype("<f4"), "max"),
        array("count", grid.astype("<i8"), "equal"),
        array("flag", grid.astype("u1"), "drop"),
    )
    word = ExtensionVariable("word", ("item",), ["a", "ß"], "word of a demo", "", "equal")
    return dataclasses.replace(
        base,
        extensions=(
            ExtensionGroup(
                "x_demo",
                {"note": "free text", "count": 3, "rate": 0.5},
                (array("item", np.arange(2, dtype="<i4"), "", ("item",)), word),
            ),
            ExtensionGroup("x_demo/decoder", {}, of_stack),
        ),
    )


def well_known() -> object:
    """Every well-known column and array in a stack of experts, with unknown values."""
    base = only("write_norm", kinds=EXPERT_PAIR[1:])
    found: dict[str, dict[str, np.ndarray]] = {}
    for item in (*columns.COLUMNS, *columns.DRIVING_ARRAYS):
        for stack in base.stacks:
            shape = (*shape_of(stack), *((3,) if item.name in columns.ARRAY_BY_NAME else ()))
            values = np.arange(np.prod(shape), dtype=item.dtype).reshape(shape) % 2
            values[..., 0] = np.nan if item.dtype[0] == "f" else 0 if item.dtype == "u1" else -1
            found.setdefault(item.name, {})[stack.name] = values
    return with_columns(base, found)


def interleaved(file: h5py.File) -> None:
    """Gate and up take turns in the rows of one tensor."""
    json_column(
        lambda slices: [
            {
                **item,
                "tensor": "gate_up",
                "parameter": "gate_up",
                "start": ("gate", "up").index(item["role"]),
                "stop": 16,
                "step": 2,
            }
            if item["role"] != "write"
            else item
            for item in slices
        ]
    )(file)


def stacked(file: h5py.File) -> None:
    """The experts' matrices lie along the first axis of one tensor for each role."""
    json_column(
        lambda slices: [
            {**item, "tensor": item["role"], "parameter": item["role"], "axis": item["axis"] + 1, "index": number // 3}
            for number, item in enumerate(slices)
        ]
    )(file)


def renamed(file: h5py.File) -> None:
    file.attrs["title"] = "Ätlas \u2713 \u202e \x1b[31mred\x07\r\n\ttab"
    file["model"].attrs["id"] = "组织/模型"


NEAREST = (*contents.NEAREST, *contents.NEAREST.values())
SLIM = ("connectivity_at", "wanda_group", "redundancy_null", *NEAREST)
RELABELLED = dataclasses.replace(contents.SETTINGS, rho=0.5)
WITHOUT_SUMS = schema.STRIPPED
RAGGED = (contents.Kind(layers=(0, 2)), contents.Kind("decoder.wide", (1,), 12))
ENCODER = (contents.Kind("encoder", (0, 1), 4, place="encoder", share=0.7), contents.Kind(layers=(0, 1)))
UNGATED = (contents.Kind(layers=(0,), gated=False, bias=True),)
PAIR = (contents.Kind(),)
EXPERT_PAIR = contents.MOE[:2]

AS_WRITTEN = ("minimal", "everything", "experts", "extension", "merged")  # The layout of chanfmt's own files.

VALID: dict[str, tuple] = {  # name: codes, content[, edit]
    "minimal": ([], content(contents.Kind(layers=(0,)), without=OPTIONAL)),
    "everything": ([], content()),
    "experts": ([], content(*EXPERT_PAIR, without=SLIM, dropped=WITHOUT_SUMS)),
    "shared": ([], only("write_norm", "sum_q2", "sum_q2_split", kinds=contents.MOE)),
    "ragged": ([], only("sum_u", "sum_u2", kinds=RAGGED)),
    "encoder-decoder": ([], only("read_connectivity", kinds=ENCODER)),
    "ungated-bias": ([], content(*UNGATED, without=OPTIONAL)),
    "extension": ([], extension()),
    "columns": ([], well_known()),
    "merged": ([], content(contributions=2, dropped=contents.UNMERGEABLE)),
    "stripped": ([], content(dropped=WITHOUT_SUMS)),
    "no-redundancy": ([], content(without=(*contents.OF_REDUNDANCY, *SLIM))),
    "relabelled": ([], content(contents.Kind(layers=(0,)), settings=RELABELLED, core_rho=0.25, without=SLIM)),
    "partial": (["W503"], only(status="partial"), remove(*(f"{STACK}/{name}" for name in ("lp", "label", "protection")))),
    "float-edges": ([], content(contents.Kind(layers=(0,)), edit=edges, without=(*SLIM[:1], *NEAREST)), edge_values),
    "tie": ([], only("connectivity", edit=tie)),
    "newer-minor": (["W501", "W502"], only(), future),
    "other-definition": (["W505"], only("lp", "label"), another_definition),
    "unknown-name": (["W502"], only(), unknown),
    "no-file-digest": (["W504"], only(), remove("/producer/file_sha256", "/producer/byte")),
    "interleaved": ([], only(), interleaved),
    "stacked-experts": ([], only("write_norm", kinds=EXPERT_PAIR[1:]), stacked),
    "used-twice": (
        [],
        only(),
        both(*(put(f"{STACK}/{name}", slice(None), lambda old: 2 * old) for name in ("tokens", "tokens_split"))),
    ),
    "inputs": ([], only(inputs=ARRAYS, tokens_stored=False, kinds=(contents.Kind("encoder", (0,), place="encoder"),))),
    "special-tokens": ([], only(special=BERTS)),
    "widths": ([], linked(only(kinds=contents.MOE[1:]))),
    "names-no-tokens-stored": ([], only(tokens_stored=False), renamed),
}

# --- Invalid files ---------------------------------------------------------------------------------------------

STUBS: dict[str, tuple] = {  # name: codes, edit[, after]
    "E001-empty": (["E001"], None, lambda path: path.write_bytes(b"")),
    "E001-text": (["E001"], None, lambda path: path.write_text("not an HDF5 file\n" * 9)),
    "E002-other-hdf5": (["E002"], attribute("/", "format", None)),
    "E002-other-format": (["E002"], attribute("/", "format", "another-atlas")),
    "E003-missing": (["E003"], attribute("/", "format_version", None)),
    "E003-major-only": (["E003"], attribute("/", "format_version", "1")),
    "E004-major-2": (["E004"], attribute("/", "format_version", "2.0")),
    "E005-feature": (["E005"], attribute("/", "features_required", "time-travel")),
    "E006-external-link": (["E006"], lambda file: file["x_demo"].__setitem__("link", h5py.ExternalLink("other.h5", "/values"))),
    "E006-soft-link": (["E006"], lambda file: file["x_demo"].__setitem__("link", h5py.SoftLink(DATA))),
    "E006-dangling-link": (["E006"], lambda file: file["x_demo"].__setitem__("link", h5py.SoftLink("/nowhere"))),
    "E007-two-names": (["E007"], lambda file: file["x_demo"].__setitem__("again", file[DATA])),
    "E007-cycle": (["E007"], lambda file: file["x_demo"].__setitem__("loop", file["/"])),
    "E008-deep": (["E008"], lambda file: file.create_group("x_demo/a/b/c")),
    "E008-attributes": (["E008"], many_attributes),
    "E009-named-type": (["E009"], lambda file: file["x_demo"].__setitem__("type", np.dtype("<f4"))),
    "E010-bool": (["E010"], typed(bool)),
    "E010-float16": (["E010"], typed("<f2")),
    "E010-big-endian": (["E010"], typed(">f4")),
    "E010-compound": (["E010"], typed(np.dtype([("a", "<f4")]), np.zeros(4, dtype=[("a", "<f4")]))),
    "E010-fixed-text": (["E010"], typed("S4", np.array([b"a"] * 4))),
    "E010-ascii-text": (["E010"], replaced(ascii_texts)),
    "E010-not-utf8": (["E010"], typed(TEXT, [b"\xff\xfe"] * 4)),
    "E011-scalar": (["E011"], replaced(lambda file: create(file["x_demo"], "values", data=np.float32(1)))),
    "E011-null": (["E011"], replaced(null_space)),
    "E011-empty": (["E011"], replaced(lambda file: create(file["x_demo"], "values", shape=(4, 0), dtype="<f4"))),
    "E011-five-axes": (["E011"], replaced(lambda file: create(file["x_demo"], "values", data=np.zeros((4, 1, 1, 1, 1), "<f4")))),
    "E012-external": (
        ["E012"],
        replaced(lambda file: create(file["x_demo"], "values", shape=(4,), dtype="<f4", external=[("other.bin", 0, 16)])),
    ),
    "E012-virtual": (["E012"], replaced(virtual)),
    "E013-chunked": (["E013"], replaced(lambda file: create(file["x_demo"], "values", data=np.zeros(4, "<f4"), chunks=(2,)))),
    "E013-gzip": (["E013"], replaced(lambda file: create(file["x_demo"], "values", data=np.zeros(4, "<f4"), compression="gzip"))),
    "E013-compact": (["E013"], replaced(compact)),
    "E014-no-data": (["E014"], replaced(lambda file: create(file["x_demo"], "values", shape=(4,), dtype="<f4"))),
    "E014-huge": (["E014"], replaced(lambda file: create(file["x_demo"], "values", shape=(10**15,), dtype="<f8"))),
    "E014-shared-texts": (["E014"], many_texts, shared_text),
    "E014-outside": (["E014"], None, moved(lambda size, other: 2**40)),
    "E015-overlap": (["E015"], None, moved(lambda size, other: other + 8)),
    "E016-cut-one": (["E016"], None, resized(-1)),
    "E016-trailing": (["E016"], None, resized(4)),
    "E018-bool": (["E018"], new_attribute("x_demo", "flag", True)),
    "E018-array": (["E018"], new_attribute("x_demo", "list", np.arange(3))),
    "E018-int32": (["E018"], new_attribute("x_demo", "number", np.int32(1))),
    "E018-uint64": (["E018"], new_attribute("x_demo", "number", np.uint64(1))),
    "E018-empty": (["E018"], new_attribute("x_demo", "nothing", h5py.Empty("<f8"))),
    "E018-not-utf8": (["E018"], not_utf8),
}


def scales_of_another_group(file: h5py.File) -> None:
    remake(f"{STACK}/lp", (None, "channel"))(file)
    file[f"{STACK}/lp"].dims[0].attach_scale(file["/block/block"])


def second_sequence(file: h5py.File) -> None:
    """The second sequence is the first."""
    for name in ("token_ids", "sequence_sha256"):
        values = file[f"/calibration/{name}"]
        put(values.name, 1, (values.asstr() if name != "token_ids" else values)[0])(file)


def wider_scores(file: h5py.File) -> None:
    remake(f"{STACK}/lp", change=lambda values: np.concatenate([values, values[:, :1]], axis=1))(file)


def long_extension(file: h5py.File) -> None:
    for name, size in (("channel", 9), ("layer", 1)):
        scale = file.create_dataset(f"/x_demo/decoder/{name}", data=np.arange(size, dtype="<i4"))
        scale.attrs["long_name"], scale.attrs["units"] = f"{name} index", "1"
        scale.make_scale(name)


def texts_added(file: h5py.File) -> None:
    file["/x_demo/word"].attrs["merge"] = "sum"


def first_supernode_last(file: h5py.File) -> None:
    """Ties went to the highest index."""
    put(f"{STACK}/label", (0, slice(None)), lambda old: np.where(np.arange(8) == 1, 0, np.where(np.arange(8) == 6, 2, old)))(file)


def also_dropped(name: str):
    return lambda file: attribute("/", "dropped", f"{file.attrs['dropped']} {name}")(file)


def changed_slice(index: int, **values: object):
    return json_column(lambda slices: slices[index].update(values))


BARE = only()
SQUARE = only(kinds=(contents.Kind(layers=tuple(range(8))),))
NORMS = only("write_norm", "wanda_group", "max_abs_u")
PAIRED = only("write_norm", kinds=PAIR)
ROUTED = only("write_norm", "connectivity", "sum_s2", kinds=EXPERT_PAIR[1:])
SUMS = only(*(item.name for item in schema.SUMS), "max_abs_u", "taylor", "lp_factored", "activation_power", "curvature")
SPLIT = only("sum_q2", "sum_q2_split")
HALO = only("connectivity", "redundancy", "core_covered")
NEAR = only(*NEAREST)
SIZED = only("connectivity", "connectivity_at")
LINKED = only("connectivity", "read_connectivity")
TIED = only(edit=tie)
EXTENDED = extension()
LINKED_WIDTHS = linked(only(kinds=PAIR))
DEEP = "[" * 5_000

INVALID: dict[str, tuple] = {  # name: codes, content, edit[, after]
    "E101-labels": (["E101"], BARE, remove("labels")),
    "E102-metric": (["E102"], BARE, remove(f"{STACK}/lp")),
    "E102-column": (["E102"], BARE, remove("/block/module")),
    "E102-gate": (["E102"], BARE, attribute("/", "dropped", " ".join(name for name in BARE.dropped if name != "gate_norm"))),
    "E103-root": (["E103"], BARE, attribute("/", "content_sha256", None)),
    "E104-int": (["E104"], BARE, attribute("labels", "eta", 1)),
    "E105-metric": (["E105"], BARE, remake(f"{STACK}/lp", dtype="<f8")),
    "E105-label": (["E105"], BARE, remake(f"{STACK}/label", dtype="<i4")),
    "E106-no-scale": (["E106"], BARE, remake(f"{STACK}/lp", ("layer", None))),
    "E106-transposed": (["E106"], SQUARE, remake(f"{STACK}/lp", ("channel", "layer"))),
    "E106-other-group": (["E106"], BARE, scales_of_another_group),
    "E107-length": (["E107"], BARE, wider_scores),
    "E107-extension": (["E107"], BARE, long_extension),
    "E108-long-name": (["E108"], BARE, attribute(f"{STACK}/lp", "long_name", None)),
    "E108-units": (["E108"], BARE, attribute(f"{STACK}/lp", "units", "bits")),
    "E108-flag-meanings": (["E108"], BARE, attribute(f"{STACK}/label", "flag_meanings", "none supernode halo")),
    "E109-status": (["E109"], BARE, attribute("/", "status", "done")),
    "E109-kind": (["E109"], BARE, attribute(STACK, "kind", "sparse")),
    "E109-model-id": (["E109"], BARE, both(attribute("model", "source", "hub"), attribute("model", "id", "../t/tiny"))),
    "E109-place": (["E109"], BARE, put("/block/place", 0, "middle")),
    "E109-score": (["E109"], BARE, attribute("labels", "score", "label")),
    "E110-config": (["E110"], BARE, config("[]")),
    "E110-nested": (["E110"], BARE, config(DEEP)),
    "E110-tensors": (["E110"], BARE, put("/block/tensors", 0, "[")),
    "E110-slice": (["E110"], BARE, json_column(lambda slices: slices[0].pop("step") and None)),
    "E110-inputs": (
        ["E110"],
        only(inputs=ARRAYS, tokens_stored=False),
        put("/calibration/contribution_inputs", 0, '{"labels": ["i8", 1]}'),
    ),
    "E111-missing": (["E111"], EXTENDED, attribute("/x_demo/decoder/added", "merge", None)),
    "E111-texts": (["E111"], EXTENDED, texts_added),
    "E201-stack": (["E201", "E202"], BARE, put("/block/stack", 0, "nowhere")),
    "E201-channels": (
        ["E201"],
        BARE,
        both(put("/block/n_channels", 0, 6), json_column(lambda slices: [{**item, "stop": 6} for item in slices])),
    ),
    "E202-twice": (["E202"], PAIRED, both(put("/block/row", 1, 0), put("/block/layer_index", 1, 0))),
    "E203-layer": (["E203"], BARE, put("/block/layer_index", 0, 5)),
    "E204-no-write": (["E204"], BARE, json_column(lambda slices: slices[:-1])),
    "E204-gate": (["E204"], only(kinds=UNGATED), changed_slice(0, role="gate")),
    "E204-short": (["E204"], BARE, changed_slice(0, stop=7)),
    "E204-experts": (["E204"], ROUTED, json_column(lambda slices: slices[:-3])),
    "E205-channel": (["E205"], BARE, put(f"{STACK}/channel", 7, 8)),
    "E206-source": (["E206"], BARE, put("/calibration/source_of", 0, 1)),
    "E206-sequences": (["E206"], BARE, put("/calibration/contribution_sequences", 0, 5)),
    "E207-sequence": (["E207"], BARE, second_sequence),
    "E207-contribution": (["E207"], only(contributions=2), put("/calibration/contribution_id", 1, "0" * 32)),
    "E109-loss": (["E109"], BARE, attribute("calibration", "loss", "something else")),
    "E208-sum": (["E208"], ROUTED, put(f"{EXPERTS}/tokens", (0, 0), lambda old: old - 1)),
    "E208-uneven": (
        ["E208"],
        BARE,
        both(put(f"{STACK}/tokens", 0, lambda old: old + 8), put(f"{STACK}/tokens_split", (0, 0), 16)),
    ),
    "E208-lost": (["E208"], BARE, both(put(f"{STACK}/tokens", 0, 15), put(f"{STACK}/tokens_split", (0, 0), 7))),
    "E209-token": (["E209"], BARE, put("/calibration/token_ids", (0, 0), lambda old: old + 1)),
    "E210-config": (["E210"], BARE, attribute("model", "config", '{"hidden_size": 9}')),
    "E211-unknown": (["E211"], BARE, also_dropped("kurtosis")),
    "E211-there": (["E211"], BARE, also_dropped("lp")),
    "E212-size": (["E212"], SIZED, attribute("labels", "support_size", 3)),
    "E212-row": (["E212"], SIZED, put(f"{STACK}/connectivity_at", (1, 0, 0), lambda old: old / 2)),
    "E213-begin": (
        ["E213"],
        only(special=BERTS),
        attribute("calibration", "special_tokens", '{"before": [101, 5], "after": []}'),
    ),
    "E214-alone": (["E214"], LINKED_WIDTHS, remove("/block/width_factor")),
    "E214-shared": (["E214"], LINKED_WIDTHS, put("/block/width_factor", 1, 4)),
    "E301-norm": (["E301"], NORMS, put(f"{STACK}/write_norm", (0, 0), np.inf)),
    "E302-norm": (["E302"], NORMS, put(f"{STACK}/write_norm", (0, 0), np.nan)),
    "E302-metric": (["E302"], SUMS, lowest("curvature", np.nan)),
    "E302-value": (["E302"], ROUTED, put(f"{EXPERTS}/connectivity", (0, 1, 0), 0.5)),
    "E302-some": (["E302"], LINKED, put(f"{STACK}/read_connectivity", (0, 0), np.nan)),
    "E303-norm": (["E303"], NORMS, put(f"{STACK}/write_norm", (0, 0), -1)),
    "E303-redundancy": (["E303"], HALO, put(f"{STACK}/redundancy", (0, 3), -0.5)),
    "E304-mean": (["E304"], SUMS, lowest("sum_u", 1e9)),
    "E304-peak-low": (["E304"], SUMS, lowest("max_abs_u", 1e-3)),
    **{
        f"E305-{name}": (["E305"], SUMS, lowest(name, lambda old: old * np.float32(0.999)))
        for name in ("lp", "lp_factored", "taylor")
    },
    "E305-ulp": (["E305"], SUMS, lowest("lp", lambda old: old - 4 * np.spacing(old))),
    "E306-split": (["E306"], SPLIT, put(f"{STACK}/sum_q2_split", (0, 0, 0), lambda old: old * 1.001)),
    "E307-sum": (["E307"], ROUTED, put(f"{EXPERTS}/sum_s2", (0, 1, 0), 1.0)),
    "E307-label": (["E307"], ROUTED, put(f"{EXPERTS}/label", (0, 1, 0), 2)),
    "E308-core": (["E308"], BARE, attribute("labels", "core_rho", 1.5)),
    "E308-alpha": (["E308"], BARE, attribute("labels", "alpha", -0.5)),
    "E309-supernode": (["E309"], BARE, swap_labels(0, 2)),
    "E309-halo": (["E309"], only("connectivity"), swap_labels(0, 1)),
    "E309-tie": (["E309"], TIED, first_supernode_last),
    "E310-outside": (["E310"], BARE, put(f"{STACK}/protection", (0, 0), 0.5)),
    "E310-halo": (["E310"], HALO, on_label("protection", 1, lambda old: old * 0.9)),
    "E311-redundancy": (["E311"], HALO, put(f"{STACK}/redundancy", (0, 3), 18.5)),
    "E302-partner": (["E302"], NEAR, put(f"{STACK}/redundancy_pair", (0, 0, 1), np.nan)),
    "E302-dimension": (["E302"], NEAR, put(f"{STACK}/write_dimension", (0, 0, 1), -1)),
    "E311-partner": (["E311"], NEAR, put(f"{STACK}/redundancy_partner", (0, 0, 1), 8)),
    "E311-share": (["E311"], NEAR, put(f"{STACK}/write_share", (0, 0, 1), 1.5)),
    "E311-label": (["E309", "E311"], BARE, put(f"{STACK}/label", (0, 0), 3)),
    "E311-connectivity": (["E311"], HALO, on_label("connectivity", 2, 1.5)),
    "E401-title": (["E401"], BARE, None, stale),
    "E401-value": (["E401", "E402"], NORMS, None, flipped(f"{STACK}/wanda_group")),
    "E402-digest": (["E402"], BARE, None, flipped("/producer/file_sha256")),
}


def generate(directory: Path) -> dict[str, dict]:
    """Write every file below ``directory``. Returns what expected.json says."""
    expected = {}

    def target(name: str, codes: list[str]) -> Path:
        path = directory / f"{name}.h5"
        path.parent.mkdir(parents=True, exist_ok=True)
        expected[f"{name}.h5"] = {"valid": not any(code.startswith("E") for code in codes), "codes": codes}
        return path

    for name, (codes, *how) in VALID.items():
        write(target(f"valid/{name}", codes), *how, slim=name not in AS_WRITTEN)
    for name, (codes, *how) in STUBS.items():
        stub(target(f"invalid/{name}", codes), *how)
    stub(target("invalid/E001-user-block", ["E001"]), after=lambda path: patch(path, 0, b"PK\x03\x04"), userblock_size=512)
    for name, (codes, *how) in INVALID.items():
        write(target(f"invalid/{name}", codes), *how)
    (directory / "expected.json").write_text(json.dumps(dict(sorted(expected.items())), indent=1) + "\n", encoding="utf-8")
    return expected


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE)
