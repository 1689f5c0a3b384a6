"""The state of a descent on disk, so that the same command can go on after a kill."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import msgspec
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from chanfmt.base.errors import ChanfmtError
from chanfmt.base.files import atomic_file
from chanfmt.base.narrate import warn
from chanfmt.base.parsed import parse_json
from chanfmt.base.schedule import Schedule
from surgery.recovery.distillation.descent import State
from surgery.recovery.options import LayerRecovery  # noqa: TC001 (msgspec reads the annotations)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

_PARTS = ("weights", "first", "second", "best")
_FIELD = "state"


@dataclass(frozen=True)
class Before:
    """What is known before the first step.

    Attributes:
        layers: What the refit did that the descent starts from.
        fitted: Number of a source to the loss on its fitted sequences.
        held_out: Number of a source to the loss on its held-out sequences.
    """

    layers: tuple[LayerRecovery, ...]
    fitted: Mapping[int, float]
    held_out: Mapping[int, float]


class _Stored(msgspec.Struct):
    """The numbers of a state file, as JSON."""

    key: str
    step: int
    rates: list[float]
    history: list[tuple[int, float]]
    layers: tuple[LayerRecovery, ...]
    fitted: dict[int, float]
    held_out: dict[int, float]


class StateFile:
    """The file at ``path``, which belongs to the work called ``key``.

    Args:
        every: Seconds between two saves; None for as often as costs little.
    """

    def __init__(self, path: Path, key: str, every: float | None) -> None:
        self.path = path
        self._key = key
        self._schedule = Schedule(every, time.monotonic())

    def save(self, state: State, before: Before) -> None:
        """Replace the file, in one step, if that is due. If it cannot be written, a warning says so, and the work goes on."""
        started = time.monotonic()
        size = sum(tensor.nbytes for part in _PARTS for tensor in getattr(state, part))
        if not self._schedule.due(started, size):
            return
        try:
            self._write(state, before)
        except ChanfmtError as error:
            warn(f"the state of the distillation is not saved, so a kill would lose it: {error.message}")
        self._schedule.tried(started, time.monotonic(), size)

    def way_out(self) -> str | None:
        """How to go on after an interrupt; None if nothing was saved."""
        return f"{self.path} holds the distillation: run the same command again to go on" if self.path.is_file() else None

    def _write(self, state: State, before: Before) -> None:
        tensors = {f"{part}.{number}": tensor for part in _PARTS for number, tensor in enumerate(getattr(state, part))}
        stored = {
            "key": self._key,
            "step": state.step,
            "rates": state.rates,
            "history": state.history,
            "layers": [asdict(layer) for layer in before.layers],
            "fitted": dict(before.fitted),
            "held_out": dict(before.held_out),
        }
        with atomic_file(self.path, overwrite=True) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {_FIELD: json.dumps(stored)})

    def load(self, into: Sequence[torch.Tensor]) -> tuple[State, Before] | None:
        """The state in the file; None if there is none, or if it cannot be used.

        Args:
            into: Values of the trained parameters, which are overwritten with those of the state.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                stored = parse_json((file.metadata() or {}).get(_FIELD, ""), _Stored)
                found = {part: [file.get_tensor(f"{part}.{number}") for number in range(len(into))] for part in _PARTS}
        except (SafetensorError, OSError, ValueError) as error:
            warn(f"{self.path} cannot be read, so the distillation begins again: {error}")
            return None
        shapes = [values.shape for values in into]
        fits = all([tensor.shape for tensor in tensors] == shapes for tensors in found.values())
        if stored.key != self._key or len(stored.rates) != len(into) or not stored.history or not fits:
            warn(f"{self.path} belongs to other work, so the distillation begins again")
            return None
        for values, tensor in zip(into, found["weights"], strict=True):
            values.copy_(tensor)
        device = into[0].device
        first, second, best = ([tensor.to(device) for tensor in found[part]] for part in _PARTS[1:])
        state = State(list(into), first, second, best, stored.rates, stored.step, stored.history)
        return state, Before(stored.layers, stored.fitted, stored.held_out)

    def remove(self) -> None:
        """Remove the file, if it is there and can be removed."""
        with contextlib.suppress(OSError):
            self.path.unlink()
