"""The record of a result that is a GGUF file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class GgufRecord:
    """How the GGUF file of a result was written, and what was checked of it.

    Attributes:
        file: Its name.
        quant: Type that was asked for all matrices; None if they keep their types.
        cut_quant: Type that was asked for the matrices that are quantised again; None for the default.
        types: Name of each type to the number of its tensors.
        copied: Tensors whose bytes, or the bytes of the rows that stay, are those of the source.
        weight_error: Root mean squared error of the numbers of the cut that were quantised again, relative to their root
            mean square; 0 if there are none.
        logit_error: max|difference| / max|logits| between the file, as transformers loads it, and the cut before it was
            quantised; None if they were not compared.
        divergence: Mean Kullback-Leibler divergence of the same logits, in nats per token; None likewise.
        skipped: Why they were not compared; empty if they were.
        notes: What is not as asked, in sentences without a full stop.
        converted: Whether the source is a checkpoint rather than a GGUF file.
    """

    file: str
    quant: str | None
    types: Mapping[str, int]
    copied: int
    weight_error: float
    logit_error: float | None
    divergence: float | None
    skipped: str
    notes: tuple[str, ...]
    cut_quant: str | None = None
    converted: bool = False

    def to_json(self) -> dict[str, Any]:
        """The record for ``surgery.json``."""
        return asdict(self) | {"types": dict(self.types), "notes": list(self.notes)}

    @property
    def summary(self) -> str:
        """Such as ``x.gguf: 271 tensors (Q4_1 210, F32 61); the bytes of 241 come from the source``."""
        types = ", ".join(f"{name} {count:,}" for name, count in self.types.items())
        total = sum(self.types.values())
        origin = "made from a checkpoint" if self.converted else f"the bytes of {self.copied:,} come from the source"
        return f"{self.file}: {total:,} tensors ({types}); {origin}"

    @property
    def check(self) -> str:
        """What quantising changed, in words."""
        which = "weights that were rounded" if self.converted else "weights that were quantised again"
        weights = f"{which} differ by {self.weight_error:.2g} (relative, root mean square)"
        if not self.weight_error:
            weights = "no weight was rounded" if self.converted else "no weight of the cut was quantised again"
        if self.logit_error is None or self.divergence is None:
            return f"{weights}; logits not compared: {self.skipped}"
        return (
            f"{weights}; logits differ from those before that by {self.logit_error:.2g} of their largest value, "
            f"{self.divergence:.2g} nats per token"
        )
