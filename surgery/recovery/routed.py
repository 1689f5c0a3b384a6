"""Run a block of a model with the kept channels of several FFNs (routed experts, shared experts), and see what each unit does.

A unit is an expert, or a dense FFN. Which tokens a unit sees, and with which weight its output enters the output of the block, is
found by differentiation: the gradient of a chosen sum of the block's output with respect to a row of a unit's output is the weight
of the row times the coefficients of its token. The coefficients spell the number of the token. No name of a router, and no form of
its code, is presupposed.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from chanfmt.base.errors import ModelError
from chanfmt.models.find.intercept import Interceptor
from chanfmt.models.matrices import bias_of, matrix_of
from surgery.recovery.joint import Rows
from surgery.recovery.writes import Leaf, Write, Writes, is_close

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np

    from chanfmt.models.ffn import FFN, Matrix
    from chanfmt.models.streaming.chain import Call, Chain

_TOLERANCE = 2e-2
"""Largest relative difference between a gradient and the coefficients of a token: the weights may be of 16 bits."""


@dataclass(frozen=True, eq=False)
class Passed:
    """What the units of a block did on a batch.

    Attributes:
        rows: One entry for each FFN.
        without: The block's output without what the units write, besides their biases (sequence, position, feature).
    """

    rows: tuple[Rows, ...]
    without: torch.Tensor


@dataclass(frozen=True, eq=False)
class _Place:
    """Where the kept channels of one role of a unit lie: ``rows`` on ``axis`` of a parameter, or of its element ``index``."""

    role: str
    parameter: str
    index: int | None
    axis: int
    rows: torch.Tensor

    @property
    def key(self) -> tuple[str, int | None]:
        return self.parameter, self.index


class Routed:
    """The kept channels of several FFNs of a loaded block.

    In every run of this class, the write projections are taken out: their inputs are recorded, and their outputs are replaced by
    those of other matrices, or by nothing. Until `narrow` is called, other runs of the block are unchanged.

    Args:
        number: Number of the block in ``chain``. The block is loaded.
        cut: FFNs of that block, and the ids of their channels that stay, int (kept,), or (expert, kept) for routed experts.

    Attributes:
        weights: Write vectors of the kept channels of each FFN, float32 (unit, outputs, kept).
        biases: Biases of the write projections of each FFN, float32 (unit, outputs); None if it has none.
        outputs: Number of residual dimensions.
        seen: For each FFN and each of its units, the activations of each call of the last run, float32 (row, kept).
    """

    def __init__(self, chain: Chain, number: int, cut: Sequence[tuple[FFN, np.ndarray]]) -> None:
        self._chain = chain
        self._number = number
        self._ffns = [ffn for ffn, _ in cut]
        self._kept = [torch.from_numpy(kept).long().reshape(len(ffn.members), -1).to(chain.device) for ffn, kept in cut]
        self._narrow: set[int] = set()
        self.outputs = self._ffns[0].outputs
        other = next((ffn for ffn in self._ffns if ffn.outputs != self.outputs), None)
        if other is not None:
            raise ModelError(
                f"{other.container} and {self._ffns[0].container} are in one block and write to different spaces, so --recover "
                "cannot fit them together"
            )
        self.weights, self.biases = [], []
        for ffn, kept in zip(self._ffns, self._kept, strict=True):
            matrices = [matrix_of(chain.model, member.write.matrix) for member in ffn.members]
            self.weights.append(torch.stack([matrix[:, ids].float() for matrix, ids in zip(matrices, kept, strict=True)]))
            self.biases.append(self._bias(ffn))
        self._emptied = self._emptied_axes()
        self._whole: list[list[torch.Tensor]] | None = None
        self._put_in: Writes | None = None
        self._leaves: list[tuple[int, int, torch.Tensor]] | None = None
        self.seen: list[list[list[torch.Tensor]]] = []
        self._written: list[list[list[torch.Tensor]]] = []
        self._narrowed: dict[tuple[str, int | None], torch.Tensor] = {}
        self._interceptor = Interceptor(chain.model)
        for part, ffn in enumerate(self._ffns):
            members = ffn.members[:1] if ffn.members[0].write.matrix.batched else ffn.members
            for unit, member in enumerate(members):
                self._interceptor.on(
                    member.write.matrix, before=partial(self._before, part, unit), after=partial(self._after, part, unit)
                )

    def prior(self) -> Writes:
        """The old weights."""
        return Writes(tuple(Write(weight) for weight in self.weights))

    def run(
        self, call: Call, hidden: torch.Tensor, write: Writes | None = None
    ) -> tuple[list[list[list[torch.Tensor]]], torch.Tensor]:
        """Run the block on ``hidden`` with the write projections ``write``; None for none.

        Returns:
            For each FFN and each of its units, the activations of each call, float32 (row, kept); and the block's output
            (sequence, position, feature).
        """
        with self.taken_out(write):
            output = self._chain.run(self._number, call, hidden)
        return self.seen, output

    def passed(self, call: Call, hidden: torch.Tensor) -> Passed | None:
        """Run the block without the write projections. None if the block does more with the units' outputs than add them.

        Raises:
            ModelError: The block does not run an FFN, or runs a unit more than once.
        """
        self._leaves = []
        try:
            with torch.enable_grad(), self.taken_out(None):
                output = self._chain.run(self._number, call, hidden)
                leaves, seen = self._leaves, self._once()
                codes = _codes(output.shape[:-1].numel(), output.shape[-1], output.device)
                if codes is None or output.shape[-1] != self.outputs or not output.requires_grad:
                    return None
                given = codes.reshape(output.shape).to(output.dtype)
                found = torch.autograd.grad(output, [leaf for *_, leaf in leaves], given, allow_unused=True)
        finally:
            self._leaves = None
        slopes: list[dict[int, torch.Tensor]] = [{} for _ in self._ffns]
        for (part, unit, _), slope in zip(leaves, found, strict=True):
            if slope is not None:
                slopes[part] |= dict(enumerate(slope)) if self._matrix(part).batched else {unit: slope}
        rows = []
        for part, of_part in enumerate(slopes):
            decoded = self._decoded(part, seen[part], of_part, codes)
            if decoded is None:
                return None
            rows.append(decoded)
        return Passed(tuple(rows), output.detach())

    def own(self, call: Call, hidden: torch.Tensor) -> tuple[tuple[Rows, ...], torch.Tensor]:
        """What every unit reads, and what it would write with all its channels, if the block runs with the old weights.

        Returns:
            Rows, each a token of its own with the gain 1; and the outputs of the whole units, float32 (row, outputs).
        """
        self._written = [[[] for _ in ffn.members] for ffn in self._ffns]
        self._whole = [[matrix_of(self._chain.model, member.write.matrix) for member in ffn.members] for ffn in self._ffns]
        try:
            with self.taken_out(self.prior()):
                self._chain.run(self._number, call, hidden)
        finally:
            self._whole = None
        rows, written, start = [], [], 0
        for part, seen in enumerate(self._once()):
            inputs = torch.cat([self._empty(part), *(item for item in seen if item is not None)])
            counts = tuple(0 if item is None else len(item) for item in seen)
            token = torch.arange(start, start + len(inputs), device=inputs.device)
            rows.append(Rows(inputs, token, inputs.new_ones(len(inputs)), counts))
            written += [item for of_unit in self._written[part] for item in of_unit]
            start += len(inputs)
        return tuple(rows), torch.cat([self.weights[0].new_zeros(0, self.outputs), *written])

    def narrow(self, call: Call, hidden: torch.Tensor) -> None:
        """Compute only the kept channels from now on, if the block's code allows it. ``hidden`` is used to try."""
        positions = self._positions()
        covered = {part for part in range(len(self._ffns)) if self._covered(part)}
        names = {place.parameter for part in covered for unit in self._places(part) for place in unit}
        if not names:
            return
        prior = self.prior()
        _, before = self.run(call, hidden, prior)
        parameters = {name: self._chain.model.get_parameter(name) for name in names}
        whole = {name: parameter.data for name, parameter in parameters.items()}
        axes = {place.parameter: place.axis for part in covered for unit in self._places(part) for place in unit}
        for name, parameter in parameters.items():
            rows = {index: found for (other, index), found in positions.items() if other == name}
            if None in rows:
                parameter.data = whole[name].index_select(axes[name], rows[None])
            else:
                parameter.data = torch.stack(
                    [whole[name][index].index_select(axes[name], rows[index]) for index in range(len(rows))]
                )
        self._narrow = covered
        try:
            _, after = self.run(call, hidden, prior)
            worked = after.shape == before.shape and is_close(after, before, before)
        except (RuntimeError, ValueError, TypeError, IndexError):
            # The code takes the width from the config, not from the weights.
            worked = False
        if worked:
            self._narrowed = {key: rows for key, rows in positions.items() if key[0] in names}
        else:
            self._narrow = set()
            for name, parameter in parameters.items():
                parameter.data = whole[name]

    def read_leaves(self, free: Sequence[torch.Tensor]) -> list[Leaf]:
        """The parameters of the read projections, in float32, with the elements of the kept channels free to change.

        Empty if the channels' rows of an FFN cannot be told apart from other weights.

        Args:
            free: Whether each unit may change, bool (unit,), for each FFN.
        """
        if not all(self._adaptable(ffn) for ffn in self._ffns):
            return []
        masks: dict[str, torch.Tensor] = {}
        for part in range(len(self._ffns)):
            for unit, places in enumerate(self._places(part)):
                for place in places:
                    parameter = self._chain.model.get_parameter(place.parameter)
                    axis = place.axis + (place.index is not None)
                    if place.parameter not in masks:
                        parameter.data = parameter.data.float()
                        shape = [
                            size if other == axis or (other == 0 and place.index is not None) else 1
                            for other, size in enumerate(parameter.shape)
                        ]
                        masks[place.parameter] = torch.zeros(shape, device=parameter.device)
                    if bool(free[part][unit]):
                        mask = masks[place.parameter]
                        mask = mask if place.index is None else mask[place.index]
                        mask.index_fill_(place.axis, self._now(place), 1)
        return [
            Leaf(self._chain.model.get_parameter(name), None if bool(mask.all()) else mask)
            for name, mask in masks.items()
            if bool(mask.any())
        ]

    def reads(self) -> list[dict[str, torch.Tensor]]:
        """For each FFN, role of each read projection to its rows of the kept channels, (unit, kept, inputs), and of its biases, (unit, kept).

        Empty if the rows of an FFN cannot be told apart from other weights.
        """
        found: list[dict[str, torch.Tensor]] = []
        if not all(self._adaptable(ffn) for ffn in self._ffns):
            return [{} for _ in self._ffns]
        for part in range(len(self._ffns)):
            roles: dict[str, list[torch.Tensor]] = defaultdict(list)
            for places in self._places(part):
                for place in places:
                    values = self._element(place).index_select(place.axis, self._now(place))
                    roles[place.role].append(values.T if place.axis else values)
            found.append({role: torch.stack(values) for role, values in roles.items()})
        return found

    def set_reads(self, values: Sequence[Mapping[str, torch.Tensor]], dtype: torch.dtype) -> None:
        """Replace the rows of the kept channels by ``values`` as `reads` gives them, and compute in ``dtype`` again."""
        for part, roles in enumerate(values):
            for unit, places in enumerate(self._places(part)):
                for place in places:
                    element = self._element(place)
                    new = roles[place.role][unit].to(element)
                    element.index_copy_(place.axis, self._now(place), new.T.contiguous() if place.axis else new)
        for name in {name for name, _ in self._positions()}:
            parameter = self._chain.model.get_parameter(name)
            parameter.data = parameter.data.to(dtype)

    def _element(self, place: _Place) -> torch.Tensor:
        values = self._chain.model.get_parameter(place.parameter).detach()
        return values if place.index is None else values[place.index]

    def _now(self, place: _Place) -> torch.Tensor:
        """The present positions of the channels of ``place``."""
        return torch.searchsorted(self._narrowed[place.key], place.rows) if place.key in self._narrowed else place.rows

    def _places(self, part: int) -> Iterator[list[_Place]]:
        """The places of the read projections of every unit of an FFN."""
        for member, ids in zip(self._ffns[part].members, self._kept[part], strict=True):
            places = []
            for read in member.reads:
                matrix, bias = read.projection.matrix, read.projection.bias
                rows = read.start + read.step * ids
                # The rows of experts that lie one after the other in one parameter begin at their expert's first row.
                own = rows + (matrix.row if matrix.index is None and not matrix.transposed else 0)
                places.append(_Place(read.role, matrix.parameter, matrix.index, int(matrix.transposed), own))
                if bias is not None:
                    places.append(_Place(f"{read.role}_bias", bias.parameter, bias.index, 0, rows))
            yield places

    def _positions(self) -> dict[tuple[str, int | None], torch.Tensor]:
        """The original positions of the kept channels of all roles, ascending, in each parameter, or in each of its elements."""
        found: dict[tuple[str, int | None], list[torch.Tensor]] = defaultdict(list)
        for part in range(len(self._ffns)):
            for places in self._places(part):
                for place in places:
                    found[place.key].append(place.rows)
        return {key: torch.cat(rows).sort().values for key, rows in found.items()}

    def _covered(self, part: int) -> bool:
        """Whether the parameters of the reads of an FFN hold nothing but its channels."""
        ffn = self._ffns[part]
        if not self._adaptable(ffn):
            return False
        counts: dict[tuple[str, int | None], int] = defaultdict(int)
        axes: dict[str, int] = {}
        for places in self._places(part):
            for place in places:
                counts[place.key] += ffn.width
                axes[place.parameter] = place.axis + (place.index is not None)
        elements: dict[str, int] = defaultdict(int)
        for name, _ in counts:
            elements[name] += 1
        shapes = {name: self._chain.model.get_parameter(name).shape for name in axes}
        return all(
            shapes[name][axes[name]] == count and (index is None or shapes[name][0] == elements[name])
            for (name, index), count in counts.items()
        )

    def _adaptable(self, ffn: FFN) -> bool:
        """Whether each role of an FFN is one matrix, whose channels lie along one axis."""
        for read in ffn.members[0].reads:
            matrix, bias = read.projection.matrix, read.projection.bias
            if (matrix.transposed and matrix.row) or (bias is not None and matrix.row):
                return False
        return len({read.role for read in ffn.members[0].reads}) == len(ffn.members[0].reads)

    def _bias(self, ffn: FFN) -> torch.Tensor | None:
        biases = [member.write.bias for member in ffn.members if member.write.bias is not None]
        if len(biases) < len(ffn.members):
            return None
        return torch.stack([bias_of(self._chain.model, bias).float() for bias in biases])

    def _emptied_axes(self) -> dict[str, int]:
        """Parameters that hold only write projections, and their axis of channels."""
        found = {}
        for ffn in self._ffns:
            for member in ffn.members:
                matrix = member.write.matrix
                shape = self._chain.model.get_parameter(matrix.parameter).shape
                own = (matrix.outputs, matrix.inputs)[:: -1 if matrix.transposed else 1]
                if shape in (own, (len(ffn.members), *own)):
                    found[matrix.parameter] = len(shape) - (2 if matrix.transposed else 1)
        return found

    @contextlib.contextmanager
    def taken_out(self, write: Writes | None) -> Iterator[None]:
        """In the body, the write projections are taken out, and ``write`` is in their place."""
        self._put_in = write
        self.seen = [[[] for _ in ffn.members] for ffn in self._ffns]
        whole = {name: self._chain.model.get_parameter(name).data for name in self._emptied}
        for name, axis in self._emptied.items():
            # A product over zero channels costs nothing.
            self._chain.model.get_parameter(name).data = whole[name].narrow(axis, 0, 0)
        try:
            with self._interceptor:
                yield
        finally:
            for name, values in whole.items():
                self._chain.model.get_parameter(name).data = values

    def _matrix(self, part: int) -> Matrix:
        return self._ffns[part].members[0].write.matrix

    def _before(self, part: int, unit: int, inputs: torch.Tensor) -> torch.Tensor:
        batched = self._matrix(part).batched
        kept = self._kept[part]
        for number in range(len(kept)) if batched else (unit,):
            own = inputs[number] if batched else inputs.reshape(-1, inputs.shape[-1])
            self.seen[part][number].append((own if part in self._narrow else own[:, kept[number]]).float())
            if self._whole is not None:
                self._written[part][number].append(own.float() @ self._whole[part][number].float().T)
        # The product gives zeros, so no gradient goes through it.
        nothing = inputs.detach()
        return nothing[..., :0] if self._matrix(part).parameter in self._emptied else torch.zeros_like(nothing)

    def _after(self, part: int, unit: int, output: torch.Tensor) -> torch.Tensor | None:
        if self._leaves is not None:
            leaf = torch.zeros_like(output, requires_grad=True)
            self._leaves.append((part, unit, leaf))
            return output + leaf
        if self._put_in is None:
            return None
        seen, write = self.seen[part], self._put_in.parts[part]
        if self._matrix(part).batched:
            written = torch.stack([write.of_unit(number, of_unit[-1]) for number, of_unit in enumerate(seen)])
        else:
            written = write.of_unit(unit, seen[unit][-1])
        return output + written.to(output.dtype).reshape(output.shape)

    def _once(self) -> list[list[torch.Tensor | None]]:
        """The activations of every unit, None if no token reached it."""
        for ffn, of_part in zip(self._ffns, self.seen, strict=True):
            times = max(len(calls) for calls in of_part)
            if times > 1:
                raise ModelError(f"{ffn.container} runs {times} times in its block, and --recover fits FFNs that run once")
        return [[calls[0] if calls else None for calls in of_part] for of_part in self.seen]

    def _empty(self, part: int) -> torch.Tensor:
        return self.weights[part].new_zeros(0, self._kept[part].shape[1])

    def _decoded(
        self, part: int, seen: Sequence[torch.Tensor | None], slopes: Mapping[int, torch.Tensor], codes: torch.Tensor
    ) -> Rows | None:
        """The rows of an FFN, from the gradients of its calls; None if the gradients are not those of a weighted sum."""
        inputs, tokens, gains = [self._empty(part)], [], []
        counts = [0] * len(seen)
        for unit, activations in enumerate(seen):
            slope = slopes.get(unit)
            if activations is None or slope is None:
                continue
            found = _spelled(slope.reshape(len(activations), -1).float(), codes)
            if found is None:
                return None
            token, gain = found
            # A batched product computes all experts on all tokens, with inputs of 0 for the experts that were not chosen.
            there = (gain != 0) & (activations != 0).any(1) if self._matrix(part).batched else gain != 0
            inputs.append(activations[there])
            tokens.append(token[there])
            gains.append(gain[there])
            counts[unit] = int(there.sum())
        nothing = codes.new_zeros(0)
        return Rows(torch.cat(inputs), torch.cat([nothing.long(), *tokens]), torch.cat([nothing, *gains]), tuple(counts))


def _codes(tokens: int, features: int, device: torch.device) -> torch.Tensor | None:
    """Coefficients of every token, 1 or -1: first a 1, then the bits of its number, then random signs, float32 (token, feature).

    None if there are too few features for the numbers.
    """
    digits = _digits(tokens)
    if features < digits + 1:
        return None
    signs = torch.randint(0, 2, (tokens, features), generator=torch.Generator().manual_seed(0))
    signs[:, 0] = 1
    signs[:, 1 : digits + 1] = (torch.arange(tokens)[:, None] >> torch.arange(digits)) & 1
    return (2.0 * signs - 1).to(device)


def _spelled(slopes: torch.Tensor, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Token and gain of each row of ``slopes`` (row, feature), which should be a gain times the coefficients of a token.

    None if a row is something else.
    """
    gain = slopes[:, 0]
    digits = _digits(len(codes))
    bits = (slopes[:, 1 : digits + 1] * gain[:, None] > 0).long()
    token = (bits << torch.arange(digits, device=bits.device)).sum(1)
    if len(slopes) and int(token.max()) >= len(codes):
        return None
    wrong = (slopes - gain[:, None] * codes[token]).abs().amax(1)
    return None if bool((wrong > _TOLERANCE * gain.abs()).any()) else (token, gain)


def _digits(tokens: int) -> int:
    return max(1, (tokens - 1).bit_length())
