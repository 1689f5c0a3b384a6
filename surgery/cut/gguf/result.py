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
from surgery.cut.gguf.convert import check_convertible, check_one_width, converted_values, lay_out_converted
from surgery.cut.gguf.layout import lay_out, places_of
from surgery.cut.gguf.metadata import changed_widths, file_bytes, narrowed
from surgery.cut.gguf.record import GgufRecord
from surgery.cut.gguf.write import write_gguf

if TYPE_CHECKING:
    from pathlib import Path

    from chanfmt.models.gguf_header import Header
    from chanfmt.models.source import ModelSource
    from surgery.cut.config_width import Layout
    from surgery.cut.gguf.layout import GgufLayout
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


def check_gguf_cut(source: ModelSource, plan: PruningPlan, layout: Layout, options: CutOptions) -> None:
    """Raise an error if a GGUF file cannot hold the cut. A recovery takes hours, and this check little time.

    Args:
        layout: How the cut is laid out.

    Raises:
        ModelError: The file does not say a width where llama.cpp reads it, llama.cpp reads one width for all layers and the
            result has several, or the file has no place for a tensor of the result.
    """
    if source.file is None:
        check_one_width(plan, layout.widths)
        return
    header = read_header(source.file)
    changed_widths(header, places_of(header, plan), plan, layout.widths)
    _laid_out(source, header, plan, layout, options, source)


def _laid_out(
    source: ModelSource,
    header: Header,
    plan: PruningPlan,
    layout: Layout,
    options: CutOptions,
    written: ModelSource,
    *,
    refitted: bool = False,
) -> GgufLayout:
    """`lay_out` for the GGUF file of ``source``, with ``header``, that becomes ``written``."""
    assert source.file is not None
    return lay_out(
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


def check_gguf_source(source: ModelSource) -> None:
    """Raise an error if the result of a cut of ``source`` cannot be a GGUF file.

    Raises:
        ModelError: The file is one part of several, or ``source`` is a checkpoint that cannot be converted.
        MissingPackageError: The package gguf is not installed.
    """
    if source.file is None:
        check_convertible(source)
    elif (read_header(source.file).number("split.count") or 1) > 1:
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
        source: The model that was cut: a GGUF file, or a checkpoint that `check_gguf_source` accepted.
        written: The checked cut, with the weights of a recovery, in float32.
        refitted: Whether a recovery changed weights.

    Raises:
        ModelError: llama.cpp has no place for the result.
        CheckError: The file did not pass its checks.
        MissingPackageError: The package gguf is not installed.
        ChanfmtError: The disk is full.
    """
    if source.file is None:
        decided, header = lay_out_converted(source, written, layout.cuts, quant=options.quant, cut_quant=options.cut_quant)
        values = converted_values(written, decided, name, source.id)
    else:
        header = read_header(source.file)
        decided = _laid_out(source, header, plan, layout, options, written, refitted=refitted)
        values = narrowed(header, decided, plan, layout.widths, name)
    for note in decided.notes:
        say(note)
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
        target.name,
        options.quant,
        decided.kinds,
        copied,
        error,
        logits,
        divergence,
        skipped,
        decided.notes,
        options.cut_quant,
        source.file is None,
    )
    before = source.index.nbytes if source.file is None else source.file.stat().st_size
    return WrittenGguf(record, before, target.stat().st_size)
