"""How much of each channel its peers already say: R^2 of its value u from the other channels of its FFN, and the null."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from chanfmt.analysis.chance import turn_offset
from chanfmt.base import html
from chanfmt.base.errors import ModelError, UsageError
from chanfmt.base.narrate import progress_bar, say, warn
from chanfmt.format import schema
from chanfmt.format.columns import REPLACEABILITY, REPLACEABILITY_NULL
from chanfmt.models.find.intercept import Interceptor
from chanfmt.models.frozen import frozen
from chanfmt.models.run import run_text, usual_batch
from surgery.experiments.regression import Moments, explained
from surgery.experiments.results import claim
from surgery.experiments.store import check_store, measured_on, store_columns, store_path
from surgery.experiments.subject import Subject, check_atlas, check_subject, open_subject
from surgery.planning.addresses import chosen_layers, parse_number
from surgery.planning.selectors import select

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    from chanfmt.data.text import Text
    from chanfmt.format.reader import Atlas
    from chanfmt.models.ffn import FFN
    from surgery.evaluation.given import GivenModel

COLUMNS = (REPLACEABILITY, REPLACEABILITY_NULL)
PARTS = 4
"""Sequences go in turn to two parts that maps are fitted to, one that chooses the penalty, and one that judges."""
BUDGET = 2 << 30
"""Bytes of moments at a time. If the FFNs need more, the text runs through the model again."""


@dataclass(frozen=True)
class ReplaceabilityOptions:
    """Which channels are predicted, from which peers."""

    select: tuple[str, ...] = field(
        default=("supernodes+halo",),
        metadata={
            "help": "channels to predict, as for --protect; top:lp=100%% means every channel; repeat for more",
            "metavar": "SELECTOR",
            "repeat": True,
        },
    )
    layers: str | None = field(default=None, metadata={"help": "predict channels of these layers only", "metavar": "LAYERS"})
    peers: str = field(
        default="all",
        metadata={
            "help": "channels of the same FFN that predict a channel: all others, or the N whose u correlates most with its u",
            "metavar": "all|N",
        },
    )
    skip_first: int = field(
        default=1,
        metadata={
            "help": "tokens at the beginning of each block that are left out, because few channels are huge there",
            "metavar": "N",
        },
    )

    def peer_count(self) -> int | None:
        """Number of peers; None for all. Raises `UsageError`."""
        return None if self.peers == "all" else parse_number(self.peers, "all or a number of peers")


@dataclass(frozen=True, eq=False, repr=False)
class Replaceability:
    """What was found.

    Attributes:
        values, null: Block index to R^2, float64 of `Block.shape`; NaN for a channel that was not predicted.
        rows: One row per FFN and label, JSON-ready.
        identity: Model, text and options, JSON-ready.
    """

    values: Mapping[int, np.ndarray]
    null: Mapping[int, np.ndarray]
    rows: Sequence[Mapping[str, Any]]
    identity: Mapping[str, Any]

    def __repr__(self) -> str:
        return f"<Replaceability of {sum(int(np.isfinite(found).sum()) for found in self.values.values()):,} channels>"

    def _repr_html_(self) -> str:
        return html.table(*self.table())

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows for people."""
        headings = ["layer", "stack", "label", "channels", "R^2", "smallest", "largest", "null"]
        return headings, [
            [
                str(row["layer"]),
                row["stack"],
                row["label"],
                str(row["channels"]),
                *("-" if row[name] is None else f"{row[name]:.3f}" for name in ("median", "smallest", "largest", "null_median")),
            ]
            for row in self.rows
        ]


def replaceability(
    atlas: Atlas,
    model: Subject | GivenModel | None = None,
    text: str | os.PathLike[str] | Text = "wikitext2",
    options: ReplaceabilityOptions | None = None,
    *,
    seq_len: int = 2048,
    max_tokens: int = 0,
    device: str = "auto",
    device_map: str | None = None,
    dtype: str = "auto",
    store: str | os.PathLike[str] | None = None,
    replace: bool = False,
) -> Replaceability:
    """Measure how well the channels that ``options`` select are predicted by their peers (`surgery.experiments.regression.explained`).

    The blocks of the text are dealt in turn to `PARTS` parts. The null takes the u of the channel from another block, turned by
    an offset, so it has the same distribution and nothing to do with the peers. Routed experts are left out: their tokens do not
    form sequences.

    Args:
        model, text, seq_len, max_tokens, device, device_map, dtype: As for `open_subject`.
        store: Atlas to write with the results as the columns `COLUMNS`: a new file, or the file of ``atlas``.
        replace: Whether values that ``atlas`` has already are replaced.

    Raises:
        UsageError: An option has no meaning, there are too few blocks, or ``store`` cannot be written.
        AtlasError: The atlas is unfinished, or lacks what a selector needs.
        ModelError: The model cannot be loaded, or is not the model of the atlas.
    """
    options = options or ReplaceabilityOptions()
    peers = options.peer_count()
    if peers is not None and peers < 1:
        raise UsageError(f"--peers must be all or at least 1, not {peers}")
    if options.skip_first < 0 or seq_len - options.skip_first < 2:
        raise UsageError(f"--skip-first {options.skip_first} leaves fewer than two tokens of a block of {seq_len}")
    check_subject(model, text, seq_len=seq_len, max_tokens=max_tokens, device=device, device_map=device_map, dtype=dtype)
    check_atlas(atlas)
    masks = _masks(atlas, options)
    target = None if store is None else store_path(store, atlas)
    with claim(target):
        if target is not None:
            # A damaged file must not get a new, valid digest.
            atlas.verify()
        subject = open_subject(
            atlas, model, text, seq_len=seq_len, max_tokens=max_tokens, device=device, device_map=device_map, dtype=dtype
        )
        how = f"from {'all other channels' if peers is None else f'the {peers} most correlated channels'}"
        about = measured_on(subject.identity, f"{how}, without the first {options.skip_first} tokens of a block")
        _leave_out(masks, subject.ffns)
        if target is not None:
            check_store(atlas, subject, COLUMNS, masks, about, replace=replace)
        values, null = _predict(subject, {index: mask for index, mask in masks.items() if mask.any()}, peers, options.skip_first)
        if target is not None:
            store_columns(
                atlas, target, dict(zip(COLUMNS, (values, null), strict=True)), about, "replaceability", subject.identity
            )
    identity = subject.identity | {"select": list(options.select), "peers": options.peers, "skip_first": options.skip_first}
    return Replaceability(values, null, _rows(atlas, values, null), identity)


def _masks(atlas: Atlas, options: ReplaceabilityOptions) -> dict[int, np.ndarray]:
    """Block index to the channels to predict, bool of `Block.shape`. Raises `UsageError` if there are none."""
    layers = chosen_layers(options.layers, atlas)
    masks = {block.index: np.zeros(block.shape, dtype=bool) for block in atlas.blocks}
    for selector in options.select:
        found, warnings = select(selector, atlas)
        for warning in warnings:
            warn(warning)
        for block in atlas.blocks:
            if block.layer_index in layers:
                masks[block.index] |= found[block.index]
    if not any(mask.any() for mask in masks.values()):
        raise UsageError("no channel is selected", hint="choose other channels with --select, or other --layers")
    return masks


def _leave_out(masks: dict[int, np.ndarray], ffns: Mapping[int, FFN]) -> None:
    """Empty the masks of FFNs whose tokens do not form sequences. Raises `UsageError` if nothing is left."""
    odd = [index for index, mask in masks.items() if mask.any() and (ffns[index].experts or ffns[index].uses > 1)]
    for index in odd:
        masks[index] = np.zeros_like(masks[index])
    if not any(mask.any() for mask in masks.values()):
        raise UsageError(
            "all selected channels are those of routed experts, or of FFNs that the model uses several times; their tokens do not "
            "form sequences",
            hint="select channels of dense FFNs or shared experts",
        )
    if odd:
        say(f"note: {len(odd)} FFNs with routed experts, or that the model uses several times, are left out")


def _predict(
    subject: Subject, masks: Mapping[int, np.ndarray], peers: int | None, skip: int
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """R^2 and its null of the channels in ``masks``, by block index."""
    count = len(subject.token_ids) // subject.seq_len
    if count < PARTS:
        raise UsageError(
            f"the text has {count} whole blocks of {subject.seq_len} tokens, and at least {PARTS} are needed",
            hint="choose a smaller --seq-len, a larger --max-tokens, or a longer text",
        )
    fitted = sum(1 for block in range(count) if block % PARTS < PARTS - 1) * (subject.seq_len - skip)
    widest = max(mask.shape[-1] for mask in masks.values())
    if peers is None and fitted < 2 * widest:
        warn(f"only {fitted} tokens fit maps from {widest} channels, so R^2 is low; measure on more text, or choose --peers 64")
    values: dict[int, np.ndarray] = {}
    null: dict[int, np.ndarray] = {}
    with progress_bar(count * len(masks), "FFN blocks", "replaceability") as bar, frozen(subject.model):
        for group in _groups(masks):
            found = {index: _Collected(np.flatnonzero(masks[index]), masks[index].shape[-1], skip) for index in group}
            _collect(subject, found, count, lambda blocks: bar.update(blocks * len(found)))  # noqa: B023
            for index, collected in found.items():
                own = collected.own.cpu().numpy()
                fit, more, choose, judge = map(collected.moments, range(PARTS))
                # Together, because the factors of the peers' moments are the same for a channel and for its null.
                both = explained(fit + more, choose, judge, np.tile(own, 2), peers)
                for result, found_there in zip((values, null), np.split(both, 2), strict=True):
                    result[index] = np.full(masks[index].shape, np.nan)
                    result[index][own] = found_there
    return values, null


def _groups(masks: Mapping[int, np.ndarray]) -> list[list[int]]:
    """The blocks, in groups whose moments fit into `BUDGET`; at least one block in each."""
    groups: list[list[int]] = [[]]
    room = BUDGET
    for index, mask in masks.items():
        width, chosen = mask.shape[-1], int(mask.sum())
        needed = 8 * PARTS * width * (width + chosen)
        if groups[-1] and needed > room:
            groups.append([])
            room = BUDGET
        groups[-1].append(index)
        room -= needed
    return groups


class _Collected:
    """The moments of one FFN, in every part, and those of its targets in the null. All sums are float64, on the device of u.

    Attributes:
        own: The channels to predict, (t,).
        width: Number of channels, m.
    """

    def __init__(self, own: np.ndarray, width: int, skip: int) -> None:
        self.own = torch.from_numpy(own)
        self.width, self._skip = width, skip
        self._sums: list[list[torch.Tensor]] = []
        self._tokens = [0] * PARTS
        self._turned = 0

    def add(self, u: torch.Tensor, parts: Sequence[int]) -> None:
        """Add u (sequence, token, m) of sequences that belong to ``parts``; two or more, so that each has another for the null."""
        u = u[:, self._skip :].double()
        if not self._sums:
            self.own = self.own.to(u.device)
            m, t = self.width, len(self.own)
            shapes = ((m,), (m, m), (t,), (t,), (m, t))
            self._sums = [[u.new_zeros(shape) for shape in shapes] for _ in range(PARTS)]
        others = u[..., self.own].roll(1, 0)
        length = u.shape[1]
        for x, other, part in zip(u, others, parts, strict=True):
            turned = other.roll(turn_offset(self._turned, length, min(1, length - 1)), 0)
            self._turned += 1
            self._tokens[part] += length
            for total, more in zip(
                self._sums[part], (x.sum(0), x.T @ x, turned.sum(0), turned.square().sum(0), x.T @ turned), strict=True
            ):
                total += more

    def moments(self, part: int) -> Moments:
        """The `Moments` of a part. The targets are the channels themselves, and then, for the null, the channels in other sequences."""
        inputs, products, targets, squares, cross = (total.cpu().numpy() for total in self._sums[part])
        own = self.own.cpu().numpy()
        return Moments(
            self._tokens[part],
            inputs,
            products,
            np.concatenate([inputs[own], targets]),
            np.concatenate([products.diagonal()[own], squares]),
            np.concatenate([products[:, own], cross], axis=1),
        )


def _collect(subject: Subject, found: Mapping[int, _Collected], count: int, progress: Callable[[int], object]) -> None:
    """Run the model on the first ``count`` whole blocks of the text, and add what it computes to ``found``."""
    model, length = subject.model, subject.seq_len
    device = next(model.parameters()).device
    ids = torch.from_numpy(subject.token_ids[: count * length]).long().view(count, length)
    size = max(2, usual_batch(device, length))
    # A batch of one would have no other sequence.
    starts = [start for start in range(0, count, size) if count - start > 1]
    caught: dict[int, torch.Tensor] = {}
    interceptor = Interceptor(model)
    for index in found:
        interceptor.on(subject.ffns[index].members[0].write.matrix, before=partial(caught.__setitem__, index))
    with torch.no_grad(), interceptor:
        for place, start in enumerate(starts):
            stop = count if place == len(starts) - 1 else start + size
            caught.clear()
            run_text(model, ids[start:stop].to(device))
            for index, collected in found.items():
                if index not in caught or caught[index].numel() != (stop - start) * length * collected.width:
                    raise ModelError(
                        f"the FFN {subject.ffns[index].container} did not read every token once, so its tokens form no sequences",
                        hint="leave out its layer with --layers",
                    )
                collected.add(caught[index].view(stop - start, length, -1), [number % PARTS for number in range(start, stop)])
            progress(stop - start)


def _rows(atlas: Atlas, values: Mapping[int, np.ndarray], null: Mapping[int, np.ndarray]) -> list[dict[str, Any]]:
    """One row for each FFN and each label that has a channel with a result, JSON-ready."""
    rows = []
    for block, stack in atlas.rows():
        if block.index not in values:
            continue
        label = stack.row("label", block.row)
        for number, name in sorted(schema.LABELS.items(), reverse=True):
            found = values[block.index][(label == number) & np.isfinite(values[block.index])]
            chance = null[block.index][(label == number) & np.isfinite(null[block.index])]
            if len(found):
                rows.append(
                    {
                        "layer": block.layer_index,
                        "stack": block.stack,
                        "label": name,
                        "channels": len(found),
                        "median": float(np.median(found)),
                        "smallest": float(found.min()),
                        "largest": float(found.max()),
                        "null_median": float(np.median(chance)) if len(chance) else None,
                    }
                )
    return rows
