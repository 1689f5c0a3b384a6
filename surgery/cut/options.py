"""How a cut is written: the options of `surgery.cut.prune`, `surgery.cut.apply` and `surgery.cut.restore`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chanfmt.base.choices import unknown
from chanfmt.base.errors import UsageError
from chanfmt.models.gguf_header import WRITABLE
from surgery.planning.formats import FORMATS, GGUF, SAFETENSORS, check_layout_of_format
from surgery.planning.layouts import LAYOUTS

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Dtypes that a result can have, as torch and as safetensors name them."""
QUANTS = tuple(WRITABLE)
"""Types that the matrices of a GGUF file can be written in."""
EXTRA_LAYERS = {
    "cut": "they are narrowed too, by the norms of their own weights",
    "drop": "they are left out, and their number in config.json becomes 0",
}
"""What can be done with layers that stock transformers does not load."""


@dataclass(frozen=True)
class CutOptions:
    """How a cut is written and checked.

    Attributes:
        overwrite: Whether an earlier result in the output directory is replaced.
        verify: Whether logits are compared with those of the masked dense model. Shapes are always checked.
        fine_tune: Whether the model is a fine-tune of the plan's model: other weights in the same tensors.
        shard_bytes: Largest size of a weights file in bytes; None for files that correspond to the model's.
        extra_layers: What becomes of layers in the files that stock transformers does not load and that have the width of an
            FFN that is cut: ``cut`` or ``drop`` (`EXTRA_LAYERS`); None to refuse such a cut.
        dtype: Float that the tensors are rounded to: ``float32``, ``bfloat16`` or ``float16``; None to leave them as stored.
        allow_padding: Whether the cut is made although the file shrinks by less than half of what was asked, because zero
            channels take the place of removed ones.
        layout: Layout in place of the plan's, a key of `surgery.planning.layouts.LAYOUTS`; None for the plan's.
        format: Format of the result, one of `surgery.planning.formats.FORMATS`. ``gguf`` needs a GGUF file as the source, or a
            checkpoint that `surgery.cut.gguf.convert` can write.
        quant: Type of all matrices of a GGUF file, one of `QUANTS`; None to keep their types, and to quantise only what is cut. The
            matrices of a checkpoint keep their dtype then.
        cut_quant: Type of those matrices of a GGUF file that are quantised again because the cut or a recovery changes numbers in
            them, one of `QUANTS`; None for ``quant``, or without that for their own types, and Q5_0 in place of four bits.
        imatrix: Importance matrix of the dense model. The result gets one of the kept channels; None for none.
    """

    overwrite: bool = False
    verify: bool = True
    fine_tune: bool = False
    shard_bytes: int | None = None
    extra_layers: str | None = None
    dtype: str | None = None
    allow_padding: bool = False
    layout: str | None = None
    format: str = SAFETENSORS
    quant: str | None = None
    imatrix: Path | None = None
    cut_quant: str | None = None

    def check(self) -> None:
        """Raise `UsageError` for a value that is not possible."""
        if self.extra_layers is not None and self.extra_layers not in EXTRA_LAYERS:
            raise unknown("choice for extra layers", self.extra_layers, EXTRA_LAYERS)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise unknown("dtype", self.dtype, DTYPES)
        if self.layout is not None and self.layout not in LAYOUTS:
            raise unknown("layout", self.layout, LAYOUTS)
        if self.format not in FORMATS:
            raise unknown("format", self.format, FORMATS)
        check_layout_of_format(self.format, self.layout)
        for flag, kind in (("--quant", self.quant), ("--cut-quant", self.cut_quant)):
            if kind is not None and kind not in QUANTS:
                raise unknown(f"type for {flag}", kind, QUANTS)
            if self.format != GGUF and kind is not None:
                raise UsageError(f"{flag} has no effect without --format gguf", hint="add --format gguf, or leave it out")
        if self.format == GGUF and self.dtype is not None:
            raise UsageError("--dtype has no effect with --format gguf", hint="use --quant, such as --quant bf16")
        if self.format == GGUF and self.shard_bytes is not None:
            raise UsageError("--shard-size has no effect with --format gguf: the result is one file", hint="leave it out")


CUT_DEFAULTS = CutOptions()
"""The options of a cut unless others are given."""
