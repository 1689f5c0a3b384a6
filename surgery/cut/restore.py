"""Put a pruned checkpoint back into its full width: kept channels in their old places, zeros in place of the others."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from chanfmt.base.claims import claimed
from chanfmt.base.errors import UsageError
from chanfmt.base.files import output_path
from chanfmt.base.inputs import input_path
from chanfmt.base.narrate import say
from chanfmt.models.source import ModelSource
from surgery.cut.apply import check_output, published, versions
from surgery.cut.carried import write_json
from surgery.cut.check import NotCheckedError, check_logits, check_shapes
from surgery.cut.checkpoint.cuts import plan_restoration
from surgery.cut.config_width import ADDED, edit_config
from surgery.cut.dtype_field import config_in_dtype
from surgery.cut.options import CUT_DEFAULTS, CutOptions
from surgery.cut.relocate import relocated
from surgery.cut.source import plain_config
from surgery.cut.stock import meta_shapes
from surgery.planning.file import load_applied
from surgery.result.names import KEPT_FILE, REPORT_FILE

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping
    from pathlib import Path

RESTORE_FORMAT = "surgery-restore/1"


@dataclass(frozen=True)
class Restored:
    """A pruned model that was put back into its full width.

    Attributes:
        model: The dense model, as the plan names it.
        atlas_sha256: ``content_sha256`` of the plan's atlas.
        tensors: Tensors of the checkpoint.
        relative_error: max|difference| / max|logits| between the pruned and the restored model; None if it was not measured.
        versions: Package to version.
    """

    model: str
    atlas_sha256: str
    tensors: int
    relative_error: float | None
    versions: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """The content of ``surgery.json``."""
        return {"format": RESTORE_FORMAT, **asdict(self)}


def restore(
    source: ModelSource,
    output: str | os.PathLike[str],
    options: CutOptions = CUT_DEFAULTS,
    *,
    kept: str | os.PathLike[str] | None = None,
) -> Restored:
    """Write the pruned checkpoint ``source``, perhaps trained since, to the directory ``output`` in its full width.

    Every tensor of an FFN holds the pruned model's bits at the kept channels and zeros elsewhere. The restored model
    therefore computes what the pruned model computes. Its tensors may have other names, shards and dtypes than in the
    result that was cut, as after ``save_pretrained``. What the cut dropped (code files, extra layers) does not come back.

    Args:
        source: A result of `surgery.cut.prune` or `surgery.cut.apply`, or a model that was trained from one.
        options: How the restored model is written and checked. ``fine_tune`` and ``extra_layers`` have no meaning
            here.
        kept: The list of kept channels, ``kept_channels.safetensors``, or the directory of the result that holds it; None for
            the list in ``source``.

    Raises:
        UsageError: ``source`` has no list of kept channels, or ``output`` cannot be written or replaced.
        ModelError: The checkpoint does not fit the list of kept channels.
        CheckError: The result did not pass its checks.
        ChanfmtError: The disk is full or fails.
    """
    directory = output_path(output)
    check_output(directory, overwrite=options.overwrite, source=source.directory)
    plan, applied = load_applied(_kept_file(source, kept))
    options.check()
    pruned = plain_config(source)
    plan = relocated(plan, source.index, pruned)
    extra = [block for block in plan.extra if all(item.tensor in source.index.tensors for item in block.tensors)]
    if gone := [block.module for block in plan.extra if block not in extra]:
        say(f"{gone[0]} is not in the checkpoint any more, so it is not restored (transformers does not save it again)")
    cuts = plan_restoration(replace(plan, blocks=(*plan.blocks, *extra)), applied.widths, source.index)
    added = {name for name in ADDED if name in applied.config and applied.config[name].before is None}
    before = {tuple(name.split(".")): change.before for name, change in applied.config.items() if name not in added}
    dense = {name: value for name, value in edit_config(pruned, before).items() if name not in added}
    config = config_in_dtype(dense, options.dtype)
    allowed = {name: frozenset({shape}) for name, shape in meta_shapes(config).items()}
    with claimed(directory), published(directory, source.index, cuts, config, options) as temporary:
        written = ModelSource(temporary)
        shapes = check_shapes(source.index, cuts, allowed, written, options.dtype)
        logits, skipped = None, "--no-verify"
        if options.verify:
            try:
                logits = check_logits(plan, source, written, mask=False, rounded=options.dtype)
            except NotCheckedError as error:
                skipped = error.message
        if logits is None:
            say(f"logits are not compared with the pruned model's: {skipped}")
        restored = Restored(
            plan.model.id, plan.atlas_sha256, shapes.tensors, logits.relative_error if logits else None, versions()
        )
        write_json(restored.to_json(), temporary / REPORT_FILE)
    return restored


def _kept_file(source: ModelSource, kept: str | os.PathLike[str] | None) -> Path:
    """The file that lists the kept channels. Raises `UsageError` if there is none."""
    path = source.directory / KEPT_FILE if kept is None else input_path(kept)
    if path.is_dir():
        path = path / KEPT_FILE
    if path.is_file():
        return path
    if kept is None:
        raise UsageError(
            f"{source.directory} has no {KEPT_FILE}, which says what was cut (transformers does not save it again)",
            hint="name a result of surgery prune or apply; if it was trained and saved again, add the result before the training: "
            "--kept RESULT",
        )
    raise UsageError(f"{path} does not exist", hint=f"--kept takes a result of surgery, or its {KEPT_FILE}")
