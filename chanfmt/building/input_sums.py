"""Sums of the squared inputs of linear maps, such as the projections of attention, accumulated on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chanfmt.models.ffn import Matrix

POWER, TOKENS = "other_power", "other_tokens"
"""Names of the arrays in a state: float64 (map, input), padded with zeros, and int64 (map,)."""


class InputSums:
    """Sums over tokens of the squared inputs of several linear maps.

    Attributes:
        power: For each map the sums, float64 (inputs,).
        tokens: For each map the number of tokens.
    """

    def __init__(self, matrices: Sequence[Matrix], device: torch.device) -> None:
        self.device = device
        self.power = [torch.zeros(matrix.inputs, dtype=torch.float64, device=device) for matrix in matrices]
        self.tokens = [0] * len(self.power)

    def add(self, place: int, power: torch.Tensor, tokens: int) -> None:
        """Add ``power``, the `squares` of ``tokens`` inputs of map number ``place``."""
        self.power[place] += power.to(self.device)
        self.tokens[place] += tokens

    @property
    def nbytes(self) -> int:
        """Bytes of the sums."""
        return sum(values.nbytes for values in self.power)

    def state(self) -> dict[str, np.ndarray]:
        """The sums and the numbers of tokens, for `restore`."""
        power = np.zeros((len(self.power), max((len(values) for values in self.power), default=0)))
        for row, values in zip(power, self.power, strict=True):
            row[: len(values)] = values.cpu().numpy()
        return {POWER: power, TOKENS: np.array(self.tokens, dtype=np.int64)}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over the `state` of another instance for the same maps."""
        for place, values in enumerate(self.power):
            values.copy_(torch.from_numpy(np.array(state[POWER][place, : len(values)])))
            self.tokens[place] = int(state[TOKENS][place])

    def counts(self) -> torch.Tensor:
        """The numbers of tokens, float64 (map,). They add up like sums."""
        return torch.tensor(self.tokens, dtype=torch.float64, device=self.device)

    def set_counts(self, counts: torch.Tensor) -> None:
        """Take over `counts`."""
        self.tokens = [int(count) for count in counts.tolist()]


def squares(x: torch.Tensor) -> torch.Tensor:
    """Sums over tokens of the squares of ``x`` (..., d), in float32, or in float64 if ``x`` is."""
    wide = x if x.dtype == torch.float64 else x.float()
    return wide.reshape(-1, x.shape[-1]).square().sum(0)
