"""A cut model in memory whose cut FFNs are trained, and nothing else of it."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch

from chanfmt.models.stored.tensors import DTYPES
from surgery.cut.checkpoint.patch import as_stored
from surgery.cut.in_place import narrow
from surgery.recovery.refit import FittedFFN
from surgery.recovery.writes import Leaf

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from surgery.planning.plan import PruningPlan


class Student:
    """The cut that ``plan`` makes of the loaded, dense ``model``, which is changed.

    Args:
        dtypes: Name and role of every tensor of an FFN that is cut to the safetensors dtype that the result stores it in.

    Attributes:
        leaves: The trained parameters, in float32, and the elements of them that are free to change.

    Raises:
        ModelError: The model is of a kind that cannot be cut in memory.
    """

    def __init__(self, model: Any, plan: PruningPlan, dtypes: Mapping[tuple[str, str], str]) -> None:
        self._model = model
        self._dtypes = dtypes
        placed = narrow(model, plan, allow_padding=True)
        self._places: dict[tuple[str, str], tuple[str, int | None, torch.Tensor | None]] = {}
        positions: dict[str, list[torch.Tensor]] = defaultdict(list)
        axes: dict[str, int | None] = {}
        for block in placed.plan.blocks:
            for item in block.tensors if block.is_cut else ():
                name, axis, rows = item.parameter, None, None
                if item.axis is not None:
                    cut = placed.cuts[name]
                    axis, rows = cut.axis, torch.from_numpy(cut.places(item.indices(block.kept))).to(model.device)
                    positions[name].append(rows)
                self._places[block.name, item.role] = name, axis, rows
                axes[name] = axis
        self._rounds = [place for place in self._places if DTYPES[dtypes[place]].itemsize < 4]
        self.leaves = [Leaf(self._free(name), _mask(self._free(name), axis, positions[name])) for name, axis in axes.items()]

    def put(self, name: str, fitted: FittedFFN) -> None:
        """Give the FFN ``name`` of the plan other weights."""
        values = {"write": fitted.weight, "write_bias": fitted.bias, **fitted.reads}
        for role, tensor in values.items():
            if tensor is not None:
                self._set(name, role, tensor)

    def get(self, name: str) -> FittedFFN:
        """The weights of the FFN ``name``, as the result stores them. Raises `ModelError` if a dtype cannot hold them."""
        values = {
            role: as_stored(self._value(block, role), self._dtypes[block, role]) for block, role in self._places if block == name
        }
        return FittedFFN(values.pop("write"), values.pop("write_bias", None), values)

    @contextlib.contextmanager
    def rounded(self) -> Iterator[None]:
        """In the body, the weights are those that the result would store."""
        before = [leaf.parameter.detach().clone() for leaf in self.leaves] if self._rounds else []
        self.round()
        try:
            yield
        finally:
            for leaf, values in zip(self.leaves, before, strict=False):
                leaf.parameter.data.copy_(values)

    def round(self) -> None:
        """Round the weights as the result stores them."""
        for name, role in self._rounds:
            self._set(name, role, self._value(name, role).to(DTYPES[self._dtypes[name, role]]))

    def _free(self, name: str) -> torch.nn.Parameter:
        parameter: torch.nn.Parameter = self._model.get_parameter(name)
        parameter.data = parameter.data.float()
        return parameter

    def _value(self, name: str, role: str) -> torch.Tensor:
        """The present weights: (outputs, kept) for ``write``, (kept, inputs) for a read, (kept,) or (outputs,) for a bias."""
        parameter, axis, rows = self._places[name, role]
        values = self._model.get_parameter(parameter).detach()
        if axis is None or rows is None:
            return values
        values = values.index_select(axis, rows)
        return values.T if values.ndim == 2 and (axis == 0) == (role == "write") else values

    def _set(self, name: str, role: str, values: torch.Tensor) -> None:
        """Replace the weights that `_value` gives."""
        parameter, axis, rows = self._places[name, role]
        data = self._model.get_parameter(parameter).data
        values = values.to(data)
        if axis is None or rows is None:
            data.copy_(values)
            return
        data.index_copy_(axis, rows, values.T if values.ndim == 2 and (axis == 0) == (role == "write") else values)


def _mask(parameter: torch.Tensor, axis: int | None, rows: list[torch.Tensor]) -> torch.Tensor | None:
    """1 at the channels ``rows`` on ``axis``, which broadcasts to ``parameter``; None if these are all."""
    if axis is None:
        return None
    mask = torch.zeros(parameter.shape[axis], device=parameter.device)
    mask[torch.cat(rows)] = 1
    if bool(mask.all()):
        return None
    return mask.reshape([-1 if other == axis else 1 for other in range(parameter.ndim)])
