"""New weights for kept channels, as values: of one FFN, or of all units of a block, with what an adaptation may change."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 5e-2


@dataclass(frozen=True, eq=False)
class Write:
    """New weights for the kept channels; the original bias is passed separately.

    Attributes:
        weight: Write vectors as columns, float32 (outputs, kept).
        shift: Change of the bias, float32 (outputs,); None for no change.
    """

    weight: torch.Tensor
    shift: torch.Tensor | None = None

    def of(self, activations: torch.Tensor) -> torch.Tensor:
        """The output for ``activations`` (token, kept), (token, outputs)."""
        written = activations @ self.weight.T
        return written if self.shift is None else written + self.shift

    def of_unit(self, unit: int, activations: torch.Tensor) -> torch.Tensor:
        """As `of` with the weights of one of several units: weight (unit, outputs, kept), shift (unit, outputs)."""
        return Write(self.weight[unit], None if self.shift is None else self.shift[unit]).of(activations)

    def copy(self) -> Write:
        """The same weights, independent of these."""
        return Write(self.weight.clone(), None if self.shift is None else self.shift.clone())

    def leaves(self) -> list[Leaf]:
        """The weights, which an adaptation changes in place."""
        return [Leaf(values) for values in (self.weight, self.shift) if values is not None]


@dataclass(frozen=True, eq=False)
class Leaf:
    """A parameter that an adaptation changes.

    Attributes:
        parameter: The parameter, float32.
        mask: 1 at elements that may change, 0 at the others; None if all may.
    """

    parameter: torch.Tensor
    mask: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Writes:
    """New weights for the kept channels of all units, in place of `Write`.

    Attributes:
        parts: One `Write` for each FFN: weight (unit, outputs, kept), shift (unit, outputs).
        free: Whether each unit may change, bool (unit,), for each FFN; None if all may.
    """

    parts: tuple[Write, ...]
    free: tuple[torch.Tensor, ...] | None = None

    def copy(self) -> Writes:
        """The same weights, independent of these."""
        return Writes(tuple(part.copy() for part in self.parts), self.free)

    def leaves(self) -> list[Leaf]:
        """The weights, which an adaptation changes in place."""
        leaves = []
        for number, part in enumerate(self.parts):
            for leaf in part.leaves():
                values = leaf.parameter
                mask = None if self.free is None else self.free[number].to(values).reshape(-1, *[1] * (values.ndim - 1))
                leaves.append(Leaf(values, mask))
        return leaves


def is_close(one: torch.Tensor, other: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether two tensors differ by no more than the rounding of numbers as large as those of ``scale``."""
    tolerance = _TOLERANCE.get(scale.dtype, _HALF_TOLERANCE)
    return float((one - other).abs().max()) <= tolerance * float(scale.abs().max())
