"""Whether the weights of a checkpoint fit on a device, from the headers of its files. No weight is read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import ModelError
from chanfmt.base.memory import free_swap
from chanfmt.base.text import gigabytes
from chanfmt.models.device_memory import free_memory

if TYPE_CHECKING:
    import torch

    from chanfmt.models.source import ModelSource


class NoRoomError(ModelError):
    """The weights of a model are larger than the memory of the device that they shall lie on."""


@dataclass(frozen=True)
class Room:
    """What a model's weights need, and what is free for them.

    Attributes:
        weights: Bytes of the weights in the dtype that they are loaded in.
        free: Bytes that are free on the device, or on all GPUs together; None if that is not known.
        swap: Bytes of swap space that the system could use besides.
        place: The device, as a person calls it.
    """

    weights: int
    free: int | None
    swap: int
    place: str

    @property
    def fits(self) -> bool:
        """Whether the weights fit without swapping, as far as that is known."""
        return self.free is None or self.weights <= self.free

    @property
    def text(self) -> str:
        """What is needed and what is free, as the end of a sentence."""
        return f"{gigabytes(self.weights)} of weights, and {gigabytes(self.free or 0)} free on {self.place}"


def room_for(source: ModelSource, kind: Any, place: torch.device, *, spread: bool = False) -> Room:
    """What the weights of ``source`` need, and what is free.

    Args:
        kind: The dtype that they are loaded in; ``auto`` for the checkpoint's own.
        place: The device that they shall lie on.
        spread: Whether they are spread over all devices of this type.

    Raises:
        ModelError: The headers of the files cannot be read.
    """
    import torch

    from chanfmt.models.stored.tensors import DTYPES

    nbytes = 0
    for entry in source.index.tensors.values():
        stored = DTYPES.get(entry.dtype)
        converted = isinstance(kind, torch.dtype) and stored is not None and stored.is_floating_point
        nbytes += entry.elements * kind.itemsize if converted else entry.nbytes
    if spread and place.type != "cpu":
        count = torch.get_device_module(place).device_count()
        parts = [free_memory(torch.device(place.type, number)) for number in range(count)]
        free = sum(part for part in parts if part is not None) if all(part is not None for part in parts) else None
        return Room(nbytes, free, 0, f"{count} GPUs")
    return Room(nbytes, free_memory(place), free_swap() if place.type == "cpu" else 0, str(place))


def check_room(source: ModelSource, kind: Any, place: torch.device, *, spread: bool = False) -> None:
    """Raise `NoRoomError` if the weights cannot fit, swap space included. Arguments as for `room_for`."""
    import torch

    room = room_for(source, kind, place, spread=spread)
    if room.fits or (room.free is not None and room.weights <= room.free + room.swap):
        return
    levers = ["--stream (atlas build)"]
    if not isinstance(kind, torch.dtype) or kind.itemsize > 2:
        levers.append("--dtype bfloat16")
    if place.type != "cpu" and not spread:
        levers += ["--device-map auto", "--device cpu"]
    hint = f"use {', '.join(levers[:-1])} or {levers[-1]}" if levers[1:] else f"use {levers[0]}, or a larger machine"
    raise NoRoomError(f"{source.id} does not fit: {room.text}", hint=hint)
