"""Read and validate importance atlases with h5py and numpy alone, written from atlas-1.0.md alone.

    python spec/reader.py FILE...   one JSON line a file; exit 0 when all are valid, 1 otherwise, 2 on usage

Numbers in brackets are sections of the specification. The tables come from atlas-1.0.json beside this file.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
from h5py import h5a, h5d, h5ds, h5i, h5l, h5o, h5s, h5t

TABLES = json.loads(Path(__file__).with_name("atlas-1.0.json").read_text(encoding="utf-8"))
ATTRIBUTES, VARIABLES = TABLES["attributes"], TABLES["variables"]
STACK = {row["name"]: row for row in VARIABLES["/stacks/*"]}
MAJOR, MINOR = map(int, TABLES["format_version"].split("."))
FILE_DIGEST = "/producer/file_sha256"
NUMBERS = {"f4": h5t.IEEE_F32LE, "f8": h5t.IEEE_F64LE, "i4": h5t.STD_I32LE, "i8": h5t.STD_I64LE, "u1": h5t.STD_U8LE}
PYTHON = {"str": str, "int": int, "float": float}
MACHINERY = {"CLASS", "NAME", "DIMENSION_LIST", "REFERENCE_LIST", "DIMENSION_LABELS", "_Netcdf4Dimid", "_Netcdf4Coordinates"}
MAX_DEPTH, MAX_OBJECTS, MAX_ATTRIBUTES, MAX_TEXT = 3, 20_000, 64, 2**24
SUMS = ("sum_u", "sum_u2", "sum_s2", "sum_q", "sum_abs_q", "sum_q2")
NORMS = ("write_norm", "write_norm_l1", "gate_norm", "up_norm")
METRICS = {  # [7] of the sums and n, in float64
    "lp": lambda s, n: s["sum_q2"] / (2 * n),
    "lp_factored": lambda s, n: (s["sum_u2"] / n) * (s["sum_s2"] / n) / 2,
    "activation_power": lambda s, n: s["sum_u2"] / n,
    "curvature": lambda s, n: s["sum_s2"] / n,
    "taylor": lambda s, n: s["sum_abs_q"] / n,
}
SPECIAL_TOKENS = ("special_tokens", "tokenizer_special_tokens")
SHARES = ("connectivity", "connectivity_at", "read_connectivity", "core_covered", "write_share")
NEAREST = {"redundancy_partner": "redundancy_pair", "write_dimension": "write_share"}
MAX_REDUNDANCY = 18.03
# What h5py, and numpy on what h5py gave it, raise on damaged files.
H5_ERRORS = (OSError, LookupError, RuntimeError, ValueError, TypeError, MemoryError, ArithmeticError)


class Invalid(Exception):
    """The first finding of level 0, which ends the validation: (code, path, message)."""


@dataclass
class Node:
    """A group (``type`` is "group") or a dataset. ``dimensions`` holds the path of every axis's scale, or None."""

    path: str
    type: str
    attributes: dict
    shape: tuple[int, ...] = ()
    dimensions: list = field(default_factory=list)
    id: object = None

    def values(self) -> np.ndarray:
        """The values; texts as an object array of str."""
        array = h5py.Dataset(self.id)[...]
        if self.type == "str":
            return np.array([text.decode("utf-8") for text in array.ravel()], dtype=object).reshape(array.shape)
        return array


class Atlas:
    """The tree of an open file, path to Node, and the findings so far."""

    def __init__(self, nodes: dict[str, Node]):
        self.nodes, self.found = nodes, []

    def report(self, bad: object, code: str, path: str, message: str) -> None:
        if np.any(bad):
            self.found.append((code, path, message))

    def children(self, group: str) -> list[Node]:
        return [node for path, node in self.nodes.items() if parent(path) == group and path != "/"]

    def values(self, path: str) -> np.ndarray | None:
        node = self.nodes.get(path)
        return None if node is None or node.type == "group" else node.values()

    def attribute(self, path: str) -> object:
        group, _, name = path.rpartition("@")
        return self.nodes[group].attributes[name]

    def stacks(self) -> dict[str, Node]:
        return {node.path: node for node in self.children("/stacks") if node.type == "group"}


def parent(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def join(group: str, name: str) -> str:
    return f"{group.rstrip('/')}/{name}"


# --- Level 0: the container [1, 2, 14] -------------------------------------------------------------------------


def stated_end(head: bytes) -> int:
    """The end of the file that the superblock (version 0 to 3) states."""
    if len(head) < 64 or head[:8] != b"\x89HDF\r\n\x1a\n" or head[8] > 3:
        raise Invalid("E001", "/", "no HDF5 signature and superblock at byte 0")
    offset = {0: 40, 1: 44, 2: 28, 3: 28}[head[8]]
    return int.from_bytes(head[offset : offset + 8], "little")


def check_size(path: str | Path) -> int:
    try:
        with open(path, "rb") as file:
            head, size = file.read(64), os.fstat(file.fileno()).st_size
    except OSError as error:
        raise Invalid("E001", "/", str(error)) from None
    end = stated_end(head)
    if end != size:
        raise Invalid("E016", "/", f"the superblock states {end} bytes, the file has {size}")
    return size


def check_version(file: h5py.File) -> None:
    """[2] Check what a reader must know before it looks at anything else."""

    def text(name: str) -> str | None:
        value = attribute_value(file.id, name, "/") if h5a.exists(file.id, name.encode()) else None
        return value if isinstance(value, str) else None

    if text("format") != TABLES["format"]:
        raise Invalid("E002", "/@format", "not an importance atlas")
    version = text("format_version") or ""
    if not re.fullmatch("[0-9]{1,9}[.][0-9]{1,9}", version):
        raise Invalid("E003", "/@format_version", f"{version!r} is not MAJOR.MINOR")
    if int(version.split(".")[0]) != MAJOR:
        raise Invalid("E004", "/@format_version", f"version {version}; this reader knows {MAJOR}.x")
    if (text("features_required") or "").split():
        raise Invalid("E005", "/@features_required", "this reader knows none")


def attribute_value(owner: object, name: str, path: str) -> object:
    """The value of an attribute: a scalar text, int or float; flag_values may also be an array of u1."""
    attribute = h5a.open(owner, name.encode("utf-8", "surrogateescape"))
    kind, scalar = attribute.get_type(), attribute.get_space().get_simple_extent_type() == h5s.SCALAR
    flags = path.endswith("/label") and name == "flag_values" and attribute.get_storage_size() < 256
    text = isinstance(kind, h5t.TypeStringID)
    number = any(kind.equal(NUMBERS[code]) for code in ("i8", "f8"))
    if not (scalar and (text or number)) and not (flags and kind.equal(NUMBERS["u1"])):
        raise Invalid("E018", f"{path}@{name}", "neither a text, nor a 64-bit integer, nor a double")
    array = np.empty(attribute.shape, dtype=attribute.dtype)
    attribute.read(array)
    if not text:
        return array if flags else array.item()
    value = array.item()
    raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    if len(raw) > MAX_TEXT:
        raise Invalid("E018", f"{path}@{name}", "the text is too long")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Invalid("E018", f"{path}@{name}", "not UTF-8") from None


class Texts:
    """[1] Counts the bytes that texts claim: together no more than the file has, although texts may share their bytes."""

    def __init__(self, size: int):
        self.left = size

    def take(self, count: int, path: str) -> None:
        self.left -= count
        if self.left < 0:
            raise Invalid("E014", path, "the texts claim more bytes than the file has")


def attributes_of(owner: object, path: str, texts: Texts) -> dict:
    """Every attribute by name in code-point order, without the attributes of HDF5 itself."""
    count = h5a.get_num_attrs(owner)
    if count > MAX_ATTRIBUTES:
        raise Invalid("E008", path, f"{count} attributes")
    names = [h5a.open(owner, index=index).name for index in range(count)]
    names = sorted(name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name for name in names)
    found = {}
    for name in names:
        if name not in MACHINERY:
            found[name] = attribute_value(owner, name, path)
            texts.take(len(found[name].encode()) if isinstance(found[name], str) else 0, f"{path}@{name}")
    return found


def type_of(dataset: h5d.DatasetID) -> str | None:
    kind = dataset.get_type()
    if isinstance(kind, h5t.TypeStringID):
        return "str" if kind.is_variable_str() and kind.get_cset() == h5t.CSET_UTF8 else None
    return next((code for code, known in NUMBERS.items() if kind.equal(known)), None)


def dataset_node(dataset: h5d.DatasetID, path: str, size: int, file: int, texts: Texts) -> tuple[Node, range]:
    """A dataset whose storage follows [1] and [14], and the bytes that it occupies."""
    layout, kind, space = dataset.get_create_plist(), type_of(dataset), None
    if kind is None:
        raise Invalid("E010", path, "its type is none of f4 f8 i4 i8 u1 str")
    if layout.get_layout() == h5d.VIRTUAL or layout.get_external_count():
        raise Invalid("E012", path, "external or virtual storage")
    if layout.get_layout() != h5d.CONTIGUOUS or layout.get_nfilters():
        raise Invalid("E013", path, "its storage is not contiguous")
    space = dataset.get_space()
    shape = space.get_simple_extent_dims() if space.get_simple_extent_type() == h5s.SIMPLE else ()
    if not 1 <= len(shape) <= 4 or 0 in shape:
        raise Invalid("E011", path, f"shape {shape}")
    expected = int(np.prod([int(length) for length in shape], dtype=object)) * (16 if kind == "str" else int(kind[1]))
    offset = dataset.get_offset()
    if offset is None or dataset.get_storage_size() != expected or offset + expected > size:
        raise Invalid("E014", path, f"{expected} bytes declared, {dataset.get_storage_size()} stored at {offset}")
    if kind == "str":  # A text is stored as its length, the address of a heap, and an index.
        stored = np.frombuffer(os.pread(file, expected, offset), "<u4")
        texts.take(int(stored[::4].sum(dtype="u8")), path)
    return Node(path, kind, attributes_of(dataset, path, texts), tuple(shape), id=dataset), range(offset, offset + expected)


def walk(file: h5py.File, size: int) -> dict[str, Node]:
    """Read every object once, check that no two datasets share storage, then read the scales of their axes and their texts."""
    texts, extents, addresses = Texts(size), [], {h5o.get_info(file.id).addr: "/"}
    nodes = {"/": Node("/", "group", attributes_of(file.id, "/", texts))}

    def visit(group: object, path: str, depth: int) -> None:
        if group.get_num_objs() + len(nodes) > MAX_OBJECTS:
            raise Invalid("E008", path, "too many objects")
        for raw in group:
            name = join(path, raw.decode("utf-8"))
            if group.links.get_info(raw).type != h5l.TYPE_HARD:
                raise Invalid("E006", name, "not a hard link")
            try:
                item = h5o.open(group, raw)
            except H5_ERRORS as error:  # HDF5 itself refuses a dataset that does not fit into the file.
                raise Invalid("E014", name, str(error)) from None
            address, kind = h5o.get_info(item).addr, h5i.get_type(item)
            if address in addresses:
                raise Invalid("E007", name, f"also named {addresses[address]}")
            addresses[address] = name
            if kind == h5i.GROUP:
                if depth == MAX_DEPTH:
                    raise Invalid("E008", name, "groups nest too deep")
                nodes[name] = Node(name, "group", attributes_of(item, name, texts))
                visit(item, name, depth + 1)
            elif kind == h5i.DATASET:
                nodes[name], extent = dataset_node(item, name, size, file.id.get_vfd_handle(), texts)
                extents.append((extent, name))
            else:
                raise Invalid("E009", name, "neither a group nor a dataset")

    visit(h5py.h5g.open(file.id, b"/"), "/", 0)
    extents.sort(key=lambda pair: pair[0].start)
    for (first, name), (second, other) in itertools.pairwise(extents):
        if second.start < first.stop:
            raise Invalid("E015", name, f"shares storage with {other}")
    for node in nodes.values():
        if node.type != "group":
            node.dimensions = [scale_of(node, axis, addresses) for axis in range(len(node.shape))]
        if node.type == "str":
            try:
                node.values()
            except UnicodeDecodeError:
                raise Invalid("E010", node.path, "not UTF-8") from None
            except H5_ERRORS:
                raise Invalid("E014", node.path, "its texts cannot be read") from None
    return dict(sorted(nodes.items()))


def scale_of(node: Node, axis: int, addresses: dict[int, str]) -> str | None:
    """Path of the scale of ``axis``; a scale is its own scale. None if the axis has no scale, or several."""
    try:
        if h5ds.is_scale(node.id):
            return node.path if len(node.shape) == 1 else None
        scales: list[str] = []
        # The callback must return None to go on.
        h5ds.iterate(node.id, axis, lambda scale: scales.append(addresses[h5o.get_info(scale).addr]))
        return scales[0] if len(scales) == 1 else None
    except H5_ERRORS:
        return None


# --- Level 1: names, types, dimensions, attributes [3 to 9, 13] ------------------------------------------------


def check_names(atlas: Atlas) -> None:
    stacks = atlas.stacks()
    for group in ("/block", "/stacks", *(name for name in ATTRIBUTES if "*" not in name)):
        atlas.report(group not in atlas.nodes or atlas.nodes[group].type != "group", "E101", group, "missing")
    for group, table in ATTRIBUTES.items():
        for path in stacks if group == "/stacks/*" else [group]:
            if path in atlas.nodes:
                check_attributes(atlas, path, table)
    if "/calibration" in atlas.nodes:
        stated = [name in atlas.nodes["/calibration"].attributes for name in SPECIAL_TOKENS]
        atlas.report(stated[0] != stated[1], "E103", "/calibration", "one of the special tokens is missing")
    if atlas.found:  # What follows looks into groups and attributes.
        return
    known: set[str] = set()
    for group, table in VARIABLES.items():
        for path in stacks if group == "/stacks/*" else [group]:
            known |= check_variables(atlas, path, table)
    for node in atlas.nodes.values():
        if node.type != "group" and node.path not in known:
            check_unknown(atlas, node)
    for path, allowed in (("/@status", "status"), ("/model@source", "source"), *((f"{name}@kind", "kind") for name in stacks)):
        atlas.report(atlas.attribute(path) not in TABLES[allowed], "E109", path, f"none of {TABLES[allowed]}")
    if atlas.attribute("/model@source") == "hub":
        atlas.report(not is_hub_id(atlas.attribute("/model@id")), "E109", "/model@id", "no name of a repository")
    loss = atlas.attribute("/calibration@loss")
    atlas.report(loss not in TABLES["loss"].values(), "E109", "/calibration@loss", "no known loss")
    scores = [name for name, row in STACK.items() if row["dtype"] == "f4" and row["dimensions"] == ["layer", "channel"]]
    atlas.report(atlas.attribute("/labels@score") not in scores, "E109", "/labels@score", "not a metric")
    for path, stack in stacks.items():
        atlas.report(stack.attributes["gated"] not in (0, 1), "E109", f"{path}@gated", "neither 0 nor 1")
    check_json(atlas)


def is_hub_id(name: str) -> bool:
    part = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
    fits = len(name) <= 96 and re.fullmatch(rf"{part}(?:/{part})?", name)
    return bool(fits) and "--" not in name and ".." not in name and not name.endswith(".git")


def check_attributes(atlas: Atlas, path: str, table: list[dict]) -> None:
    for row in table:
        name, where = row["name"], f"{path}@{row['name']}"
        value = atlas.nodes[path].attributes.get(name)
        atlas.report(value is None and row["required"], "E103", where, "missing")
        atlas.report(value is not None and type(value) is not PYTHON[row["type"]], "E104", where, f"not of type {row['type']}")


def needed(atlas: Atlas, stack: Node | None, row: dict) -> bool:
    """[6] Whether the file must hold a variable; ``stack`` is None outside /stacks."""
    if stack is None:
        return row["required"]
    if row["merge"] == "index" or row["name"] in ("tokens", "tokens_split"):
        return row["required"] or (row["name"] == "expert" and stack.attributes["kind"] == "experts")
    if row["name"] in atlas.attribute("/@dropped").split() or atlas.attribute("/@status") == "partial":
        return False
    return row["required"] and not (row["gated_only"] and not stack.attributes["gated"])


def check_variables(atlas: Atlas, group: str, table: list[dict]) -> set[str]:
    """Check a group's variables against its table. Returns the paths that the table knows."""
    stack = atlas.nodes[group] if parent(group) == "/stacks" else None
    for row in table:
        path = join(group, row["name"])
        node = atlas.nodes.get(path)
        if node is None or node.type == "group":
            atlas.report(node is not None or needed(atlas, stack, row), "E102", path, "missing")
            continue
        atlas.report(stack and row["gated_only"] and stack.attributes["gated"] == 0, "E102", path, "there is no gate")
        atlas.report(node.type != row["dtype"], "E105", path, f"{node.type} instead of {row['dtype']}")
        dimensions = [join(group, name) for name in row["dimensions"]]
        if stack and stack.attributes["kind"] == "experts" and row["merge"] != "index" and "layer" in row["dimensions"]:
            dimensions.insert(row["dimensions"].index("layer") + 1, join(group, "expert"))
        atlas.report(node.dimensions != dimensions, "E106", path, f"dimensions {node.dimensions}")
        check_lengths(atlas, node)
        for name, value in (("long_name", row["long_name"]), ("units", row["units"])):
            atlas.report(value and node.attributes.get(name) != value, "E108", f"{path}@{name}", f"not {value!r}")
        if row["name"] == "label":
            flags = node.attributes.get("flag_values")
            right = isinstance(flags, np.ndarray) and flags.tolist() == [0, 1, 2]
            atlas.report(not right or node.attributes.get("flag_meanings") != "none halo supernode", "E108", path, "flags")
    return {join(group, row["name"]) for row in table}


def check_lengths(atlas: Atlas, node: Node) -> None:
    for length, scale in zip(node.shape, node.dimensions, strict=True):
        atlas.report(scale and atlas.nodes[scale].shape != (length,), "E107", node.path, f"{length} along {scale}")


def check_unknown(atlas: Atlas, node: Node) -> None:
    """Check a variable's attributes: [1] holds for every dataset, and [13] for datasets of extensions."""
    group = parent(node.path)
    outside = any(scale is None or parent(scale) != group for scale in node.dimensions)
    atlas.report(outside, "E106", node.path, f"dimensions {node.dimensions}")
    check_lengths(atlas, node)
    for name in ("long_name",) if node.type == "str" else ("long_name", "units"):
        atlas.report(not isinstance(node.attributes.get(name), str), "E108", f"{node.path}@{name}", "missing")
    if not node.path.startswith("/x_"):
        return
    if node.dimensions == [node.path]:
        owned = re.fullmatch("/x_[^/]+/([^/]+)", group)
        twin = atlas.nodes.get(f"/stacks/{owned[1]}/{node.path.rpartition('/')[2]}") if owned else None
        atlas.report(twin and twin.shape != node.shape, "E107", node.path, "not as long as the stack's")
        return
    merge = node.attributes.get("merge")
    fits = merge in TABLES["extension_merge_rules"] and not (node.type == "str" and merge in ("sum", "max"))
    atlas.report(not fits, "E111", node.path, f"merge rule {merge!r}")


def parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def special_tokens(text: str) -> tuple[list, list] | None:
    """The token ids before and after [4]; None if ``text`` does not state them."""
    value = parsed(text)
    lists = [value.get(name) for name in ("before", "after")] if isinstance(value, dict) else [None]
    right = all(isinstance(ids, list) and all(type(item) is int and 0 <= item < 2**31 for item in ids) for ids in lists)
    return tuple(lists) if right else None


def check_json(atlas: Atlas) -> None:
    def texts(value: object) -> bool:
        return all(isinstance(item, str) for item in value)

    def slices(value: object) -> bool:
        return isinstance(value, list) and all(
            isinstance(item, dict)
            and texts(item.get(key) for key in ("role", "tensor", "parameter"))
            and all(type(item.get(key)) is int for key in ("start", "stop", "step"))
            and "axis" in item
            and (item["axis"] is None or type(item["axis"]) is int)
            and (item.get("index") is None or type(item["index"]) is int)
            for item in value
        )

    def arrays(value: object) -> bool:
        return isinstance(value, dict) and all(
            isinstance(item, list)
            and len(item) == 2
            and isinstance(item[0], str)
            and isinstance(item[1], list)
            and all(type(length) is int and length >= 1 for length in item[1])
            for item in value.values()
        )

    names, versions = parsed(atlas.attribute("/model@architectures")), parsed(atlas.attribute("/producer@versions"))
    history = [parsed(line) for line in atlas.attribute("/producer@history").split("\n") if line]
    atlas.report(not isinstance(names, list) or not texts(names), "E110", "/model@architectures", "no list of texts")
    atlas.report(not isinstance(parsed(atlas.attribute("/model@config")), dict), "E110", "/model@config", "no object")
    atlas.report(not isinstance(versions, dict) or not texts(versions.values()), "E110", "/producer@versions", "no object")
    atlas.report(not all(isinstance(line, dict) for line in history), "E110", "/producer@history", "a line is no object")
    for name in SPECIAL_TOKENS:
        stated = atlas.nodes["/calibration"].attributes.get(name)
        atlas.report(
            stated is not None and special_tokens(stated) is None, "E110", f"/calibration@{name}", "no lists of token ids"
        )
    for path, code, right in (
        ("/block/place", "E109", lambda text: text in TABLES["place"]),
        ("/block/tensors", "E110", lambda text: slices(parsed(text))),
        ("/calibration/contribution_inputs", "E110", lambda text: not text or arrays(parsed(text))),
    ):
        column = atlas.values(path)
        if column is not None and column.dtype == object:
            atlas.report(not all(right(text) for text in column), code, path, "a row does not hold what it may")


# --- Level 2: references [4, 5, 6] -----------------------------------------------------------------------------


def check_references(atlas: Atlas) -> None:
    stacks, block = atlas.stacks(), columns(atlas, "/block")
    named: Counter = Counter()
    places: dict[str, str] = {}
    for row, name in enumerate(block["stack"]):
        where, path = f"/block[{row}]", join("/stacks", name)
        if path not in stacks:
            atlas.report(True, "E201", where, f"no stack {name!r}")
            continue
        layer, experts = atlas.values(join(path, "layer")), 0
        if stacks[path].attributes["kind"] == "experts":
            experts = atlas.nodes[join(path, "expert")].shape[0]
        place = places.setdefault(path, block["place"][row])
        fits = atlas.nodes[join(path, "channel")].shape[0] == block["n_channels"][row] and experts == block["n_experts"][row]
        inside = 0 <= block["row"][row] < len(layer)
        atlas.report(not (fits and inside and place == block["place"][row]), "E201", where, "not as the stack has it")
        named[path, int(block["row"][row])] += 1
        atlas.report(inside and layer[block["row"][row]] != block["layer_index"][row], "E203", where, "another layer")
        check_tensors(
            atlas,
            where,
            parsed(block["tensors"][row]),
            bool(stacks[path].attributes["gated"]),
            int(block["n_channels"][row]),
            max(1, experts),
        )
    check_widths(atlas, block)
    for path in stacks:
        rows = range(atlas.nodes[join(path, "layer")].shape[0])
        atlas.report(any(named[path, row] != 1 for row in rows), "E202", path, "a row is not named exactly once")
        check_supports(atlas, path)
        check_tokens(atlas, path, places.get(path))
    for group, table in VARIABLES.items():
        for path in stacks if group == "/stacks/*" else [group]:
            for row in table:
                values = atlas.values(join(path, row["name"])) if row["merge"] == "index" else None
                if values is not None and row["name"] not in ("layer", "support"):
                    atlas.report(values != np.arange(len(values)), "E205", join(path, row["name"]), "does not count")
    check_sequences(atlas)
    config = hashlib.sha256(atlas.attribute("/model@config").encode()).hexdigest()
    atlas.report(config != atlas.attribute("/model@config_sha256"), "E210", "/model@config", "changed")
    for name in atlas.attribute("/@dropped").split():
        unknown = name not in STACK or STACK[name]["merge"] == "index"
        atlas.report(unknown or any(join(path, name) in atlas.nodes for path in stacks), "E211", "/@dropped", name)


def columns(atlas: Atlas, group: str) -> dict[str, np.ndarray]:
    """Name to values, for the variables that a group with a table holds."""
    table = VARIABLES["/stacks/*" if parent(group) == "/stacks" else group]
    found = {row["name"]: atlas.values(join(group, row["name"])) for row in table}
    return {name: values for name, values in found.items() if values is not None}


def check_tensors(atlas: Atlas, where: str, slices: list, gated: bool, channels: int, copies: int) -> None:
    roles = Counter(item["role"] for item in slices)
    wanted = {"write", "up"} | ({"gate"} if gated else set())
    wrong = not wanted <= set(roles) <= wanted | {f"{role}_bias" for role in wanted}
    wrong |= any(count != copies for count in roles.values())
    for item in slices:
        if item["axis"] is None:
            wrong |= not item["role"].endswith("_bias")
        else:
            wrong |= item["axis"] < 0 or item["start"] < 0 or item["step"] < 1
            # As len(range(start, stop, step)), which refuses numbers beyond 64 bits.
            wrong |= -((item["start"] - item["stop"]) // max(1, item["step"])) != channels
    atlas.report(wrong, "E204", where, "not whole slices of the FFN's projections")


def check_widths(atlas: Atlas, block: dict[str, np.ndarray]) -> None:
    names, factors = block.get("width_field"), block.get("width_factor")
    wrong = (names is None) != (factors is None) or bool((block.get("channel_parameters", np.ones(1)) < 1).any())
    if names is not None and factors is not None:
        shared: dict[str, set] = {}
        for name, factor, width in zip(names, factors, block["n_channels"], strict=True):
            wrong |= bool(factor < 1 or width % factor) if name else bool(factor)
            if name and factor > 0:
                shared.setdefault(name, set()).add(width // factor)
        wrong |= any(len(found) > 1 for found in shared.values())
    atlas.report(wrong, "E214", "/block", "width fields, factors and widths disagree")


def check_supports(atlas: Atlas, path: str) -> None:
    sizes, chosen, rows = (atlas.values(join(path, name)) for name in ("support", "connectivity", "connectivity_at"))
    if sizes is None and rows is None:
        return
    size = atlas.attribute("/labels@support_size")
    wrong = rows is None or sizes[0] < 1 or (np.diff(sizes) <= 0).any() or size not in sizes
    if not wrong and chosen is not None:
        wrong = not np.array_equal(chosen, rows[list(sizes).index(size)], equal_nan=True)
    atlas.report(wrong, "E212", path, "connectivity is not connectivity_at's row for support_size")


def check_tokens(atlas: Atlas, path: str, place: str | None) -> None:
    tokens, split, correlated = (atlas.values(join(path, name)) for name in ("tokens", "tokens_split", "redundancy_tokens"))
    calibration, length = columns(atlas, "/calibration"), atlas.attribute("/calibration@seq_len")
    most = np.bincount(calibration["split_of"], minlength=len(split))[: len(split)] * length
    most = most.reshape(-1, *[1] * (split.ndim - 1))
    wrong = (tokens != split.sum(axis=0)).any() or (split < 0).any()
    if atlas.nodes[path].attributes["kind"] == "experts":
        wrong |= (split > split.shape[-1] * most).any()
    elif place == "decoder":
        times = np.maximum(1, tokens // max(1, most.sum()))
        wrong |= (split != times * most).any()
    wrong |= correlated is not None and (correlated > tokens).any()
    atlas.report(wrong, "E208", path, "token counts do not agree")


def check_sequences(atlas: Atlas) -> None:
    table, length = columns(atlas, "/calibration"), atlas.attribute("/calibration@seq_len")
    source, count = table["source_of"], len(table["contribution"])
    inside = (source >= 0).all() and (source < count).all()
    rows = np.bincount(source, minlength=count) if inside else None
    wrong = not inside or (rows != table["contribution_sequences"]).any()
    wrong = wrong or (rows * length != table["contribution_tokens"]).any()
    wrong |= "position" in table and len(table["position"]) != length
    wrong |= any(table["split_of"].max() >= atlas.nodes[join(path, "split")].shape[0] for path in atlas.stacks())
    atlas.report(wrong, "E206", "/calibration", "sequences and contributions do not agree")
    for name in ("sequence_sha256", "contribution_id"):
        atlas.report(len(set(table[name])) != len(table[name]), "E207", f"/calibration/{name}", "one occurs twice")
    if "token_ids" in table:
        digests = [hashlib.sha256(row.tobytes()).hexdigest() for row in table["token_ids"]]
        atlas.report(digests != list(table["sequence_sha256"]), "E209", "/calibration/sequence_sha256", "not of token_ids")
    stated = atlas.nodes["/calibration"].attributes.get("special_tokens")
    if stated is not None:
        before, after = special_tokens(stated)
        wrong = len(before) + len(after) >= length
        if not wrong and "token_ids" in table:
            rows = table["token_ids"].tolist()
            wrong = any(row[: len(before)] != before or row[len(row) - len(after) :] != after for row in rows)
        atlas.report(wrong, "E213", "/calibration", "sequences without the special tokens")


# --- Level 3: values [6, 7, 8] ---------------------------------------------------------------------------------


def check_values(atlas: Atlas) -> None:
    settings = atlas.nodes["/labels"].attributes
    shares = all(0 <= settings[name] <= 1 for name in ("rho", "eta", "alpha", "core_rho"))
    positive = settings["support_size"] > 0 and settings["redundancy_top_k"] > 0 and 0 < settings["gamma"] < np.inf
    atlas.report(not (shares and positive), "E308", "/labels", "a setting outside its range")
    for path, limit in (("/calibration@mean_loss", 0), ("/producer@seconds", 0)):
        value = atlas.attribute(path)
        atlas.report(np.isinf(value), "E301", path, "infinite")
        atlas.report(np.isnan(value), "E302", path, "NaN")
        atlas.report(value < limit, "E303", path, "negative")
    known = atlas.attribute("/calibration@metric_definition") == TABLES["metric_definition"]
    atlas.report(not known, "W505", "/calibration@metric_definition", "another definition")
    for path in atlas.stacks():
        check_stack(atlas, path, settings, known, judge=known and shares and positive)


def check_stack(atlas: Atlas, path: str, settings: dict, known_metrics: bool, judge: bool) -> None:
    data = columns(atlas, path)
    tokens = data["tokens"]
    n = tokens.astype(float)[..., None]  # Broadcasts against (layer[, expert], channel), and sums per split.
    reached, sums = n > 0, {name: data[name] for name in SUMS if name in data}

    def report(bad: object, code: str, name: str, message: str) -> None:
        atlas.report(bad, code, join(path, name), message)

    for name, values in data.items():
        if values.dtype.kind == "f":
            report(np.isinf(values), "E301", name, "infinite")
            report(wrong_nan(name, values, reached), "E302", name, "NaN where it is known, or known where it is NaN")
        if name in SHARES:
            report((values < 0) | (values > 1), "E311", name, "outside [0, 1]")
        elif name not in ("sum_u", "sum_q", "layer", "protection", *NEAREST):
            report(values < 0, "E303", name, "negative")
        if name in NEAREST:
            beyond = values >= values.shape[-1] if name == "redundancy_partner" else False
            report((values < -1) | beyond, "E311", name, "neither -1 nor a channel or dimension")
            other = data.get(NEAREST[name])
            report(other is not None and (np.isnan(other) != (values < 0)), "E302", NEAREST[name], "NaN elsewhere than -1 is")
        if name in ("redundancy", "redundancy_null", "redundancy_pair"):
            report(values > MAX_REDUNDANCY, "E311", name, "more than correlation can give")
        if name in (*SUMS, "max_abs_u", "label"):
            report(np.where(reached, 0, values) != 0, "E307", name, "not 0 where no token arrived")
    with np.errstate(all="ignore"):
        report(impossible(data, n), "E304", "sum_u", "no set of tokens has these sums")
        for name, formula in METRICS.items() if known_metrics else ():
            try:
                exact = formula(sums, n)
            except KeyError:  # A sum was dropped.
                continue
            if name in data:
                known = reached & ~np.isnan(data[name])
                away = np.abs(data[name] - exact) > 2 * np.spacing(np.abs(exact).astype(np.float32)).astype(float)
                report(known & away, "E305", name, "does not follow from the sums")
    if "sum_q2_split" in data:
        parts = data["sum_q2_split"]
        report(np.where(data["tokens_split"][..., None] > 0, 0, parts) != 0, "E307", "sum_q2_split", "a split without tokens")
        if "sum_q2" in data:
            apart = ~np.isclose(parts.sum(axis=0), data["sum_q2"], rtol=1e-9, atol=0, equal_nan=True)
            report(apart, "E306", "sum_q2_split", "does not add up to sum_q2")
    if "protection" in data:
        report(np.where(reached, 1, data["protection"]) != 1, "E307", "protection", "not 1 where no token arrived")
    if "label" not in data:
        return
    report(data["label"] > 2, "E311", "label", "none of 0 1 2")
    if judge and settings["score"] in data:
        for ffn in np.argwhere(tokens > 0):
            check_labels(
                report,
                {
                    name: data[name][tuple(ffn)]
                    for name in {settings["score"], "label", "connectivity", "redundancy", "protection"} & set(data)
                },
                settings,
            )


def wrong_nan(name: str, values: np.ndarray, reached: np.ndarray) -> np.ndarray | bool:
    """[6] Where NaN or a number stands that may not stand there."""
    nan = np.isnan(values)
    if name in (*SUMS, *NORMS, "sum_q2_split", "max_abs_u", "protection"):
        return nan
    if name == "read_connectivity":
        return nan.any(axis=-1) & ~nan.all(axis=-1)
    if name == "core_covered":
        reached = reached[..., 0]
    if name in ("redundancy", "redundancy_null", *NEAREST.values()):
        return ~reached & ~nan
    return nan == reached


def impossible(data: dict, n: np.ndarray) -> bool:
    """[15] The inequalities between sums, to 1e-5; float32 keeps max_abs_u to 1.4e-45 at best."""

    def more(low: np.ndarray, high: np.ndarray) -> bool:
        return bool(((low > high * (1 + 1e-5)) & (n > 0)).any())

    s = {name: data.get(name, np.full(1, np.nan)) for name in (*SUMS, "max_abs_u")}  # NaN is never more.
    peak, step = s["max_abs_u"].astype(float), float(np.spacing(np.float32(0)))
    return (
        more(np.abs(s["sum_u"]), np.sqrt(n * s["sum_u2"]))
        or more(np.abs(s["sum_q"]), s["sum_abs_q"])
        or more(s["sum_abs_q"], np.sqrt(n * s["sum_q2"]))
        or more(s["sum_u2"] / n, (peak + step) ** 2)
        or more(np.maximum(peak - step, 0) ** 2, s["sum_u2"])
    )


def share(rate: float, count: int) -> int:
    """[8] floor(rate count), rounded up if less than 1e-12 is missing."""
    return int(np.floor(rate * count * (1 + 1e-12)))


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Indices of the largest values; in a stable sort the lowest index wins a tie, and NaN comes last."""
    return np.argsort(-values.astype(float), kind="stable")[:count]


def check_labels(report: object, ffn: dict, settings: dict) -> None:
    """[8] The labels and [7] the protection of one FFN, (channel,)."""
    score = ffn[settings["score"]]
    label = np.zeros(len(score), dtype=np.uint8)
    label[largest(score, max(1, share(settings["rho"], len(score))))] = 2
    if "connectivity" in ffn:
        others = np.flatnonzero(label == 0)
        label[others[largest(ffn["connectivity"][others], share(settings["eta"], len(others)))]] = 1
    report(label != ffn["label"], "E309", "label", "does not follow from the metrics and settings")
    if "protection" in ffn:
        factor, redundancy = np.ones(len(score)), ffn.get("redundancy", np.full(len(score), np.nan))
        ranked = np.flatnonzero((label == 1) & ~np.isnan(redundancy))
        ranked = ranked[np.argsort(redundancy[ranked], kind="stable")]
        x = np.arange(len(ranked)) / max(1, len(ranked) - 1)
        factor[ranked] = settings["alpha"] + (1 - settings["alpha"]) * (1 - x ** settings["gamma"])
        report(~(np.abs(ffn["protection"] - factor) <= 1e-6), "E310", "protection", "does not follow from redundancy")


# --- Level 4: digests [10] -------------------------------------------------------------------------------------


def content_sha256(atlas: Atlas) -> str:
    digest = hashlib.sha256()

    def add(*texts: str) -> None:
        for text in texts:
            raw = text.encode("utf-8")
            digest.update(len(raw).to_bytes(8, "little") + raw)

    for path, node in sorted(atlas.nodes.items(), key=lambda pair: pair[0][1:]):
        if path == FILE_DIGEST:
            continue
        add("group" if node.type == "group" else "dataset", path)
        if node.type != "group":
            names = ((scale or "").rpartition("/")[2] for scale in node.dimensions)
            add(node.type, ",".join(map(str, node.shape)), ",".join(names))
        for name, value in node.attributes.items():
            if (path, name) == ("/", "content_sha256"):
                continue
            add("attribute", name)
            if isinstance(value, str):
                add("str", value)
            elif isinstance(value, np.ndarray):
                add("u1", ",".join(map(str, value.shape)))
                digest.update(value.tobytes())
            else:
                add("i8" if isinstance(value, int) else "f8", "1")
                digest.update(np.array(value, dtype="<i8" if isinstance(value, int) else "<f8").tobytes())
        if node.type == "str":
            add(*node.values().ravel())
        elif node.type != "group":
            digest.update(node.values().tobytes())
    return digest.hexdigest()


def file_sha256(path: str | Path, offset: int) -> bytes:
    """Digest over the file with the 32 bytes at ``offset`` set to zero."""
    digest, zero = hashlib.sha256(), bytes(32)
    with open(path, "rb") as file:
        left = offset
        while left and (piece := file.read(min(left, 2**20))):
            digest.update(piece)
            left -= len(piece)
        file.seek(32, os.SEEK_CUR)
        digest.update(zero)
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.digest()


def check_digests(atlas: Atlas, path: str | Path) -> None:
    atlas.report(content_sha256(atlas) != atlas.attribute("/@content_sha256"), "E401", "/", "the content was changed")
    stored = atlas.nodes.get(FILE_DIGEST)
    if stored:
        right = stored.shape == (32,) and stored.values().tobytes() == file_sha256(path, stored.id.get_offset())
        atlas.report(not right, "E402", FILE_DIGEST, "the file was changed")


# --- Remarks, and the whole ------------------------------------------------------------------------------------


def remarks(atlas: Atlas) -> None:
    version = atlas.attribute("/@format_version")
    atlas.report(int(version.split(".")[1]) > MINOR, "W501", "/@format_version", f"{version} is newer than {MAJOR}.{MINOR}")
    atlas.report(atlas.attribute("/@status") == "partial", "W503", "/@status", "an unfinished build")
    atlas.report(FILE_DIGEST not in atlas.nodes, "W504", FILE_DIGEST, "missing")
    for path, node in atlas.nodes.items():
        if path.startswith("/x_") and atlas.nodes["/" + path.split("/")[1]].type == "group":
            continue
        group, name = ("/stacks/*", path) if parent(path) == "/stacks" else (path, path.rpartition("/")[2])
        table = VARIABLES.get("/stacks/*" if parent(parent(path)) == "/stacks" else parent(path), [])
        if node.type == "group":
            known, names = group in (*ATTRIBUTES, "/block", "/stacks"), {row["name"] for row in ATTRIBUTES.get(group, [])}
        else:
            known = any(row["name"] == name for row in table)
            names = {"long_name", "units"} | ({"flag_values", "flag_meanings"} if name == "label" else set())
        atlas.report(not known or set(node.attributes) - names, "W502", path, "a name that 1.0 does not know")


def examined(path: str | Path, content: object = None) -> tuple[list[tuple[str, str, str]], object]:
    """The findings, and ``content(atlas)`` if the file has no errors."""
    try:
        size = check_size(path)
        with h5py.File(path, "r", locking=False) as file:
            check_version(file)
            atlas = Atlas(walk(file, size))
            try:
                for level in (check_names, check_references, check_values, lambda atlas: check_digests(atlas, path), remarks):
                    level(atlas)
                    if any(code.startswith("E") for code, _, _ in atlas.found):
                        return atlas.found, None
                return atlas.found, content(atlas) if content else None
            except H5_ERRORS as error:
                return [*atlas.found, ("E014", "/", f"{type(error).__name__}: {error}")], None
    except Invalid as error:
        return [error.args], None
    except H5_ERRORS as error:
        return [("E001", "/", f"{type(error).__name__}: {error}")], None


def validate(path: str | Path) -> list[tuple[str, str, str]]:
    """Every error and remark about a file: (code, path, message)."""
    return examined(path)[0]


def read(path: str | Path) -> dict:
    """The content of a valid file.

    Returns model, calibration, labels and block as dicts of attributes and arrays, and stacks as a dict
    of such dicts. Raises ValueError for an invalid file.
    """

    def content(atlas: Atlas) -> dict:
        groups = {name: {**atlas.nodes[f"/{name}"].attributes} for name in ("model", "calibration", "labels", "block")}
        for name in ("calibration", "block"):
            groups[name] |= columns(atlas, f"/{name}")
        stacks = {name.rpartition("/")[2]: {**node.attributes, **columns(atlas, name)} for name, node in atlas.stacks().items()}
        return {**groups, "stacks": stacks}

    found, result = examined(path, content)
    if result is None:
        raise ValueError(f"{path}: {' '.join(found[0])}")
    return result


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__, file=sys.stderr)
        return 2
    worst = 0
    for path in paths:
        codes = sorted({code for code, _, _ in validate(path)})
        valid = not any(code.startswith("E") for code in codes)
        worst |= not valid
        print(json.dumps({"file": path, "valid": valid, "codes": codes}))
    return int(worst)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
