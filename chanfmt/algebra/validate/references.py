"""Level 2: what one part of the file says about another."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.format import schema
from chanfmt.format.records import MAX_INDEX, SpecialTokens, widths_complaint
from chanfmt.format.texts import parsed

if TYPE_CHECKING:
    from chanfmt.algebra.validate.findings import Report
    from chanfmt.format.container import Container

COUNTED = frozenset(
    variable.name
    for table in (
        schema.INDEX_VARIABLES,
        schema.BLOCK_VARIABLES,
        schema.CALIBRATION_VARIABLES,
        schema.PRODUCER_VARIABLES,
    )
    for variable in table
    if variable.merge == "index" and variable.counted
)
"""Indices whose values count from 0."""


def check_references(container: Container, report: Report) -> None:
    """Add breaches of the rules E2.. to ``report``."""
    _indices(container, report)
    _blocks(container, report)
    _calibration(container, report)
    _tokens(container, report)
    config = str(container.attribute("model", "config"))
    report.check(
        hashlib.sha256(config.encode("utf-8", "surrogatepass")).hexdigest() == container.attribute("model", "config_sha256"),
        "E210",
        "/model@config_sha256",
        "is not the SHA-256 of config",
    )
    _dropped(container, report)
    for name in container.children("stacks"):
        _supports(container, report, f"stacks/{name}")


def _indices(container: Container, report: Report) -> None:
    for path, node in container.nodes.items():
        group, _, name = path.rpartition("/")
        known = group in ("calibration", "block", "producer") or group.startswith("stacks/")
        if known and name in COUNTED and node.code == "i4":
            report.check(
                np.array_equal(container.read(path), np.arange(node.shape[0])), "E205", f"/{path}", "does not count 0, 1, 2, ..."
            )


def _blocks(container: Container, report: Report) -> None:
    columns = {
        item.name: container.read(f"block/{item.name}") for item in schema.BLOCK_VARIABLES if f"block/{item.name}" in container
    }
    complaint = widths_complaint(
        columns["n_channels"], *(columns.get(name) for name in ("width_field", "width_factor", "channel_parameters"))
    )
    report.check(not complaint, "E214", "/block", complaint)
    used: Counter[tuple[str, int]] = Counter()
    places: dict[str, str] = {}
    for index in range(len(columns["block"])):
        row = {name: values[index] for name, values in columns.items()}
        where = f"/block row {index}"
        stack = f"stacks/{row['stack']}"
        if not report.check(container.is_group(stack), "E201", where, f"names the stack {row['stack']!r}, which does not exist"):
            continue
        kind, layers = container.attribute(stack, "kind"), container.read(f"{stack}/layer")
        experts = container.nodes[f"{stack}/expert"].shape[0] if kind == "experts" else 0
        channels = container.nodes[f"{stack}/channel"].shape[0]
        there = 0 <= row["row"] < len(layers)
        if there:
            used[row["stack"], int(row["row"])] += 1
        fits = there and row["n_channels"] == channels and row["n_experts"] == experts
        if not report.check(
            fits,
            "E201",
            where,
            f"has row {row['row']}, {row['n_channels']} channels and {row['n_experts']} experts; "
            f"{row['stack']} has {len(layers)} rows, {channels} channels and {experts} experts",
        ):
            continue
        report.check(
            layers[row["row"]] == row["layer_index"] >= 0,
            "E203",
            where,
            f"is layer {row['layer_index']}, but its stack says {layers[row['row']]}",
        )
        slices = parsed(row["tensors"], list[dict[str, Any]], where)
        complaint = tensors_complaint(slices, channels, max(1, experts), gated=bool(container.attribute(stack, "gated")))
        report.check(not complaint, "E204", where, complaint)
        places.setdefault(row["stack"], row["place"])
        report.check(
            places[row["stack"]] == row["place"],
            "E201",
            where,
            f"is in {row['place']}, but other FFNs of its stack are in {places[row['stack']]}",
        )
    for name in container.children("stacks"):
        for row_index in range(container.nodes[f"stacks/{name}/layer"].shape[0]):
            count = used[name, row_index]
            report.check(count == 1, "E202", f"/stacks/{name}", f"row {row_index} is named by {count} rows of the FFN table")


def tensors_complaint(slices: list[dict[str, Any]], channels: int, ffns: int, *, gated: bool) -> str:
    """Complaint about one row of the ``tensors`` column (spec section "FFNs"); empty if the row is right."""
    roles: Counter[str] = Counter()
    for item in slices:
        role, axis, start, stop, step = (item[name] for name in ("role", "axis", "start", "stop", "step"))
        if role not in schema.ROLES:
            return f"has a slice of the role {role!r}"
        roles[role] += 1
        if axis is None:
            if not role.endswith("_bias"):
                return f"has a {role} slice without an axis"
            continue
        if not 0 <= axis < 4 or step < 1 or not 0 <= start <= stop <= MAX_INDEX or -(-(stop - start) // step) != channels:
            return f"has a {role} slice from {start} to {stop} by {step} of axis {axis!r} for {channels} channels"
    expected = {"write": ffns, "up": ffns, "gate": ffns if gated else 0}
    for role, count in expected.items():
        if roles[role] != count:
            return f"has {roles[role]} {role} slices for {count}"
    for role in ("write_bias", "up_bias", "gate_bias"):
        if roles[role] > ffns:
            return f"has {roles[role]} {role} slices for at most {ffns}"
    return ""


def _calibration(container: Container, report: Report) -> None:
    column = {
        item.name: container.read(f"calibration/{item.name}")
        for item in schema.CALIBRATION_VARIABLES
        if f"calibration/{item.name}" in container
    }
    seq_len = int(container.attribute("calibration", "seq_len"))
    source_of, rows = column["source_of"], len(column["contribution"])
    inside = (source_of >= 0) & (source_of < rows)
    report.check(inside.all(), "E206", "/calibration/source_of", f"names a contribution outside 0 to {rows - 1}")
    counts = np.bincount(source_of[inside], minlength=rows)
    report.check(
        np.array_equal(counts, column["contribution_sequences"]),
        "E206",
        "/calibration/contribution_sequences",
        "is not the number of sequences that name the contribution",
    )
    report.check(
        np.array_equal(column["contribution_sequences"] * seq_len, column["contribution_tokens"]),
        "E206",
        "/calibration/contribution_tokens",
        "is not the number of sequences times seq_len",
    )
    if "token_ids" in column:
        report.check(
            column["token_ids"].shape[1] == seq_len,
            "E206",
            "/calibration/token_ids",
            f"has {column['token_ids'].shape[1]} positions, but seq_len is {seq_len}",
        )
        report.check((column["token_ids"] >= 0).all(), "E206", "/calibration/token_ids", "has a negative token id")
        for index, (ids, stated) in enumerate(zip(column["token_ids"], column["sequence_sha256"], strict=True)):
            report.check(
                hashlib.sha256(ids.tobytes()).hexdigest() == stated,
                "E209",
                "/calibration/sequence_sha256",
                f"sequence {index} has another SHA-256",
            )
    _special_tokens(container, report, column.get("token_ids"), seq_len)
    for name in ("sequence_sha256", "contribution_id"):
        repeated = [value for value, count in Counter(column[name]).items() if count > 1]
        report.check(not repeated, "E207", f"/calibration/{name}", f"holds {str(repeated[:1])[:80]} more than once")


def _special_tokens(container: Container, report: Report, token_ids: np.ndarray | None, seq_len: int) -> None:
    stated = container.attribute("calibration", "special_tokens")
    if stated is None:
        return
    where = "/calibration@special_tokens"
    special = SpecialTokens.from_json(str(stated), where)
    length = seq_len if token_ids is None else token_ids.shape[1]
    room = report.check(len(special) < length, "E213", where, f"leaves no place for text in sequences of {length}")
    if token_ids is None or not room:
        return
    begin, end = len(special.before), token_ids.shape[1] - len(special.after)
    right = (token_ids[:, :begin] == special.before).all(axis=1) & (token_ids[:, end:] == special.after).all(axis=1)
    report.check(right.all(), "E213", "/calibration/token_ids", f"has sequence {int(right.argmin())}, which does not {special}")


def _tokens(container: Container, report: Report) -> None:
    seq_len = int(container.attribute("calibration", "seq_len"))
    split_of = container.read("calibration/split_of")
    places = dict(zip(container.read("block/stack"), container.read("block/place"), strict=True))
    for name in container.children("stacks"):
        path = f"stacks/{name}"
        tokens, by_split = container.read(f"{path}/tokens"), container.read(f"{path}/tokens_split")
        splits = by_split.shape[0]
        report.check((split_of < splits).all(), "E208", "/calibration/split_of", f"names a split beyond the {splits} of {name}")
        report.check(np.array_equal(by_split.sum(axis=0), tokens), "E208", f"/{path}/tokens", "is not the sum of tokens_split")
        if f"{path}/redundancy_tokens" in container:
            report.check(
                (container.read(f"{path}/redundancy_tokens") <= tokens).all(),
                "E208",
                f"/{path}/redundancy_tokens",
                "is more than tokens",
            )
        most = np.bincount(split_of, minlength=splits)[:splits] * seq_len
        most = most.reshape(-1, *(1,) * (by_split.ndim - 1))
        exact = places.get(name) == "decoder" and container.attribute(path, "kind") != "experts"
        if exact:
            # An FFN that the model uses n times sees every token n times.
            uses = np.maximum(1, tokens // max(1, int(most.sum())))
            right = (by_split == uses * most).all()
        else:
            # A router may send one token to the same expert in several slots.
            slots = by_split.shape[-1] if container.attribute(path, "kind") == "experts" else 2**32
            right = (by_split >= 0).all() and (by_split <= slots * most).all()
        report.check(
            right,
            "E208",
            f"/{path}/tokens_split",
            f"is {'not' if exact else 'more than'} the tokens of the split's sequences",
        )


def _dropped(container: Container, report: Report) -> None:
    for name in str(container.attribute("", "dropped")).split():
        report.check(name in schema.STACK_VARIABLE_BY_NAME, "E211", "/@dropped", f"names {name!r}, which is not a stack variable")
        for stack in container.children("stacks"):
            report.check(f"stacks/{stack}/{name}" not in container, "E211", "/@dropped", f"names {name!r}, which {stack} holds")


def _supports(container: Container, report: Report, path: str) -> None:
    at = f"{path}/connectivity_at"
    if not report.check((at in container) == (f"{path}/support" in container), "E212", f"/{at}", "and support go together"):
        return
    if at not in container:
        return
    sizes = container.read(f"{path}/support").tolist()
    size = int(container.attribute("labels", "support_size"))
    if not report.check(
        sizes == sorted(set(sizes)) and sizes[0] > 0, "E212", f"/{path}/support", "is not ascending and positive"
    ):
        return
    if (
        report.check(size in sizes, "E212", f"/{path}/support", f"has no {size}, the support_size of the labels")
        and f"{path}/connectivity" in container
    ):
        same = np.array_equal(container.read(at)[sizes.index(size)], container.read(f"{path}/connectivity"), equal_nan=True)
        report.check(same, "E212", f"/{path}/connectivity", f"is not connectivity_at for {size} dimensions")
