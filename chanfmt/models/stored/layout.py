"""Where each FFN lies in the checkpoint files: tensor names, axes and slices, checked by value.

transformers may convert a checkpoint when it loads it: rename tensors, join the matrices of experts into one parameter,
concatenate gate and up, transpose. It reverts that when it saves a model. This module lets transformers revert the
*coordinates* of the parameters instead of their values. The result says which elements of which parameter each stored
tensor holds. A coordinate varies along one axis only, so it takes one line of numbers, whatever the size of the parameter.
"""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from chanfmt.base.errors import ModelError
from chanfmt.format.records import TensorSlice
from chanfmt.models.stored.repeated import Unwritten
from chanfmt.models.stored.tensors import read_row

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from chanfmt.models.ffn import FFN, Bias, Matrix
    from chanfmt.models.safetensors import CheckpointIndex

_RESAVE = "load the model with transformers, save it with save_pretrained, and use that directory"


def tensor_slices(model: Any, ffn: FFN, index: CheckpointIndex) -> tuple[TensorSlice, ...]:
    """Every read and write weight and bias of ``ffn`` as a slice of a checkpoint tensor, expert by expert.

    Raises:
        ModelError: A parameter is stored in a form that cannot be followed.
    """
    return tuple(_Layout(model, index, ffn).slices())


def stored_names(model: Any, index: CheckpointIndex, parameters: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """For each of ``parameters`` of ``model`` the checkpoint tensors that hold it, several if it is joined from them.

    A parameter that cannot be followed is left out.
    """
    forms = _Forms(model, index)
    try:
        return {name: tuple(item.tensor for item in found) for name, found in forms.stored_form(sorted(parameters)).items()}
    except ModelError:
        if len(parameters) < 2:
            return {}
        return {name: tensors for parameter in parameters for name, tensors in stored_names(model, index, [parameter]).items()}


@dataclass(frozen=True, eq=False)
class _Stored:
    """A checkpoint tensor, by the coordinates of one parameter that it holds.

    Attributes:
        tensor: Name of the tensor in the files.
        coordinates: For every axis of the parameter, the position of each element on that axis, in the shape of the tensor.
        origin: Index of the first element that belongs to the parameter.
        mine: Whether each element belongs to the parameter, in the shape of the tensor; None if all elements do.
    """

    tensor: str
    coordinates: tuple[np.ndarray, ...]
    origin: tuple[int, ...]
    mine: np.ndarray | None = None

    @functools.cached_property
    def varying(self) -> tuple[int | None, ...]:
        """For every axis of the parameter, the first stored axis along which the position varies; None if there is one position."""
        return tuple(
            next((along for along in range(len(self.origin)) if self._varies(axis, along)), None)
            for axis in range(len(self.coordinates))
        )

    @functools.cached_property
    def first(self) -> int | None:
        """The position on the parameter's first axis that all elements have; None if they have several."""
        return None if self.varying[0] is not None else int(self.coordinates[0][self.origin])

    def line(self, axis: int, along: int, origin: tuple[int, ...]) -> np.ndarray:
        """Positions on the parameter's ``axis``, along a stored axis through ``origin``; -1 for an element of another parameter."""
        index: tuple[Any, ...] = (*origin[:along], slice(None), *origin[along + 1 :])
        positions = self.coordinates[axis][index]
        return positions if self.mine is None else np.where(self.mine[index], positions, -1)

    def _varies(self, axis: int, along: int) -> bool:
        line = self.line(axis, along, self.origin)
        line = line[line >= 0]
        return bool((line != line[0]).any())


class _Forms:
    def __init__(self, model: Any, index: CheckpointIndex) -> None:
        self.model = model
        self.index = index

    def stored_form(self, names: list[str]) -> dict[str, list[_Stored]]:
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
        """The tensor that is the parameter itself; None if there is none. Its name may lack the base model's prefix, or have one more."""
        prefix = f"{self.model.base_model_prefix}."
        for candidate in dict.fromkeys((name, name.removeprefix(prefix), prefix + name)):
            entry = self.index.tensors.get(candidate)
            if entry is not None and entry.shape == tuple(parameter.shape):
                coordinates = tuple(_coordinate(parameter.shape, axis).numpy() for axis in range(parameter.ndim))
                stored = _Stored(candidate, coordinates, (0,) * parameter.ndim)
                if self._same(stored, parameter.detach()):
                    return stored
        return None

    def _reverted(self, names: list[str], parameters: dict[str, torch.Tensor]) -> dict[str, list[_Stored]]:
        from transformers.core_model_loading import revert_weight_conversion

        rank = max(parameter.ndim for parameter in parameters.values())
        numbered = {name: number for number, name in enumerate(names)}

        def reverted(values: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
            try:
                with Unwritten():
                    return {name: value.numpy() for name, value in revert_weight_conversion(self.model, values).items()}
            except Exception:
                raise _unfollowed(names[0]) from None

        which = reverted({name: torch.tensor(numbered[name], dtype=torch.int32).expand(parameters[name].shape) for name in names})
        axes = [
            reverted({name: _coordinate(parameters[name].shape, min(axis, parameters[name].ndim - 1)) for name in names})
            for axis in range(rank)
        ]
        result: dict[str, list[_Stored]] = {name: [] for name in names}
        prefix = f"{self.model.base_model_prefix}."
        for tensor, owner in which.items():
            candidates = (tensor, tensor.removeprefix(prefix), prefix + tensor)
            stored = next(
                (
                    candidate
                    for candidate in candidates
                    if candidate in self.index.tensors and self.index.tensors[candidate].shape == owner.shape
                ),
                None,
            )
            core = _core(owner)
            numbers = np.unique(core).tolist()
            for number in numbers:
                name = names[number]
                parameter = parameters[name]
                if stored is None:
                    raise _unfollowed(name, f": there is no tensor {tensor} of the shape {list(owner.shape)}")
                coordinates = tuple(axes[axis][tensor] for axis in range(parameter.ndim))
                if len(numbers) == 1:
                    item = _Stored(stored, coordinates, (0,) * owner.ndim)
                else:
                    mine = core == number
                    origin = tuple(int(place) for place in np.unravel_index(int(mine.argmax()), mine.shape))
                    item = _Stored(stored, coordinates, origin, np.broadcast_to(mine, owner.shape))
                if not self._same(item, parameter.detach()):
                    raise _unfollowed(name)
                result[name].append(item)
        return result

    def _same(self, stored: _Stored, parameter: torch.Tensor) -> bool:
        """Whether the first row of the parameter in the stored tensor holds the parameter's values. True if it has no values."""
        if parameter.is_meta:
            return True
        row = slice(stored.origin[0], stored.origin[0] + 1)
        values = read_row(self.index.tensors[stored.tensor], stored.origin[0])
        if values is None:
            return False
        places = tuple(torch.from_numpy(_core(axis[row])).long() for axis in stored.coordinates)
        if stored.mine is None:
            expected = parameter[places].cpu().expand(values.shape)
        else:
            mine = torch.from_numpy(stored.mine[row].copy())
            values = values[mine]
            expected = parameter[tuple(place.expand(mine.shape)[mine] for place in places)].cpu()
        return torch.equal(values.to(expected.dtype), expected)


class _Layout(_Forms):
    def __init__(self, model: Any, index: CheckpointIndex, ffn: FFN) -> None:
        super().__init__(model, index)
        self.ffn = ffn
        names = {projection.matrix.parameter for member in ffn.members for projection in _projections(member)}
        names |= {projection.bias.parameter for member in ffn.members for projection in _projections(member) if projection.bias}
        # Keyed by the position on the parameter's first axis: one parameter may be stored as the tensors of hundreds of experts.
        self.stored: dict[str, dict[int | None, list[_Stored]]] = {name: defaultdict(list) for name in names}
        for name, found in self.stored_form(sorted(names)).items():
            for stored in found:
                self.stored[name][stored.first].append(stored)

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
        first = None
        if matrix.index is not None:
            first = matrix.index
            axis += 1
        elif axis == 0:
            positions = range(matrix.row + positions.start, matrix.row + positions.stop, positions.step)
        elif matrix.row:
            first = matrix.row
        return self._slice(role, matrix.parameter, axis, positions, first)

    def _of_bias(self, role: str, bias: Bias, positions: range | None) -> TensorSlice:
        axis = None if positions is None else 0 if bias.index is None else 1
        return self._slice(role, bias.parameter, axis, positions or range(1), bias.index)

    def _slice(self, role: str, parameter: str, axis: int | None, positions: range, first: int | None) -> TensorSlice:
        """The slice whose element i lies at ``positions[i]`` on the parameter's ``axis``, and at ``first`` on its first axis."""
        places = self.stored[parameter]
        here = (*places.get(first, ()), *places.get(None, ())) if first is not None else itertools.chain(*places.values())
        for stored in here:
            found = _find(stored, axis, positions, first)
            if found is not None:
                stored_axis, start, step, expert = found
                stop = start + (len(positions) - 1) * step + 1 if axis is not None else 0
                return TensorSlice(role, stored.tensor, parameter, stored_axis, start, stop, step, expert)
        raise _unfollowed(parameter)


def _projections(member: Any) -> tuple[Any, ...]:
    return (member.write, *(read.projection for read in member.reads))


def _coordinate(shape: torch.Size, axis: int) -> torch.Tensor:
    """The position of each element on ``axis``, int32 of ``shape``. It takes the memory of one line."""
    position = torch.arange(shape[axis], dtype=torch.int32)
    return position.reshape([-1 if other == axis else 1 for other in range(len(shape))]).expand(shape)


def _core(array: np.ndarray) -> np.ndarray:
    """``array`` with one element along each axis of stride 0, where all elements are the same."""
    return array[tuple(slice(1) if stride == 0 else slice(None) for stride in array.strides)]


def _find(
    stored: _Stored, axis: int | None, positions: range, first: int | None
) -> tuple[int | None, int, int, int | None] | None:
    """Stored axis, start, step and expert index of the wanted positions; None if ``stored`` does not hold them."""
    origin = stored.origin
    along = None if axis is None else stored.varying[axis]
    expert = None
    if first is not None and stored.varying[0] == 0 and along != 0:
        matches = np.flatnonzero(stored.line(0, 0, origin) == first).tolist()
        if len(matches) != 1:
            return None
        expert = matches[0]
        origin = (expert, *origin[1:])
    if axis is None:
        return None, 0, 1, expert
    if along is None:
        return None
    line = stored.line(axis, along, origin)
    wanted = (line >= positions[0]) & (line <= positions[-1]) & ((line - positions[0]) % positions.step == 0)
    if first is not None:
        # The experts lie one after the other along the axis of the channels: keep the positions of this expert.
        wanted &= stored.line(0, along, origin) == first
    places = np.flatnonzero(wanted)
    if not np.array_equal(line[places], np.arange(positions.start, positions.stop, positions.step)):
        return None
    start = int(places[0])
    step = int(places[1]) - start if len(places) > 1 else 1
    if not np.array_equal(places, start + step * np.arange(len(places))):
        return None
    return along, start, step, expert


def _unfollowed(parameter: str, why: str = "") -> ModelError:
    return ModelError(f"the checkpoint stores {parameter} under another name or in another form{why}", hint=_RESAVE)
