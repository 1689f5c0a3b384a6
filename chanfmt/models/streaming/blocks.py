"""Parts of a model whose weights come and go, and the rest of the model, whose weights stay."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from torch import nn

from chanfmt.base.errors import ModelError
from chanfmt.models.streaming.parameters import restored

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    import torch

    from chanfmt.models.streaming.parameters import StoredParameters

HINT = "leave out --stream or --memory, and measure it on a machine or a GPU that holds it whole"


class UnstreamableError(ModelError):
    """A model cannot be run part by part."""


class Blocks:
    """A model some of whose parts have weights only in the body of `loaded`.

    The rest of the model has its weights from the beginning.

    Args:
        model: A model without weights, as `chanfmt.models.streaming.parameters.weightless` makes it.
        stored: Gives the model its weights; None if ``model`` has all of them already, and keeps them.
        device: The device that the model runs on.
        parts: Name to module, in order. No part lies in another part.

    Attributes:
        names: Names of the parts, in order.
        resident: Whether all parts keep their weights.

    Raises:
        UnstreamableError: A part shares a weight with another part or with the rest, or a buffer has no values.
        ModelError: Weights are missing.
    """

    def __init__(self, model: Any, stored: StoredParameters | None, device: torch.device, parts: Mapping[str, nn.Module]) -> None:
        self.model = model
        self.device = device
        self.names = list(parts)
        self._blocks = list(parts.values())
        self._stored = stored
        if stored is None:
            return
        check_unshared(model, parts)
        self._keys = _keys(model, parts)
        resident = model.state_dict().keys() - set().union(*self._keys)
        stored.load(resident, device)
        model.tie_weights(missing_keys=stored.missing, recompute_mapping=False)
        stored.check_loaded(resident)
        for path, module in model.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_meta:
                    # Its class computes it from something that a model without weights does not have.
                    raise UnstreamableError(f"no file holds the values of {path}.{name}")
                module._buffers[name] = buffer if buffer is None else buffer.to(device)

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def resident(self) -> bool:
        return self._stored is None

    def number_of(self, name: str) -> int | None:
        """Number of the part that the module or parameter ``name`` lies in; None if it lies in none."""
        return next((number for number, block in enumerate(self.names) if f"{name}.".startswith(f"{block}.")), None)

    @contextlib.contextmanager
    def loaded(self, number: int) -> Iterator[nn.Module]:
        """Give part ``number`` its weights in the body, and yield it. Raises `ModelError` if they cannot be read."""
        if self._stored is None:
            yield self._blocks[number]
            return
        with restored(self._blocks[number]):
            self._stored.load(self._keys[number], self.device)
            self._stored.check_loaded(self._keys[number])
            yield self._blocks[number]


def outer_lists(model: Any) -> list[tuple[str, nn.ModuleList]]:
    """Names and modules of the lists of layers of ``model`` that have elements and lie in no other list."""
    lists: list[tuple[str, nn.ModuleList]] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(name.startswith(f"{other}.") for other, _ in lists):
            lists.append((name, module))
    return lists


def check_unshared(model: Any, parts: Iterable[str]) -> None:
    """Raise `UnstreamableError` if one of ``parts`` shares a weight, which could not come and go with the part."""
    owner = {key: number for number, names in enumerate(_keys(model, parts)) for key in names}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if owner.get(name) != owner.get(other):
            raise UnstreamableError(
                f"{type(model).__name__} cannot be run block by block: {name} and {other} are one weight", hint=HINT
            )


def _keys(model: Any, parts: Iterable[str]) -> list[set[str]]:
    """Names of the parameters and stored buffers of each of ``parts``."""
    state = model.state_dict()
    return [{key for key in state if key.startswith(f"{name}.")} for name in parts]
