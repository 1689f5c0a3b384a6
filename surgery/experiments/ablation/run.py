"""Measure the conditions of an experiment, row by row, and summarise them."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base import html
from chanfmt.base.errors import UsageError
from chanfmt.base.files import output_path
from chanfmt.base.narrate import progress_bar, say, warn
from chanfmt.format import schema
from surgery.evaluation.perplexity import BlockLosses
from surgery.experiments.ablation.experiment import masses, total
from surgery.experiments.ablation.experiments import kind_of
from surgery.experiments.ablation.store import EXPERIMENT, channels_of, column_names, losses_by_column
from surgery.experiments.ablation.tables import rows_table, summary_table
from surgery.experiments.columns import channels_sha256, finite, losses_of
from surgery.experiments.results import Results, check_directory, claim
from surgery.experiments.spelled import spelled
from surgery.experiments.store import check_store, measured_on, store_columns, store_path
from surgery.experiments.subject import Subject, check_atlas, check_subject, open_subject
from surgery.planning.selectors import by_label

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chanfmt.data.text import Text
    from chanfmt.format.reader import Atlas
    from surgery.evaluation.given import GivenModel
    from surgery.experiments.ablation.experiment import Condition, Experiment

ABLATION_FORMAT = "ablation/1"
MEASURED = ("channels", "supernodes_removed", "lp_removed", "delta_nll", "delta_standard_error")
LOSSES = ("perplexity", "nll", "standard_error", "tokens", "seconds")


@dataclass(frozen=True, eq=False, repr=False)
class Ablation:
    """A finished experiment.

    Attributes:
        experiment: Its conditions.
        results: All rows in the directory of the results, which may hold rows of other conditions too.
        rows: The rows of the conditions in their order, the dense model first.
        summary: Means by group, or what `Experiment.summarise` computes.
    """

    experiment: Experiment
    results: Results
    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]

    def __repr__(self) -> str:
        return f"<Ablation {self.experiment.name!r}: {len(self.rows)} rows>"

    def _repr_html_(self) -> str:
        return html.table(*summary_table(self.summary)) + html.table(*self.table())

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Headings and rows for people, the dense model first."""
        return rows_table(self.experiment, self.rows)


def ablate(
    atlas: Atlas,
    experiment: str,
    model: Subject | GivenModel | None = None,
    text: str | os.PathLike[str] | Text = "wikitext2",
    *,
    seq_len: int = 2048,
    max_tokens: int = 0,
    device: str = "auto",
    device_map: str | None = None,
    dtype: str = "auto",
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    store: str | os.PathLike[str] | None = None,
    replace: bool = False,
    **options: Any,
) -> Ablation:
    """Measure what the removal of chosen channels costs, with controls.

    The channels are masked in one loaded model, which has its own weights, device and mode afterwards.

    Args:
        atlas: Atlas of the model, open.
        experiment: ``remove``, ``mean-replace``, ``halo``, ``dose``, ``channels`` or ``weights``.
        model: As for `surgery.experiments.sweep.sweep`; a `Subject` saves the loading.
        text: As for `surgery.experiments.sweep.sweep`.
        seq_len: Tokens in a block, at least 2.
        max_tokens: Tokens of the text to use at most; 0 means all.
        device, device_map, dtype: For a model that is loaded here.
        output: Directory for ``results.csv`` and ``results.json``; rows that it holds are not measured again. None keeps
            the rows in memory.
        overwrite: Drop the rows that ``output`` holds.
        store: Atlas to write with the measured losses of the experiment ``channels`` as columns: a new file, or the file of
            ``atlas``. None writes none.
        replace: Whether losses that ``atlas`` has already are replaced.
        options: Options of the experiment, by the names of `RemovalOptions`, `HaloOptions`, `DoseOptions`,
            `ChannelOptions` or `WeightOptions`. An option that takes a list separated by commas on the command line takes a sequence here.

    Returns:
        Rows with the loss in nats per token and its rise over the reference of the condition, and their summary.

    Raises:
        UsageError: An option has no meaning, or the rows in ``output`` were measured differently.
        AtlasError: The atlas is unfinished, or lacks what the experiment needs.
        ModelError: The model cannot be loaded, or it is not the model of the atlas.
        TypeError: The experiment has no such option.
        KeyboardInterrupt: Ctrl-C. Finished rows stay in ``output``.
    """
    kind = kind_of(experiment)
    chosen = spelled(kind.options, options)
    if store is not None and experiment != EXPERIMENT:
        raise UsageError(
            f"{experiment} removes several channels at once, so no channel has a loss to store",
            hint=f"store the losses of the experiment {EXPERIMENT}",
        )
    target = None if store is None else store_path(store, atlas)
    directory = None if output is None else output_path(output)
    if directory is not None:
        # The model may be downloaded below. A fault in the output directory should show before that.
        check_directory(directory, ABLATION_FORMAT, overwrite=overwrite)
    check_subject(model, text, seq_len=seq_len, max_tokens=max_tokens, device=device, device_map=device_map, dtype=dtype)
    check_atlas(atlas)
    planned = kind.plan(atlas, chosen)
    for warning in planned.warnings:
        warn(warning)
    with claim(directory), claim(target):
        if target is not None:
            # A damaged file must not get a new, valid digest.
            atlas.verify()
        subject = open_subject(
            atlas, model, text, seq_len=seq_len, max_tokens=max_tokens, device=device, device_map=device_map, dtype=dtype
        )
        if target is not None:
            about = measured_on(subject.identity)
            check_store(atlas, subject, column_names(planned), channels_of(planned), about, replace=replace)
        found = run(atlas, subject, planned, directory, overwrite=overwrite)
        if target is not None:
            store_columns(atlas, target, losses_by_column(planned, found.rows[1:]), about, "ablate", subject.identity)
        return found


def run(
    atlas: Atlas, subject: Subject, experiment: Experiment, directory: Path | None = None, *, overwrite: bool = False
) -> Ablation:
    """Measure every condition of ``experiment`` that ``directory`` has no row for, the dense model first.

    Args:
        directory: Directory of the results; None to keep them in memory.
        overwrite: Drop the rows that ``directory`` holds.

    Raises:
        UsageError: The rows in ``directory`` were measured differently.
        KeyboardInterrupt: Ctrl-C; the text says which rows stay.
    """
    columns = (*experiment.key, *experiment.extra, *MEASURED, *experiment.concluded, *LOSSES)
    identity = subject.identity | {"experiment": experiment.name} | dict(experiment.identity)
    results = Results(directory, ABLATION_FORMAT, identity, columns, experiment.key, overwrite=overwrite)
    core, mass = by_label(atlas, schema.LABEL_SUPERNODE), masses(atlas)
    dense = experiment.dense
    digests = {
        id(item): channels_sha256(item.removed, experiment.means, "".join(map(str, item.weights)))
        for item in (dense, *experiment.conditions)
    }

    def found(condition: Condition) -> dict[str, Any] | None:
        return results.find(condition.key, digests[id(condition)])

    pending = [item for item in (dense, *experiment.conditions) if found(item) is None]
    done = len(digests) - len(pending)
    if done:
        say(f"{directory} already has {done} of {len(digests)} rows")
    try:
        with progress_bar(len(subject.token_ids) * len(pending), "tok", experiment.name) as bar:
            for condition in pending:
                losses = results.losses(digests[id(condition)])
                if losses is None:
                    losses = subject.measure(condition.removed, experiment.means, bar.update, zeroed=condition.weights)
                else:
                    bar.update(len(subject.token_ids))
                row: dict[str, Any] = {**condition.key, **condition.extra, **losses} | {
                    "channels": int(total(condition.removed)),
                    "supernodes_removed": int(total({index: mask & core[index] for index, mask in condition.removed.items()})),
                    "lp_removed": total(condition.removed, mass),
                    "channels_sha256": digests[id(condition)],
                }
                reference = row if condition is dense else found(condition.reference or dense)
                # References are measured first, so their rows exist.
                assert reference is not None
                row |= _difference(row, reference)
                results.add(row | (dict.fromkeys(experiment.concluded) if condition is dense else experiment.conclude(row)))
    except KeyboardInterrupt:
        raise results.interrupted() from None
    rows = [there for item in (dense, *experiment.conditions) if (there := found(item)) is not None]
    summary = experiment.summarise(rows[1:]) if experiment.summarise else _means(rows[1:], experiment.groups)
    results.write(summary=summary)
    return Ablation(experiment, results, rows, summary)


def _difference(row: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, Any]:
    """Rise of the loss over that of ``reference``, on the same blocks of tokens."""
    losses, before = losses_of(row), losses_of(reference)
    # On the same blocks, the difference of the means is the mean of the differences. This gives its standard error too.
    gaps = BlockLosses(losses.nll - before.nll, losses.predicted)
    return {"delta_nll": gaps.mean, "delta_standard_error": finite(gaps.standard_error)}


def _means(rows: Sequence[Mapping[str, Any]], groups: tuple[str, ...]) -> list[dict[str, Any]]:
    """Means by ``groups``, over layers and seeds."""
    alike: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        alike[tuple(row[name] for name in groups)].append(row)
    return [
        dict(zip(groups, key, strict=True))
        | {
            "rows": len(some),
            "channels": float(np.mean([row["channels"] for row in some])),
            "supernodes_removed": float(np.mean([row["supernodes_removed"] for row in some])),
            "lp_removed": float(np.mean([row["lp_removed"] for row in some])),
            "delta_nll": float(np.mean([row["delta_nll"] for row in some])),
            "median_delta_nll": float(np.median([row["delta_nll"] for row in some])),
            "perplexity": finite(float(np.exp(np.mean([row["nll"] for row in some])))),
        }
        for key, some in alike.items()
    ]
