"""Make the result of a cut a GGUF file, in place of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chanfmt.base.errors import ModelError
from chanfmt.base.files import check_space
from chanfmt.base.narrate import progress_bar, say
from chanfmt.models.gguf_header import read_header
from surgery.cut.check import NotCheckedError
from surgery.cut.gguf.check import check_computed, check_stored
from surgery.cut.gguf.layout import lay_out, places_of
from surgery.cut.gguf.metadata import changed_widths, file_bytes, narrowed
from surgery.cut.gguf.record import GgufRecord
from surgery.cut.gguf.write import write_gguf
from surgery.cut.options import not_a_gguf_file

if TYPE_CHECKING:
    from pathlib import Path

    from chanfmt.models.source import ModelSource
    from surgery.cut.checkpoint.cuts import Widths
    from surgery.cut.config_width import Layout
    from surgery.cut.options import CutOptions
    from surgery.planning.plan import PruningPlan


@dataclass(frozen=True)
class WrittenGguf:
    """A GGUF file that was written and checked.

    Attributes:
        record: Its record.
        bytes_before, bytes_after: Bytes of the source file, and of this file.
    """

    record: GgufRecord
    bytes_before: int
    bytes_after: int


def check_gguf_widths(source: ModelSource, plan: PruningPlan, widths: Widths) -> None:
    """Raise an error if a GGUF file cannot say the widths of the cut. A recovery takes hours, and this check no time.

    Args:
        widths: Name of every FFN to its width in the result.

    Raises:
        ModelError: The file does not say a width where llama.cpp reads it, or llama.cpp reads one width for all layers and the
            result has several.
    """
    assert source.file is not None
    header = read_header(source.file)
    changed_widths(header, places_of(header, plan), plan, widths)


def check_gguf_source(source: ModelSource) -> None:
    """Raise an error if the result of a cut of ``source`` cannot be a GGUF file.

    Raises:
        UsageError: ``source`` is not a GGUF file.
        ModelError: The file is one part of several.
    """
    if source.file is None:
        raise not_a_gguf_file(source.id)
    if (read_header(source.file).number("split.count") or 1) > 1:
        raise ModelError(f"{source.file} is one part of several", hint="merge them first: llama-gguf-split --merge FIRST OUT")


def write_result(
    directory: Path,
    name: str,
    plan: PruningPlan,
    layout: Layout,
    source: ModelSource,
    written: ModelSource,
    options: CutOptions,
    *,
    refitted: bool,
) -> WrittenGguf:
    """Write the cut ``written`` as the GGUF file ``NAME.gguf`` in ``directory``, and check it.

    Args:
        name: Name of the model.
        layout: How ``written`` is laid out.
        source: The model that was cut, from a GGUF file.
        written: The checked cut, with the weights of a recovery, in float32.
        refitted: Whether a recovery changed weights.

    Raises:
        ModelError: llama.cpp has no place for the result.
        CheckError: The file did not pass its checks.
        MissingPackageError: The package gguf is not installed.
        ChanfmtError: The disk is full.
    """
    assert source.file is not None
    header = read_header(source.file)
    decided = lay_out(
        source.file,
        header,
        plan,
        layout.cuts,
        source.index,
        written.index,
        quant=options.quant,
        cut_quant=options.cut_quant,
        refitted=refitted,
    )
    for note in decided.notes:
        say(note)
    values = narrowed(header, decided, plan, layout.widths, name)
    target = directory / f"{name}.gguf"
    check_space(directory, file_bytes(values, decided, header.alignment))
    with progress_bar(decided.nbytes, "B", "writing GGUF") as bar:
        error = write_gguf(source.file, header, decided, values, written.index, target, bar.update)
    check_stored(source.file, target, decided, values)
    logits = divergence = None
    skipped = "--no-verify"
    if options.verify:
        try:
            logits, divergence = check_computed(target, decided, plan, written, quant=options.quant is not None)
            skipped = ""
        except NotCheckedError as reason:
            skipped = reason.message
    if skipped:
        say(f"the GGUF file's logits are not compared with those of the cut: {skipped}")
    copied = sum(item.copied for item in decided.tensors)
    record = GgufRecord(
        target.name, options.quant, decided.kinds, copied, error, logits, divergence, skipped, decided.notes, options.cut_quant
    )
    return WrittenGguf(record, source.file.stat().st_size, target.stat().st_size)
