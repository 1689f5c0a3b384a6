"""Merge atlases of one model: sums are added, everything else is derived again (spec section "Merging")."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra import metrics
from chanfmt.algebra.columns import with_columns
from chanfmt.algebra.driving import Driving, sequence_numbers
from chanfmt.algebra.rewrite import check_complete, dropped_names, label_variables, noted
from chanfmt.base.errors import AtlasError, UsageError
from chanfmt.base.narrate import say
from chanfmt.format import schema
from chanfmt.format.extensions import ExtensionMerge, added
from chanfmt.format.reader import Atlas
from chanfmt.format.records import (
    AtlasContent,
    Block,
    CalibrationRecord,
    LabelSettings,
    ModelRecord,
    ProducerRecord,
    StackData,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.format.reader import Stack

_REBUILD = "build one of them again with this chanfmt"
_ABOUT_WIDTHS = ("width_field", "width_factor", "channel_parameters")
"""Columns of the FFN table that atlases of an older chanfmt lack."""
_RESET = "build one of them again with the settings of the other"
_CALIBRATION = {
    "loss": "they differentiate different losses",
    "metric_definition": "their metrics are defined differently",
    "tokenizer": "their text was tokenized differently",
    "seq_len": "their sequences have different lengths",
}
_MODEL_HINTS = {
    "dtype": "build both with the same --dtype",
    "revision": "build both with the same --revision",
    "id": "the name is part of what must agree: build both from the same MODEL, named the same way",
    "source": "build both from the same MODEL",
}
_LABEL_FLAGS = {"rho": "--rho", "eta": "--eta", "support_size": "--support", "alpha": "--alpha", "gamma": "--gamma"}


def merge(atlases: Sequence[Atlas]) -> AtlasContent:
    """Merge ``atlases`` into one atlas of all their sequences; their order does not matter.

    The merged arrays and the arrays of one input are in memory at a time. The digest of every input is checked while it
    is read. Without the weights, the result has no halo (`chanfmt.algebra.relabel.relabelled_with_weights` adds it).

    Args:
        atlases: Two or more open, complete atlases of one model on different sequences.

    Raises:
        UsageError: Fewer than two atlases.
        AtlasError: The atlases do not merge: they have different models, settings, losses or shapes, they share sequences or
            contributions, one holds no sums, or a file is damaged.
    """
    if len(atlases) < 2:
        raise UsageError(
            f"a merge needs at least two atlases, not {len(atlases)}",
            hint="name the atlases of all the parts: atlas merge A.h5 B.h5 -o ALL.h5",
        )
    # One set of files gives one result: the first atlas in this order decides everything that must be decided.
    ordered = sorted(atlases, key=lambda atlas: min(row.id for row in atlas.calibration.contributions))
    for atlas in ordered:
        _check_mergeable(atlas)
    _check_disjoint(ordered)
    for atlas in ordered[1:]:
        _check_agreement(ordered[0], atlas)
    arrays, extensions, driving = _accumulated(ordered)
    first = ordered[0]
    stacks = [
        StackData(
            stack.name,
            stack.kind,
            stack.gated,
            stack.activation,
            stack.layers,
            stack.n_channels,
            stack.n_experts,
            stack.splits,
            arrays[name] | metrics.derive_metrics(arrays[name], arrays[name]["tokens"]),
        )
        for name, stack in first.stacks.items()
    ]
    lost = {name for atlas in ordered for stack in atlas.stacks.values() for name in stack.variables}
    lost |= {name for atlas in ordered for name in atlas.dropped}
    content = AtlasContent(
        title=first.title,
        model=first.model,
        calibration=_calibration(ordered),
        labels=first.labels,
        core_rho=first.labels.rho,
        blocks=_blocks(ordered),
        stacks=tuple(stacks),
        producer=_producer(ordered),
        extensions=extensions.groups(),
    )
    check_complete(content, first.labels.score)
    content = with_columns(content, driving)
    stacks = [
        dataclasses.replace(stack, variables={**stack.variables, **label_variables(stack.variables, first.labels)})
        for stack in stacks
    ]
    dropped = dropped_names(lost, stacks)
    _narrate(ordered, extensions)
    return noted(
        dataclasses.replace(content, stacks=tuple(stacks), dropped=dropped),
        "merge",
        [atlas.content_sha256 for atlas in ordered],
        [atlas.hub_source for atlas in ordered],
    )


def _check_mergeable(atlas: Atlas) -> None:
    """Refuse an atlas that does not hold everything that a merge adds up."""
    if atlas.status != "complete":
        raise AtlasError(
            f"{atlas.path} is partial: it comes from an unfinished build", hint="finish it with: atlas build ... --resume"
        )
    for stack in atlas.stacks.values():
        missing = [variable.name for variable in schema.STACK_VARIABLES if variable.additive and variable.name not in stack]
        if missing:
            more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
            raise AtlasError(
                f"{atlas.path} holds no {missing[0]}{more} for {stack.name}, so it cannot be merged",
                hint="it was stripped; merge the atlas that it was made from"
                if "lp" in stack
                else "it was made from an importance matrix; merge atlases of atlas build",
            )


def _check_disjoint(atlases: Sequence[Atlas]) -> None:
    """Refuse text that would count twice."""
    digests: dict[str, Atlas] = {}
    contributions: dict[str, Atlas] = {}
    for atlas in atlases:
        other = digests.setdefault(atlas.content_sha256, atlas)
        if other is not atlas:
            raise AtlasError(f"{other.path} and {atlas.path} are the same atlas", hint="name each atlas once")
    for atlas in atlases:
        for row in atlas.calibration.contributions:
            other = contributions.setdefault(row.id, atlas)
            if other is not atlas:
                raise AtlasError(
                    f"{other.path} and {atlas.path} both hold the contribution {_short(row.id)} ({_short(row.source)})",
                    hint="merge atlases of different builds, and leave out an atlas that is already part of another",
                )
    seen: dict[str, Atlas] = {}
    for atlas in atlases:
        shared: dict[Any, int] = {}
        for digest in atlas.calibration.sequence_sha256:
            owner = seen.setdefault(digest, atlas)
            if owner is not atlas:
                shared[owner.path] = shared.get(owner.path, 0) + 1
        for path, count in shared.items():
            raise AtlasError(
                f"{path} and {atlas.path} share {count} of {atlas.calibration.sequences} calibration sequences, "
                "which would count twice",
                hint="build one of them on other text, or with another --seed",
            )


def _check_agreement(first: Atlas, other: Atlas) -> None:
    """Refuse atlases with different models, definitions, shapes or label settings."""
    both = f"{first.path} and {other.path}"
    for field in ("fingerprint", "config_sha256", *(item.name for item in dataclasses.fields(ModelRecord))):
        mine, theirs = getattr(first.model, field), getattr(other.model, field)
        if mine != theirs:
            raise AtlasError(
                f"{both} are of different models: {field} is {_short(mine)} in one and {_short(theirs)} in the other",
                hint=_MODEL_HINTS.get(field, "only atlases of one model merge; to compare two models, use: atlas compare"),
            )
    for field, what in _CALIBRATION.items():
        mine, theirs = getattr(first.calibration, field), getattr(other.calibration, field)
        if mine != theirs:
            raise AtlasError(f"{both} do not merge: {what} ({_short(mine)} and {_short(theirs)})", hint=_RESET)
    if not first.calibration.begins_like(other.calibration):
        raise AtlasError(
            f"{both} do not merge: the sequences of one {first.calibration.ends}, and those of the other {other.calibration.ends}",
            hint="build both with this chanfmt and the same --bos",
        )
    _check_blocks(first, other, both)
    if first.stacks.keys() != other.stacks.keys():
        raise AtlasError(f"{both} hold different stacks: {', '.join(first.stacks)} and {', '.join(other.stacks)}", hint=_REBUILD)
    for name, stack in first.stacks.items():
        _check_stack(stack, other.stacks[name], both)
    for item in dataclasses.fields(LabelSettings):
        field = item.name
        mine, theirs = getattr(first.labels, field), getattr(other.labels, field)
        if mine != theirs:
            hint = _RESET
            if field in _LABEL_FLAGS:
                flags = " ".join(
                    f"{flag} {getattr(first.labels, key)}"
                    for key, flag in _LABEL_FLAGS.items()
                    if getattr(first.labels, key) != getattr(other.labels, key)
                )
                hint = f"relabel one first: atlas label {shlex.quote(str(other.path))} {flags} -o FILE"
            raise AtlasError(
                f"{both} were labelled with different settings: {field} is {_short(mine)} in one "
                f"and {_short(theirs)} in the other",
                hint=hint,
            )


def _check_blocks(first: Atlas, other: Atlas, both: str) -> None:
    if len(first.blocks) != len(other.blocks):
        raise AtlasError(f"{both} have {len(first.blocks)} and {len(other.blocks)} FFNs", hint=_REBUILD)
    for mine, theirs in zip(first.blocks, other.blocks, strict=True):
        for item in dataclasses.fields(Block):
            if item.name in _ABOUT_WIDTHS and not (_says(mine, item.name) and _says(theirs, item.name)):
                continue
            if getattr(mine, item.name) != getattr(theirs, item.name):
                raise AtlasError(
                    f"{both} describe FFN {mine.index} differently: {item.name} is {_short(getattr(mine, item.name))} in "
                    f"one and {_short(getattr(theirs, item.name))} in the other",
                    hint=_REBUILD,
                )


def _says(block: Block, name: str) -> bool:
    """Whether the atlas of ``block`` has the column ``name``, which an older chanfmt did not write."""
    return bool(block.channel_parameters) if name == "channel_parameters" else block.width_field is not None


def _blocks(atlases: Sequence[Atlas]) -> tuple[Block, ...]:
    """The FFNs of the merged atlas. What sets their widths comes from the first atlas that says it."""
    blocks = []
    for rows in zip(*(atlas.blocks for atlas in atlases), strict=True):
        known = {
            name: next((getattr(row, name) for row in rows if _says(row, name)), getattr(rows[0], name)) for name in _ABOUT_WIDTHS
        }
        blocks.append(dataclasses.replace(rows[0], **known))
    return tuple(blocks)


def _check_stack(mine: Stack, theirs: Stack, both: str) -> None:
    for field in ("kind", "gated", "activation", "n_channels", "n_experts", "splits"):
        if getattr(mine, field) != getattr(theirs, field):
            raise AtlasError(
                f"{both} differ in the stack {mine.name}: {field} is {_short(getattr(mine, field))} in one and "
                f"{_short(getattr(theirs, field))} in the other",
                hint=_REBUILD,
            )
    if not np.array_equal(mine.layers, theirs.layers):
        raise AtlasError(f"{both} differ in the layers of the stack {mine.name}", hint=_REBUILD)


def _accumulated(
    atlases: Sequence[Atlas],
) -> tuple[dict[str, dict[str, np.ndarray]], ExtensionMerge, dict[str, dict[str, np.ndarray]]]:
    """Per stack, the arrays that ``atlases`` add up, take the maximum of or agree on; the merged extensions; the driving tokens.

    The driving tokens are as `with_columns` takes them.
    """
    names = {
        name: [
            variable
            for variable in schema.STACK_VARIABLES
            if variable.additive or (variable.merge == "equal" and all(variable.name in atlas.stacks[name] for atlas in atlases))
        ]
        for name in atlases[0].stacks
    }
    arrays: dict[str, dict[str, np.ndarray]] = {}
    extensions: ExtensionMerge | None = None
    driving: dict[str, Driving] = {}
    for stated, numbers in zip(atlases, sequence_numbers(atlases), strict=True):
        # Open the file again: closing it frees its arrays, and the digest shows whether the file has changed.
        with Atlas.open(stated.file, verify=True, contained=True) as atlas:
            if atlas.content_sha256 != stated.content_sha256:
                raise AtlasError(f"{stated.path} changed while it was being merged", hint="merge again")
            found = {name: held.renumbered(numbers) for name, stack in atlas.stacks.items() if (held := Driving.of(stack))}
            if extensions is None:
                driving = found
                extensions = ExtensionMerge(atlas.extensions())
                arrays = {name: {variable.name: atlas.stacks[name][variable.name] for variable in names[name]} for name in names}
                continue
            extensions.add(atlas.extensions())
            driving = {name: held.joined(found[name]) for name, held in driving.items() if name in found}
            for name, variables in names.items():
                for variable in variables:
                    _combine(arrays[name], variable, atlas.stacks[name][variable.name], (atlases[0], atlas))
    assert extensions is not None
    columns: dict[str, dict[str, np.ndarray]] = {}
    for stack_name, held in driving.items():
        for name, values in held.arrays().items():
            columns.setdefault(name, {})[stack_name] = values
    return arrays, extensions, columns


def _combine(totals: dict[str, np.ndarray], variable: schema.Variable, values: np.ndarray, pair: tuple[Atlas, Atlas]) -> None:
    """Combine ``values`` of the second atlas of ``pair`` with ``totals`` by the variable's merge rule."""
    total = totals[variable.name]
    if variable.merge == "max":
        np.maximum(total, values, out=total)
    elif variable.merge == "equal":
        if total.tobytes() != values.tobytes():
            raise AtlasError(
                f"{pair[0].path} and {pair[1].path} disagree about {variable.name}, which must be equal for one model",
                hint="build both with the same chanfmt on the same kind of machine",
            )
    else:
        result = added(total, values)
        if result is None:
            raise AtlasError(f"adding {variable.name} of {pair[1].path} overflows", hint="check the files with: atlas validate")
        totals[variable.name] = result


def _calibration(atlases: Sequence[Atlas]) -> CalibrationRecord:
    """Contributions in the order of their ids, and sequences in the order of their SHA-256 (spec section "Calibration")."""
    records = [atlas.calibration for atlas in atlases]
    rows = sorted((row.id, part, index) for part, record in enumerate(records) for index, row in enumerate(record.contributions))
    position = {(part, index): row for row, (_, part, index) in enumerate(rows)}
    sequences = sorted(
        (digest, part, index) for part, record in enumerate(records) for index, digest in enumerate(record.sequence_sha256)
    )
    sources = []
    for _, part, index in sequences:
        source = position.get((part, int(records[part].source_of[index])))
        if source is None:
            raise AtlasError(
                f"{atlases[part].path} says that sequence {index} came from a contribution that it does not list",
                hint="check it with: atlas validate",
            )
        sources.append(source)
    stored = [record.token_ids for record in records]
    first = records[0]
    # Older atlases do not state their special tokens. They merge with the others only if there are none.
    stating = next((record for record in records if record.special_tokens is not None), first)
    return CalibrationRecord(
        loss=first.loss,
        metric_definition=first.metric_definition,
        tokenizer=first.tokenizer,
        seq_len=first.seq_len,
        seed=first.seed,
        mean_loss=sum(record.mean_loss * record.sequences for record in records) / len(sequences),
        sequence_sha256=tuple(digest for digest, _, _ in sequences),
        source_of=np.array(sources, dtype=np.int32),
        split_of=np.array([records[part].split_of[index] for _, part, index in sequences], dtype=np.uint8),
        contributions=tuple(records[part].contributions[index] for _, part, index in rows),
        token_ids=None
        if any(ids is None for ids in stored)
        else np.stack([ids[index] for _, part, index in sequences if (ids := stored[part]) is not None]),
        special_tokens=stating.special_tokens,
        tokenizer_special_tokens=stating.tokenizer_special_tokens,
    )


def _producer(atlases: Sequence[Atlas]) -> ProducerRecord:
    records = [atlas.producer for atlas in atlases]
    return ProducerRecord(
        versions=records[0].versions,
        command=records[0].command,
        hardware=" + ".join(dict.fromkeys(name for record in records for name in record.hardware.split(" + "))),
        seconds=sum(record.seconds for record in records),
        peak_memory_bytes=max(record.peak_memory_bytes for record in records),
        history=tuple(line for record in records for line in record.history),
    )


def _narrate(atlases: Sequence[Atlas], extensions: ExtensionMerge) -> None:
    if any(dict(atlas.producer.versions) != dict(atlases[0].producer.versions) for atlas in atlases):
        say(
            f"note: the atlases were built with different versions of packages; the result states the versions of {atlases[0].path}"
        )
    without = [str(atlas.path) for atlas in atlases if atlas.calibration.token_ids is None]
    if 0 < len(without) < len(atlases):
        say(f"note: the token ids are left out, because they are not in {', '.join(without)}")
    if extensions.lost:
        say(f"note: extension arrays that do not merge are left out: {', '.join(extensions.lost)}")


def _short(value: Any) -> str:
    """A value of a file as text, short enough for a sentence."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:24]}...{text[-24:]}"
