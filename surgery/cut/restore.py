"""A pruned checkpoint back in its full width: what was kept where it was, zeros where something was removed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.models.safetensors import CheckpointIndex
from surgery.cut.apply import check_output, published, read_config, versions, write_json
from surgery.cut.check import check_logits, check_shapes, memory_shortage
from surgery.cut.checkpoint.cuts import plan_restoration
from surgery.cut.config_width import edit_config
from surgery.cut.stock import meta_shapes
from surgery.planning.file import load_applied
from surgery.result.names import KEPT_FILE, REPORT_FILE

if TYPE_CHECKING:
    from pathlib import Path

RESTORE_FORMAT = "surgery-restore/1"


def restore(
    directory: Path, output: Path, *, overwrite: bool = False, verify: bool = True, shard_bytes: int | None = None
) -> dict[str, Any]:
    """Write the pruned checkpoint in ``directory`` (perhaps trained since) to ``output`` in its full width.

    Every tensor of an FFN holds the pruned model's bits at the channels that were kept and zeros
    elsewhere, so it computes what the pruned model computes.

    Args:
        overwrite, verify, shard_bytes, progress, note: As in `surgery.cut.apply.apply_plan`.

    Returns:
        The content of its ``surgery.json``.

    Raises:
        UsageError: ``directory`` has no kept channels, or ``output`` cannot be written or replaced.
        ModelError: The checkpoint is not what the kept channels were made for.
        CheckError: The result did not pass its checks.
        ChanfmtError: The disk is full or fails.
    """
    check_output(output, overwrite=overwrite, source=directory)
    plan, applied = load_applied(directory / KEPT_FILE)
    index = CheckpointIndex.open(directory)
    cuts = plan_restoration(plan, applied.widths, index)
    before = {tuple(name.split(".")): change.before for name, change in applied.config.items()}
    config = edit_config(read_config(directory), before)
    allowed = {name: frozenset({shape}) for name, shape in meta_shapes(config).items()}
    with published(output, index, cuts, config, shard_bytes) as temporary:
        shapes = check_shapes(index, cuts, allowed, temporary)
        skipped = "--no-verify" if not verify else memory_shortage(CheckpointIndex.open(temporary).parameters)
        logits = check_logits(plan, directory, temporary, mask=False) if skipped is None else None
        if skipped:
            say(f"logits are not compared with the pruned model's: {skipped}")
        report = {
            "format": RESTORE_FORMAT,
            "model": plan.model.id,
            "atlas_sha256": plan.atlas_sha256,
            "tensors": shapes.tensors,
            "relative_error": logits.relative_error if logits else None,
            "versions": versions(),
        }
        write_json(report, temporary / REPORT_FILE)
    return report
