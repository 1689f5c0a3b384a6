"""Where each FFN lies in the checkpoint files: tensor names, axes and slices, checked by value.

transformers may convert a checkpoint as it loads it: rename, join experts' matrices into one parameter,
concatenate gate and up, transpose. It can also revert that, which is how it saves. Here it reverts the
parameters' *coordinates* instead of their values; what comes out says of each stored tensor which
elements of which parameter it holds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from chanfmt.errors import ModelError
from chanfmt.records import TensorSlice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chanfmt.models.checkpoint import CheckpointIndex
    from chanfmt.models.ffn import FFN, Bias, Matrix

_RESAVE = "load the model with transformers, save it with save_pretrained, and use that directory"


def tensor_slices(model: Any, ffn: FFN, index: CheckpointIndex) -> tuple[TensorSlice, ...]:
    """Every read and write weight and bias of ``ffn`` as a slice of a checkpoint tensor, expert by expert.

    Raises:
        ModelError: A parameter is stored in a form that cannot be followed.
    """
    return tuple(_Layout(model, index, ffn).slices())


@dataclass(frozen=True, eq=False)
class _Stored:
    """A checkpoint tensor by the coordinates it holds of one parameter.

    Attributes:
        tensor: Its name in the files.
        coordinates: For every axis of the parameter, each element's position on it, -1 where an element
            belongs to another parameter; shape of the tensor.
        origin: Index of the first element that belongs to the parameter.
    """

    tensor: str
    coordinates: tuple[torch.Tensor, ...]
    origin: tuple[int, ...]

    @functools.cached_property
    def varying(self) -> tuple[int | None, ...]:
        """For every axis of the parameter the stored axis along which the position on it varies; None where it is one."""
        return tuple(_axis_of(coordinate, list(self.origin)) for coordinate in self.coordinates)

    def position(self, axis: int) -> int:
        """Where on the parameter's ``axis`` its first element lies."""
        return int(self.coordinates[axis][self.origin])


class _Layout:
    def __init__(self, model: Any, index: CheckpointIndex, ffn: FFN) -> None:
        self.model = model
        self.index = index
        self.ffn = ffn
        names = {projection.matrix.parameter for member in ffn.members for projection in _projections(member)}
        names |= {projection.bias.parameter for member in ffn.members for projection in _projections(member) if projection.bias}
        self.stored = self._stored_form(sorted(names))

    def slices(self) -> Iterator[TensorSlice]:
        width = self.ffn.width
        for member in self.ffn.members:
            done = set()
            for read in member.reads:
                if read.role in done:
                    continue
                done.add(read.role)
                matrix, bias = read.projection.matrix, read.projection.bias
                positions = range(read.start, read.start + (width - 1) * read.step + 1, read.step)
                yield self._of_matrix(read.role, matrix, 1 if matrix.transposed else 0, positions)
                if bias is not None:
                    yield self._of_bias(f"{read.role}_bias", bias, positions)
            matrix, bias = member.write.matrix, member.write.bias
            yield self._of_matrix("write", matrix, 0 if matrix.transposed else 1, range(width))
            if bias is not None:
                yield self._of_bias("write_bias", bias, None)

    def _of_matrix(self, role: str, matrix: Matrix, axis: int, positions: range) -> TensorSlice:
        fixed: dict[int, int] = {}
        if matrix.index is not None:
            fixed[0] = matrix.index
            axis += 1
        elif axis == 0:
            positions = range(matrix.row + positions.start, matrix.row + positions.stop, positions.step)
        elif matrix.row:
            fixed[0] = matrix.row
        return self._slice(role, matrix.parameter, axis, positions, fixed)

    def _of_bias(self, role: str, bias: Bias, positions: range | None) -> TensorSlice:
        fixed = {} if bias.index is None else {0: bias.index}
        return self._slice(role, bias.parameter, None if positions is None else len(fixed), positions or range(1), fixed)

    def _slice(self, role: str, parameter: str, axis: int | None, positions: range, fixed: dict[int, int]) -> TensorSlice:
        """The slice whose element i is at ``positions[i]`` of the parameter's ``axis`` and at ``fixed`` of others."""
        for stored in self.stored[parameter]:
            if any(stored.varying[where] is None and stored.position(where) != wanted for where, wanted in fixed.items()):
                continue
            found = _find(stored, axis, positions, fixed)
            if found is not None:
                stored_axis, start, step, expert = found
                stop = start + (len(positions) - 1) * step + 1 if axis is not None else 0
                return TensorSlice(role, stored.tensor, parameter, stored_axis, start, stop, step, expert)
        raise _unfollowed(parameter)

    def _stored_form(self, names: list[str]) -> dict[str, list[_Stored]]:
        parameters = {name: self.model.get_parameter(name) for name in names}
        found: dict[str, list[_Stored]] = {}
        for name, parameter in parameters.items():
            plain = self._plain(name, parameter)
            if plain is not None:
                found[name] = [plain]
        converted = [name for name in names if name not in found]
        if converted:
            found |= self._reverted(converted, parameters)
        return found

    def _plain(self, name: str, parameter: torch.Tensor) -> _Stored | None:
        """The tensor that is the parameter itself. One saved from the base model lacks its prefix, or has one more."""
        prefix = f"{self.model.base_model_prefix}."
        for candidate in dict.fromkeys((name, name.removeprefix(prefix), prefix + name)):
            entry = self.index.tensors.get(candidate)
            if entry is not None and entry.shape == tuple(parameter.shape):
                coordinates = tuple(_coordinate(parameter.shape, axis) for axis in range(parameter.ndim))
                stored = _Stored(candidate, coordinates, (0,) * parameter.ndim)
                if self._same(stored, parameter.detach()):
                    return stored
        return None

    def _reverted(self, names: list[str], parameters: dict[str, torch.Tensor]) -> dict[str, list[_Stored]]:
        from transformers.core_model_loading import revert_weight_conversion

        rank = max(parameter.ndim for parameter in parameters.values())
        numbered = {name: number for number, name in enumerate(names)}

        def reverted(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            try:
                return dict(revert_weight_conversion(self.model, values))
            except Exception:
                raise _unfollowed(names[0]) from None

        which = reverted({name: torch.tensor(numbered[name], dtype=torch.int32).expand(parameters[name].shape) for name in names})
        axes = [reverted({name: _coordinate(parameters[name].shape, min(axis, parameters[name].ndim - 1)) for name in names})
                for axis in range(rank)]
        result: dict[str, list[_Stored]] = {name: [] for name in names}
        prefix = f"{self.model.base_model_prefix}."
        for tensor, owner in which.items():
            candidates = (tensor, tensor.removeprefix(prefix), prefix + tensor)
            stored = next((candidate for candidate in candidates if candidate in self.index.tensors
                           and self.index.tensors[candidate].shape == tuple(owner.shape)), None)
            first = int(owner.flatten()[0])
            alone = bool((owner == first).all())
            for number in (first,) if alone else owner.unique().tolist():
                name = names[number]
                parameter = parameters[name]
                if stored is None:
                    raise _unfollowed(name)
                coordinates = tuple(axes[axis][tensor] for axis in range(parameter.ndim))
                origin = (0,) * owner.ndim
                if not alone:
                    mine = owner == number
                    coordinates = tuple(axis.masked_fill(~mine, -1) for axis in coordinates)
                    origin = tuple(int(place) for place in np.unravel_index(int(mine.int().argmax()), tuple(mine.shape)))
                item = _Stored(stored, coordinates, origin)
                if not self._same(item, parameter.detach()):
                    raise _unfollowed(name)
                result[name].append(item)
        return result

    def _same(self, stored: _Stored, parameter: torch.Tensor) -> bool:
        """Whether the parameter's first row in the stored tensor holds its values; of one without values its form decides."""
        if parameter.is_meta:
            return True
        from safetensors import safe_open

        row = slice(stored.origin[0], stored.origin[0] + 1)
        with safe_open(self.index.tensors[stored.tensor].file, framework="pt") as file:
            values = file.get_slice(stored.tensor)[row]
        places = tuple(axis[row].long() for axis in stored.coordinates)
        mine = places[0] >= 0
        expected = parameter[tuple(place[mine] for place in places)].cpu()
        return torch.equal(values.to(expected.dtype)[mine], expected)


def _projections(member: Any) -> tuple[Any, ...]:
    return (member.write, *(read.projection for read in member.reads))


def _coordinate(shape: torch.Size, axis: int) -> torch.Tensor:
    """Each element's position on ``axis``, int32 of ``shape``, without memory of its own."""
    position = torch.arange(shape[axis], dtype=torch.int32)
    return position.reshape([-1 if other == axis else 1 for other in range(len(shape))]).expand(shape)


def _find(
    stored: _Stored, axis: int | None, positions: range, fixed: dict[int, int]
) -> tuple[int | None, int, int, int | None] | None:
    """Stored axis, start, step and expert index of what is wanted; None where ``stored`` does not hold it."""
    origin = list(stored.origin)
    along = None if axis is None else stored.varying[axis]
    expert = None
    for where, wanted in fixed.items():
        if stored.varying[where] == 0 and along != 0:
            matches = torch.nonzero(_line(stored.coordinates[where], 0, origin) == wanted).flatten().tolist()
            if len(matches) != 1:
                return None
            expert = origin[0] = matches[0]
    if axis is None:
        return None, 0, 1, expert
    if along is None:
        return None
    line = _line(stored.coordinates[axis], along, origin)
    # Experts one after the other along the channels' own axis: the positions of this one.
    mine = torch.ones_like(line, dtype=torch.bool)
    for where, wanted in fixed.items():
        mine &= _line(stored.coordinates[where], along, origin) == wanted
    places = {value: place for place, (value, here) in enumerate(zip(line.tolist(), mine.tolist(), strict=True)) if here}
    if not all(position in places for position in (positions[0], positions[-1])):
        return None
    start = places[positions[0]]
    step = places[positions[1]] - start if len(positions) > 1 else 1
    if step < 1 or any(places.get(position) != start + number * step for number, position in enumerate(positions)):
        return None
    return along, start, step, expert


def _axis_of(coordinate: torch.Tensor, origin: list[int]) -> int | None:
    """The first stored axis along which a parameter's coordinate varies; None where it is one number."""
    for axis in range(coordinate.ndim):
        line = _line(coordinate, axis, origin)
        if len(line[line >= 0].unique()) > 1:
            return axis
    return None


def _line(coordinate: torch.Tensor, axis: int, origin: list[int]) -> torch.Tensor:
    index: list[Any] = list(origin)
    index[axis] = slice(None)
    return coordinate[tuple(index)]


def _unfollowed(parameter: str) -> ModelError:
    return ModelError(f"the checkpoint stores {parameter} under another name or in another form", hint=_RESAVE)
