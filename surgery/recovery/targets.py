"""What an FFN or the units of a block should compute: the output of the dense model's block, given the states of the cut model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from chanfmt.base.errors import ModelError

if TYPE_CHECKING:
    from chanfmt.models.streaming.chain import Call
    from surgery.recovery.survivors import Survivors
    from surgery.recovery.writes import Write

_SMALL = 1e-4
"""Share of the median squared norm below which the weight of a token no longer grows."""


class States(Protocol):
    """Hidden states of both models, by stream and batch."""

    def get(self, key: str, place: int) -> torch.Tensor:
        """The states under ``key`` of batch number ``place``, on the device of the model."""


class Runs(Protocol):
    """Runs a block with other write projections."""

    def run(self, call: Call, hidden: torch.Tensor, write: Any = None) -> tuple[Any, torch.Tensor]:
        """The activations, and the block's output (sequence, position, feature)."""


class _Target:
    """What the FFN should compute. A subclass says what is compared, and what the FFN has to produce."""

    def __init__(self, states: States) -> None:
        self._states = states
        self._scales: dict[int, float] = {}

    def scale(self, place: int) -> float:
        if place not in self._scales:
            needed, weights = self._needed(place)
            self._scales[place] = float((needed.square().sum(1) * weights).double().sum())
        return self._scales[place]

    def wanted(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def _needed(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What the FFN has to produce, float32 (token, feature), and the weight of each token."""
        return self.wanted(place)


class Alone(_Target):
    """The target of an FFN whose output its block adds, and whose module runs by itself."""

    def __init__(self, states: States, survivors: Survivors) -> None:
        super().__init__(states)
        self._survivors = survivors

    def output(self, place: int, write: Write) -> torch.Tensor:
        return write.of(self._survivors.activations(self._states.get("x", place)))

    def wanted(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        dense = rows_of(self._states.get("dense", place))
        return dense - rows_of(self._states.get("cut", place)), inverse_square(dense)


class InBlock(_Target):
    """The target of FFNs that run inside their block: the output of the block."""

    def __init__(self, states: States, runs: Runs, calls: list[Call]) -> None:
        super().__init__(states)
        self._runs = runs
        self._calls = calls

    def output(self, place: int, write: Any) -> torch.Tensor:
        _, output = self._runs.run(self._calls[place], self._states.get("cut", place), write)
        return rows_of(output)

    def wanted(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        dense = rows_of(self._states.get("dense", place))
        return dense, inverse_square(dense)

    def _needed(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        dense, weights = self.wanted(place)
        with torch.no_grad():
            return dense - self.output(place, None), weights


def rows_of(states: torch.Tensor) -> torch.Tensor:
    """Hidden states (sequence, position, feature) as float32 (token, feature)."""
    return states.reshape(-1, states.shape[-1]).float()


def inverse_square(vectors: torch.Tensor) -> torch.Tensor:
    """1 / mean square of each of ``vectors`` (token, feature); 0 for a vector of zeros."""
    power = vectors.square().mean(1)
    return torch.where(power > 0, 1 / power.clamp_min(_SMALL * power.median()), 0.0)


def check_finite_states(name: str, *states: torch.Tensor) -> None:
    """Raise `ModelError` if ``states``, what the FFN ``name`` reads or should write on the text, are not all finite."""
    if not all(bool(values.isfinite().all()) for values in states):
        raise ModelError(
            f"{name} has NaN or inf among its activations on the text of the refit",
            hint="save the model in bfloat16 or float32 if it is in float16, or refit on other text with --recover-text",
        )
