"""Level 1: names, types, dimensions, attributes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np

from chanfmt.base.errors import AtlasError
from chanfmt.base.hub_ids import is_hub_id
from chanfmt.format import schema
from chanfmt.format.records import SpecialTokens
from chanfmt.format.show import short
from chanfmt.format.texts import configuration, parsed

if TYPE_CHECKING:
    from chanfmt.algebra.validate.findings import Report
    from chanfmt.format.container import Container

TABLES: dict[str, tuple[schema.Variable, ...]] = {
    "calibration": schema.CALIBRATION_VARIABLES,
    "block": schema.BLOCK_VARIABLES,
    "producer": schema.PRODUCER_VARIABLES,
}
GROUPS = ("model", "calibration", "labels", "block", "stacks", "producer")
ALLOWED: dict[str, dict[str, tuple[str, ...]]] = {
    "": {"status": schema.STATUSES},
    "model": {"source": schema.SOURCES},
    "calibration": {"loss": tuple(schema.LOSSES.values())},
    "labels": {"score": tuple(schema.METRIC_BY_NAME), "ties": ("lowest index",)},
    "stacks/*": {"kind": schema.STACK_KINDS},
}
SPECIAL_TOKENS = ("special_tokens", "tokenizer_special_tokens")
"""Attributes of ``/calibration`` that go together."""


def check_structure(container: Container, report: Report) -> None:
    """Add breaches of the rules E1.. to ``report``, and the remarks that concern names and versions."""
    missing = [name for name in GROUPS if not container.is_group(name)]
    for name in missing:
        report.add("E101", f"/{name}", "the group is missing")
    known = _attributes(container, report, "", "/")
    for name in set(GROUPS) - set(missing) - {"stacks", "block"}:
        found = _attributes(container, report, name, f"/{name}")
        if name == "calibration":
            for one, other in itertools.permutations(SPECIAL_TOKENS):
                report.check(one in found or other not in found, "E103", f"/calibration@{one}", f"is missing beside {other}")
    if "block" not in missing:
        _unknown_attributes(container, report, "block", set())
    for name, table in TABLES.items():
        if name not in missing:
            _variables(container, report, name, table, required={item.name for item in table if item.required})
    stacks = container.children("stacks")
    if "stacks" not in missing:
        report.check(stacks, "E101", "/stacks", "there is no stack")
    for name in stacks:
        _stack(container, report, f"stacks/{name}", known)
    for name in container.children(""):
        if name.startswith(schema.EXTENSION_PREFIX):
            _extension(container, report, name)
        elif name not in GROUPS:
            report.add("W502", f"/{name}", "the specification does not know this name")
    if not report.failed:
        _model_id(container, report)
        _texts(container, report)
    _remarks(container, report, known)


def _attributes(container: Container, report: Report, path: str, table: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for attribute in schema.ATTRIBUTES[table]:
        where = f"/{path}@{attribute.name}"
        value = container.attribute(path, attribute.name)
        if not report.check(value is not None or not attribute.required, "E103", where, "the attribute is missing"):
            continue
        if value is None:
            continue
        kind = "str" if isinstance(value, str) else {"i": "int", "f": "float"}.get(np.asarray(value).dtype.kind, "?")
        if not report.check(kind == attribute.type, "E104", where, f"is {kind}, not {attribute.type}"):
            continue
        values[attribute.name] = value
        choices = ALLOWED.get("stacks/*" if table == "/stacks/*" else path, {}).get(attribute.name)
        report.check(choices is None or value in choices, "E109", where, f"is {value!r}, not one of {', '.join(choices or ())}")
    if table == "/stacks/*":
        report.check(values.get("gated", 0) in (0, 1), "E109", f"/{path}@gated", "is neither 0 nor 1")
    _unknown_attributes(container, report, path, {item.name for item in schema.ATTRIBUTES[table]})
    return values


def _unknown_attributes(container: Container, report: Report, path: str, known: set[str]) -> None:
    for name in container.attributes(path):
        # netCDF-4 libraries add this attribute to files that they append to.
        report.check(
            name in known or name == "_NCProperties", "W502", f"/{path}@{name}", "the specification does not know this name"
        )


def _stack(container: Container, report: Report, path: str, root: dict[str, Any]) -> None:
    if not report.check(container.is_group(path), "E101", f"/{path}", "is not a group"):
        return
    values = _attributes(container, report, path, "/stacks/*")
    kind, gated = str(values.get("kind", "dense")), bool(values.get("gated", 0))
    dropped = set(str(root.get("dropped", "")).split())
    required = {
        "layer",
        "channel",
        "split",
        *(item.name for item in schema.STACK_VARIABLES if item.kept),
        *(["expert"] if kind == "experts" else []),
    }
    if root.get("status") == "complete":
        required |= {
            item.name
            for item in schema.STACK_VARIABLES
            if item.required and item.name not in dropped and (gated or not item.gated_only)
        }
    table = (*schema.INDEX_VARIABLES, *schema.STACK_VARIABLES)
    _variables(container, report, path, table, required=required, kind=kind)
    for item in schema.STACK_VARIABLES:
        if item.gated_only and not gated:
            report.check(
                f"{path}/{item.name}" not in container, "E102", f"/{path}/{item.name}", "is there, but the FFNs have no gate"
            )


def _variables(
    container: Container,
    report: Report,
    path: str,
    table: tuple[schema.Variable, ...],
    *,
    required: set[str],
    kind: str = "dense",
) -> None:
    lengths: dict[str, tuple[int, str]] = {}
    for item in table:
        place = f"{path}/{item.name}"
        if place not in container:
            report.check(item.name not in required, "E102", f"/{place}", "the variable is missing")
            continue
        node = container.nodes[place]
        if not report.check(node.code == item.dtype, "E105", f"/{place}", f"is {node.code or 'a group'}, not {item.dtype}"):
            continue
        expected, found = schema.stack_dimensions(item, kind), container.dimensions(place)
        if report.check(found == expected, "E106", f"/{place}", f"has the dimensions {list(found)}, not {list(expected)}"):
            for name, length in zip(expected, node.shape, strict=True):
                known, other = lengths.setdefault(name, (length, item.name))
                report.check(length == known, "E107", f"/{place}", f"has {length} along {name}, but {other} has {known}")
            if expected == (item.name,):
                report.check(container.is_scale(place), "E106", f"/{place}", "is not a dimension scale")
        _variable_attributes(container, report, place, item.units)
    known_names = {item.name for item in table}
    for name in container.children(path):
        report.check(name in known_names, "W502", f"/{path}/{name}", "the specification does not know this name")


def _variable_attributes(container: Container, report: Report, place: str, units: str | None) -> None:
    """Check ``long_name``, units and the flags of labels. None for ``units`` accepts any units."""
    long_name = container.attribute(place, "long_name")
    report.check(isinstance(long_name, str) and long_name, "E108", f"/{place}@long_name", "is missing, or not a text")
    found = container.attribute(place, "units")
    if container.nodes[place].code != "str":
        report.check(
            isinstance(found, str) and (units is None or found == units),
            "E108",
            f"/{place}@units",
            f"is {found!r}, not {units!r}",
        )
    if place.endswith("/label") and place.startswith("stacks/"):
        values = container.attribute(place, "flag_values")
        report.check(
            values is not None and np.ravel(values).tolist() == list(schema.LABELS),
            "E108",
            f"/{place}@flag_values",
            f"is not {list(schema.LABELS)}",
        )
        report.check(
            container.attribute(place, "flag_meanings") == " ".join(schema.LABELS.values()),
            "E108",
            f"/{place}@flag_meanings",
            f"is not {' '.join(schema.LABELS.values())!r}",
        )


def _extension(container: Container, report: Report, path: str) -> None:
    if not report.check(container.is_group(path), "W502", f"/{path}", "an extension is a group"):
        return
    for name in container.children(path):
        place = f"{path}/{name}"
        if container.is_group(place):
            _extension(container, report, place)
            continue
        _variable_attributes(container, report, place, None)
        dimensions = container.dimensions(place)
        report.check(all(dimensions), "E106", f"/{place}", "has an axis without a dimension scale of its group")
        _extension_lengths(container, report, path, place, dimensions)
        if container.is_scale(place):
            continue
        rule = container.attribute(place, "merge")
        fits = rule in schema.EXTENSION_MERGE_RULES and not (rule in ("sum", "max") and container.nodes[place].code == "str")
        report.check(fits, "E111", f"/{place}", f"has the merge rule {rule!r}")


def _extension_lengths(container: Container, report: Report, path: str, place: str, dimensions: tuple[str, ...]) -> None:
    """Check that arrays in ``x_<owner>/<stack>`` have the lengths of that stack."""
    stack = f"stacks/{path.rpartition('/')[2]}"
    for name, length in zip(dimensions, container.nodes[place].shape, strict=True):
        own, of_stack = container.nodes.get(f"{path}/{name}"), container.nodes.get(f"{stack}/{name}")
        if own is not None and own.code:
            report.check(
                own.shape[0] == length, "E107", f"/{place}", f"has {length} along {name}, but its scale has {own.shape[0]}"
            )
        if path.count("/") == 1 and of_stack is not None:
            report.check(
                of_stack.shape[0] == length,
                "E107",
                f"/{place}",
                f"has {length} along {name}, but the stack has {of_stack.shape[0]}",
            )


@dataclass(frozen=True)
class _Slice:
    """One entry of the ``tensors`` column, with every key that the specification asks for."""

    role: str
    tensor: str
    parameter: str
    axis: int | None
    start: int
    stop: int
    step: int
    index: int | None = None


_Arrays = dict[str, tuple[str, list[Annotated[int, msgspec.Meta(gt=0)]]]]
"""Name to type and shape of a sample."""


def _model_id(container: Container, report: Report) -> None:
    """Check that an id that is said to be on the Hub could be there: programs look such an id up."""
    name = str(container.attribute("model", "id"))
    fits = container.attribute("model", "source") != "hub" or is_hub_id(name)
    report.check(fits, "E109", "/model@id", f"is {short(name)!r}, which cannot be the name of a repository on the Hub")


def _texts(container: Container, report: Report) -> None:
    for path, name, kind, what in (
        ("model", "architectures", list[str], "list of texts"),
        ("producer", "versions", dict[str, str], "object of names to texts"),
    ):
        text = str(container.attribute(path, name))
        report.check(_is(text, kind), "E110", f"/{path}@{name}", f"is not a JSON {what}")
    for name in SPECIAL_TOKENS:
        stated = container.attribute("calibration", name)
        report.check(
            stated is None or _are_special_tokens(str(stated)),
            "E110",
            f"/calibration@{name}",
            "is not a JSON object with the lists of token ids before and after",
        )
    config = configuration(str(container.attribute("model", "config")))
    report.check(config is not None, "E110", "/model@config", "is not a JSON object")
    for line in str(container.attribute("producer", "history")).split("\n"):
        report.check(not line or _is(line, dict[str, Any]), "E110", "/producer@history", f"holds the line {line[:40]!r}")
    for row, text in enumerate(container.read("block/tensors")):
        report.check(_is(text, list[_Slice]), "E110", "/block/tensors", f"row {row} is not a JSON list of slices")
    if "calibration/contribution_inputs" in container:
        for row, text in enumerate(container.read("calibration/contribution_inputs")):
            report.check(
                not text or _is(text, _Arrays),
                "E110",
                "/calibration/contribution_inputs",
                f"row {row} is not a JSON object of names to types and shapes",
            )
    for row, place in enumerate(container.read("block/place")):
        report.check(
            place in schema.PLACES, "E109", "/block/place", f"row {row} is {place!r}, not one of {', '.join(schema.PLACES)}"
        )


def _is(text: str, kind: Any) -> bool:
    """Whether ``text`` is JSON of the type ``kind``."""
    try:
        parsed(text, kind, "")
    except AtlasError:
        return False
    return True


def _are_special_tokens(text: str) -> bool:
    try:
        SpecialTokens.from_json(text, "")
    except AtlasError:
        return False
    return True


def _remarks(container: Container, report: Report, root: dict[str, Any]) -> None:
    version = str(root.get("format_version", schema.FORMAT_VERSION))
    if int(version.partition(".")[2]) > int(schema.FORMAT_VERSION.partition(".")[2]):
        report.add("W501", "/@format_version", f"is {version}; this chanfmt knows {schema.FORMAT_VERSION}")
    if root.get("status") == "partial":
        report.add("W503", "/@status", "is partial")
    report.check("producer/file_sha256" in container, "W504", "/producer/file_sha256", "is missing")
