"""Write an atlas anew from others: merged, or with other labels. Atlases and models are files here, or on the Hub."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from typing import TYPE_CHECKING, NamedTuple

from chanfmt.algebra.merge import merge
from chanfmt.algebra.relabel import relabelled, relabelled_with_weights
from chanfmt.algebra.rewrite import noted
from chanfmt.base.claims import claimed
from chanfmt.base.files import check_target, output_path
from chanfmt.base.narrate import say
from chanfmt.format.writer import write_atlas
from chanfmt.hub.locate import locate_model, model_name, opened
from chanfmt.models.source import ModelSource, own_revision
from chanfmt.models.stored.weights import StoredWeights

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable
    from pathlib import Path

    from chanfmt.format.reader import Atlas
    from chanfmt.format.records import AtlasContent, LabelSettings, ModelRecord

    Given = Atlas | str | os.PathLike[str]
    Model = ModelSource | str | os.PathLike[str]


class Relabelled(NamedTuple):
    """An atlas that was labelled again.

    Attributes:
        before, after: Its content with the old and with the new labels.
        content_sha256: Digest of the file that was written.
    """

    before: AtlasContent
    after: AtlasContent
    content_sha256: str


def write_merged(
    atlases: Iterable[Given],
    output: str | os.PathLike[str],
    *,
    model: Model | None = None,
    overwrite: bool = False,
) -> Path:
    """Write one atlas of the sums of several: `chanfmt.algebra.merge.merge`.

    Args:
        atlases: Two or more, open or by name.
        output: File to write.
        model: The model that was measured. Its weights give connectivity and the halo, which do not merge.
        overwrite: Whether an existing ``output`` is replaced.

    Returns:
        ``output`` as a path.

    Raises:
        UsageError: There are too few atlases, or ``output`` cannot be written.
        AtlasError: An atlas cannot be read, or does not merge with the first one.
        ModelError: ``model`` is not the model that was measured.
        HubError: A file on the Hub cannot be fetched.
    """
    target = output_path(output)
    check_target(target, overwrite=overwrite)
    with claimed(target):
        with contextlib.ExitStack() as stack:
            content = merge([stack.enter_context(opened(atlas)) for atlas in atlases])
        if model is not None:
            content = relabelled_with_weights(content, content.labels, _weights(model, content.model))
        write_atlas(content, target, overwrite=overwrite)
    _narrate_merge(content, target, with_weights=model is not None)
    return target


def _narrate_merge(content: AtlasContent, target: Path, *, with_weights: bool) -> None:
    """Say what the merged atlas lacks, what that changes, and how to get it back."""
    if content.dropped:
        say(f"note: dropped {', '.join(content.dropped)}")
    if "connectivity" in content.dropped and not with_weights:
        say(
            "note: there is no halo; compute connectivity and the halo from the weights with: "
            f"atlas label {shlex.quote(str(target))} --model MODEL --overwrite"
        )
    if "redundancy" in content.dropped:
        say(
            "note: the protection factor is 1 everywhere, because only a build measures redundancy: scar-prot and scar-conn rank "
            "channels as scar-lp does; to measure it on all texts, build one atlas: atlas build MODEL --calib A --calib B"
        )


def write_relabelled(
    atlas: Given,
    output: str | os.PathLike[str],
    changes: dict[str, float],
    *,
    model: Model | None = None,
    overwrite: bool = False,
) -> Relabelled:
    """Write ``atlas`` with the labels of other settings: `chanfmt.algebra.relabel.relabelled`.

    Args:
        output: File to write. It may be the file of ``atlas``, with ``overwrite``.
        changes: Fields of `chanfmt.format.records.LabelSettings` to new values; the other fields stay.
        model: The model that was measured. Its weights give connectivity for the new settings.
        overwrite: Whether an existing ``output`` is replaced.

    Raises:
        UsageError: A setting is out of range or cannot be changed, or ``output`` cannot be written.
        AtlasError: The atlas cannot be read, is damaged, or is unfinished.
        ModelError: ``model`` is not the model that was measured.
        HubError: A file on the Hub cannot be fetched.
    """
    target = output_path(output)
    check_target(target, overwrite=overwrite)
    with claimed(target):
        return _relabel(atlas, target, changes, model, overwrite=overwrite)


def _relabel(atlas: Given, target: Path, changes: dict[str, float], model: Model | None, *, overwrite: bool) -> Relabelled:
    # Verify first: a damaged file must not get a new, valid digest.
    with opened(atlas, verify=True) as source:
        before, digest, address = source.content(), source.content_sha256, source.hub_source
    settings: LabelSettings = dataclasses.replace(before.labels, **changes)  # type: ignore[arg-type]
    details: dict[str, object] = {"labels": {name: getattr(settings, name) for name in SETTINGS}}
    if model is None:
        after = relabelled(before, settings)
    else:
        settings.check()
        after = relabelled_with_weights(before, settings, _weights(model, before.model))
        details["weights"] = before.model.fingerprint
    lost = [name for name in after.dropped if name not in before.dropped]
    if lost:
        say(f"note: dropped {', '.join(lost)}, which have no meaning with the new settings")
    if "redundancy" in lost:
        say("note: the protection factor is 1 everywhere, because only a build measures redundancy")
    if after.core_rho != settings.rho:
        say(
            f"note: connectivity and redundancy still refer to the top {after.core_rho:.4g} of channels; "
            "add --model to compute connectivity again"
        )
    written = write_atlas(noted(after, "label", [digest], [address], **details), target, overwrite=overwrite)
    return Relabelled(before, after, written)


SETTINGS = ("rho", "eta", "support_size", "alpha", "gamma")
"""The fields of `chanfmt.format.records.LabelSettings` that labelling again can change."""


def _weights(model: Model, record: ModelRecord) -> StoredWeights:
    if not isinstance(model, ModelSource):
        name = model_name(model)
        model = locate_model(name, revision=own_revision(name, record))
    return StoredWeights.of(model, record)
