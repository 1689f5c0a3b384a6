"""Predict the peak memory of a pass on one device, and choose the batch that fits. No number here is measured, and no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chanfmt.base.text import gigabytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

MARGIN_SHARE = 0.1
"""Share of the tensors that come and go, which is added for the gaps that allocators leave between them."""
GLIBC_SHARE = 0.75
"""The same for glibc where it reuses freed memory: it cannot place a tensor, which is aligned, in a gap of the tensor's size.
bench/memory.py measures up to 0.65."""
MARGIN_BYTES = 64 << 20
"""Bytes that are added for the workspaces of libraries, which no count of tensors sees."""
_BEND = 0.005
"""Relative growth of a slope below which bytes count as linear in the length."""


@dataclass(frozen=True)
class Growth:
    """Bytes as a polynomial of the number of sequences in a batch and of their length.

    Attributes:
        fixed: Bytes that a batch of any size takes.
        per_token: Bytes per token.
        per_pair: Bytes per pair of tokens of one sequence, as attention takes that keeps its whole matrix.
    """

    fixed: float = 0.0
    per_token: float = 0.0
    per_pair: float = 0.0

    def at(self, sequences: int, length: int) -> int:
        """Bytes for ``sequences`` sequences of ``length`` tokens."""
        return round(self.fixed + sequences * (self.per_token * length + self.per_pair * length**2))


def fitted(lengths: Sequence[int], nbytes: Sequence[int], *, pairs: bool = True) -> Growth:
    """The growth through the bytes of one sequence of each of ``lengths``, which are one or three increasing numbers.

    Args:
        nbytes: Bytes measured at these lengths.
        pairs: Whether bytes may grow with pairs of tokens. A peak is the largest of several stages, and its slope grows where
            one stage overtakes another. That growth does not go on.
    """
    if len(lengths) == 1:
        return Growth(per_token=nbytes[0] / lengths[0])
    (first, middle, last), (low, mean, high) = lengths, nbytes
    before, after = (mean - low) / (middle - first), (high - mean) / (last - middle)
    bend = (after - before) / (last - first)
    if not pairs or after <= 0 or after - before <= _BEND * after:
        bend, slope = 0.0, max(after, 0.0)
    else:
        slope = max(before - bend * (first + middle), 0.0)
    return Growth(max(high - slope * last - bend * last**2, 0.0), slope, bend)


@dataclass(frozen=True)
class Stage:
    """What one stage of a pass needs on one device, besides what is there before the pass.

    Attributes:
        weights: Bytes of weights that come and go: those of a block, if the model is streamed.
        statistics: Bytes of sums and cross moments.
        spool: Bytes of block inputs that a streamed pass keeps in memory.
        kept: Activations kept for the backward pass.
        working: What the backward pass and the statistics need on top of the activations.
        logit_row: Bytes of one row of logits, with its probabilities and gradients; 0 if the loss has no chunks.
        logit_rows: Rows of logits that are held at a time.
    """

    weights: int = 0
    statistics: int = 0
    spool: int = 0
    kept: Growth = Growth()
    working: Growth = Growth()
    logit_row: float = 0.0
    logit_rows: int = 0

    def at(self, sequences: int, length: int) -> Prediction:
        """The prediction for batches of ``sequences`` sequences of ``length`` tokens."""
        logits = self.logit_row * min(self.logit_rows, sequences * length)
        # Logits are gone before the backward pass goes through the blocks.
        return Prediction(
            self.weights,
            self.statistics,
            self.spool,
            self.kept.at(sequences, length),
            max(self.working.at(sequences, length), round(logits)),
        )


@dataclass(frozen=True)
class Prediction:
    """Predicted bytes at the peak of a pass on one device.

    Attributes:
        weights, statistics, spool: As for `Stage`.
        activations: Activations kept for the backward pass.
        working: The larger of the chunk of logits, and of what the backward pass and the statistics need.
    """

    weights: int
    statistics: int
    spool: int
    activations: int
    working: int

    @property
    def estimate(self) -> int:
        """Bytes at the peak, besides what is there before the pass."""
        return self.weights + self.statistics + self.spool + self.activations + self.working


@dataclass(frozen=True)
class Choice:
    """A number of sequences in a batch, and what it needs on the device where least is left.

    Attributes:
        sequences: The number.
        device: The device.
        prediction: What the batch needs there.
        free: Bytes that were free there before the pass; None if that is not known.
        resident: Bytes of weights that were there before.
        tight: Whether freed memory must go back to the system at once, which leaves no gaps but takes time.
    """

    sequences: int
    device: str
    prediction: Prediction
    free: int | None
    resident: int = 0
    tight: bool = True

    @property
    def margin(self) -> int:
        """Bytes that must be free beyond the estimate."""
        share = MARGIN_SHARE if self.tight or self.device != "cpu" else GLIBC_SHARE
        return round(share * (self.prediction.activations + self.prediction.working)) + MARGIN_BYTES

    @property
    def needed(self) -> int:
        """Bytes that must be free before the pass."""
        return self.prediction.estimate + self.margin

    @property
    def fits(self) -> bool:
        """Whether the batch fits, as far as that is known."""
        return self.free is None or self.needed <= self.free

    def text(self) -> str:
        """One line for the user."""
        count = f"batch of {self.sequences} sequence{'s' if self.sequences > 1 else ''}"
        free = f" of {gigabytes(self.free)} free" if self.free is not None else ""
        beside = f", beside {gigabytes(self.resident)} of weights" if self.resident else ""
        return f"{count}: about {gigabytes(self.needed)}{free}{beside}"

    def record(self, order: str) -> dict[str, object]:
        """What an atlas records: bytes by name.

        Args:
            order: The order of the pass: ``in memory``, ``recomputed`` or ``streamed``.
        """
        found = self.prediction
        return {
            "order": order,
            "sequences_in_batch": self.sequences,
            "device": self.device,
            "resident_weights": self.resident,
            "weights": found.weights,
            "statistics": found.statistics,
            "spool": found.spool,
            "activations": found.activations,
            "working": found.working,
            "margin": self.margin,
            "tight": int(self.tight),
            "needed": self.needed,
            "free": self.free,
        }


def predicted(stages: Sequence[Stage], sequences: int, length: int) -> Prediction:
    """The prediction of the stage that needs most, of one or more ``stages`` that follow each other on one device."""
    return max((stage.at(sequences, length) for stage in stages), key=lambda found: found.estimate)


def choice_of(
    stages: Mapping[str, Sequence[Stage]],
    sequences: int,
    length: int,
    free: Mapping[str, int | None],
    resident: Mapping[str, int],
    *,
    tight: bool = True,
) -> Choice:
    """What batches of ``sequences`` sequences need on the device where least is left.

    Args:
        stages: The stages of a pass on each device, by the device's name.
        length: Tokens of a sequence.
        free: Bytes that are free on each device; None where that is not known.
        resident: Bytes of weights that are on each device before the pass.
        tight: As for `Choice`.
    """
    choices = [
        Choice(sequences, device, predicted(on_device, sequences, length), free.get(device), resident.get(device, 0), tight)
        for device, on_device in stages.items()
    ]
    return max(choices, key=lambda choice: choice.needed / max(choice.free, 1) if choice.free is not None else 0.0)


def largest_batch(
    stages: Mapping[str, Sequence[Stage]],
    usual: int,
    length: int,
    free: Mapping[str, int | None],
    resident: Mapping[str, int],
    *,
    tight: bool = True,
) -> Choice:
    """The first of ``usual``, its half, a quarter and so on that fits; if none does, the choice of one sequence.

    Only these numbers are tried, so that two builds of the same model mostly have the same batches. A tight choice of the
    usual number comes before a smaller number.

    Args:
        stages, length, free, resident: As for `choice_of`.
        usual: Sequences in a batch where memory does not matter.
        tight: Whether the choice must be tight.
    """
    size = usual
    while True:
        choice = choice_of(stages, size, length, free, resident, tight=tight)
        if choice.fits:
            return choice
        if not tight:
            tight = True
        elif size == 1:
            return choice
        else:
            size //= 2
