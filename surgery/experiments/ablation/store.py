"""Put the measured losses of single channels into an atlas, as well-known columns with their standard errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra.columns import About, shape_of, with_columns
from chanfmt.algebra.rewrite import check_finished, noted
from chanfmt.base.errors import UsageError
from chanfmt.base.files import output_path
from chanfmt.base.narrate import say
from chanfmt.base.text import one_line
from chanfmt.format.columns import COLUMN_BY_NAME, OWNER
from chanfmt.format.writer import write_atlas

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from chanfmt.format.reader import Atlas
    from chanfmt.format.records import AtlasContent
    from surgery.experiments.ablation.experiment import Experiment
    from surgery.experiments.subject import Subject

EXPERIMENT = "channels"
"""The experiment that removes one channel at a time."""
ZERO, MEAN = "ablation_loss", "mean_ablation_loss"
_REPLACE = "add --replace to replace it, or choose another file for --store"


def column_names(experiment: Experiment) -> tuple[str, str]:
    """The columns of the loss that ``experiment`` measures, and of its standard error."""
    name = f"{OWNER}/{ZERO if experiment.means is None else MEAN}"
    return name, f"{name}_error"


def store_path(store: str | os.PathLike[str], atlas: Atlas) -> Path:
    """The path of the atlas to write. Raises `UsageError` if another file is there, or the directory does not exist."""
    path = output_path(store)
    if path.exists() and not (atlas.path.exists() and path.samefile(atlas.path)):
        raise UsageError(
            f"{path} exists, and is not the atlas that was given", hint="choose another file for --store, or the atlas itself"
        )
    if not path.absolute().parent.is_dir():
        raise UsageError(f"the directory {path.absolute().parent} does not exist", hint="create it, or choose another --store")
    return path


def measured_on(identity: Mapping[str, Any]) -> str:
    """What losses were measured on, in one line. Losses with the same line may be compared."""
    # The digest is that of all tokens, so that two texts of one name are told apart.
    return (
        f"measured on {one_line(str(identity['data']), 200)}, {identity['tokens']} tokens in blocks of {identity['seq_len']} "
        f"(SHA-256 {identity['tokens_sha256'][:12]}), {identity['dtype']}"
    )


def check_store(atlas: Atlas, subject: Subject, experiment: Experiment, *, replace: bool) -> None:
    """Raise the errors of `store_losses` that show before anything is measured.

    Raises:
        UsageError: The model was passed in memory; or the atlas has losses that were measured differently, or of a channel that
            ``experiment`` measures.
    """
    identity = subject.identity
    if subject.source is None:
        raise UsageError(
            "losses of a model in memory cannot be stored, because nothing shows that it is the atlas's model",
            hint="pass the directory or the name of the model",
        )
    if replace:
        return
    held = [metric for stack in atlas.stacks.values() for metric in stack.extension_metrics]
    for name in column_names(experiment):
        for metric in held:
            if metric.name == name and metric.long_name != _described(name, identity):
                raise UsageError(
                    f"the atlas has {name} already, and it was measured differently: {one_line(metric.long_name, 300)}",
                    hint=_REPLACE,
                )
    name = column_names(experiment)[0]
    for condition in experiment.conditions:
        for index, mask in condition.removed.items():
            block = atlas.blocks[index]
            stack = atlas.stacks[block.stack]
            if name in stack and np.isfinite(stack.row(name, block.row)[mask]).any():
                raise UsageError(
                    f"the atlas has a measured loss of channel {condition.key['channel']} of layer {block.layer_index} already",
                    hint="add --replace to measure it again, or choose other channels",
                )


def with_losses(
    content: AtlasContent,
    experiment: Experiment,
    rows: Sequence[Mapping[str, Any]],
    identity: Mapping[str, Any],
    *,
    replace: bool = False,
) -> AtlasContent:
    """``content`` with the rises of the loss in ``rows``, beside those that it has; NaN for a channel that nobody measured.

    Args:
        experiment: The experiment `EXPERIMENT`.
        rows: The rows of its conditions, in their order.
        identity: What the rows have in common, as `Subject.identity`.
        replace: Whether a column that was measured differently is dropped first. Values measured alike are kept in any case,
            if they are not in ``rows``.
    """
    check_finished(content)
    stacks = {stack.name: stack for stack in content.stacks}
    blocks = {block.index: block for block in content.blocks}
    for name, value in zip(column_names(experiment), ("delta_nll", "delta_standard_error"), strict=True):
        arrays = _held(content, name, _described(name, identity))
        for condition, row in zip(experiment.conditions, rows, strict=True):
            [(index, mask)] = condition.removed.items()
            block = blocks[index]
            if block.stack not in arrays:
                arrays[block.stack] = np.full(shape_of(stacks[block.stack]), np.nan, dtype=np.float64)
            arrays[block.stack][block.row][mask] = np.nan if row[value] is None else row[value]
        content = with_columns(content, {name: arrays}, About(description=_described(name, identity)), replace=True)
    names = {name: measured_on(identity) for name in column_names(experiment)}
    # A model is named by its fingerprint in the atlas, and a text by its name and tokens.
    about = {key: identity[key] for key in ("data", "tokens", "tokens_sha256", "seq_len", "dtype")}
    return noted(content, "ablate", [identity["atlas_sha256"]], columns=names, channels=len(rows), **about)


def store_losses(
    atlas: Atlas,
    path: Path,
    experiment: Experiment,
    rows: Sequence[Mapping[str, Any]],
    identity: Mapping[str, Any],
    *,
    replace: bool = False,
) -> str:
    """Write ``atlas`` as ``path``, with the losses in ``rows``; see `with_losses`. Returns the new ``content_sha256``.

    The file is written beside ``path`` and renamed, so that an atlas of that name is whole at every moment.
    """
    digest = write_atlas(with_losses(atlas.content(), experiment, rows, identity, replace=replace), path, overwrite=True)
    say(f"wrote {path}: {', '.join(column_names(experiment))} of {len(rows)} channels; a merge leaves them out")
    return digest


def _described(name: str, identity: Mapping[str, Any]) -> str:
    return f"{COLUMN_BY_NAME[name].long_name}; {measured_on(identity)}"


def _held(content: AtlasContent, name: str, description: str) -> dict[str, np.ndarray]:
    """The arrays of the column ``name`` that have this description, by stack, float64."""
    owner, _, own = name.partition("/")
    groups = {group.path: group for group in content.extensions}
    return {
        stack.name: np.array(item.values, dtype=np.float64)
        for stack in content.stacks
        if (group := groups.get(f"{owner}/{stack.name}")) is not None
        for item in group.variables
        if item.name == own and item.long_name == description
    }
