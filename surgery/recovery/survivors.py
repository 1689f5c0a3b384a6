"""Run a block of a model with the kept channels of its FFN, and see their activations and the block's output."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from chanfmt.base.errors import ModelError
from chanfmt.models.find.intercept import Interceptor
from chanfmt.models.matrices import matrix_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from chanfmt.models.ffn import FFN, Read
    from chanfmt.models.streaming.chain import Call, Chain

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 5e-2


@dataclass(frozen=True, eq=False)
class Write:
    """New weights for the kept channels; the original bias is passed separately.

    Attributes:
        weight: Write vectors as columns, float32 (outputs, kept).
        shift: Change of the bias, float32 (outputs,); None for no change.
    """

    weight: torch.Tensor
    shift: torch.Tensor | None = None

    def of(self, activations: torch.Tensor) -> torch.Tensor:
        """The output for ``activations`` (token, kept), (token, outputs)."""
        written = activations @ self.weight.T
        return written if self.shift is None else written + self.shift

    def of_unit(self, unit: int, activations: torch.Tensor) -> torch.Tensor:
        """As `of` with the weights of one of several units: weight (unit, outputs, kept), shift (unit, outputs)."""
        return Write(self.weight[unit], None if self.shift is None else self.shift[unit]).of(activations)

    def copy(self) -> Write:
        """The same weights, independent of these."""
        return Write(self.weight.clone(), None if self.shift is None else self.shift.clone())

    def leaves(self) -> list[Leaf]:
        """The weights, which an adaptation changes in place."""
        return [Leaf(values) for values in (self.weight, self.shift) if values is not None]


@dataclass(frozen=True, eq=False)
class Leaf:
    """A parameter that an adaptation changes.

    Attributes:
        parameter: The parameter, float32.
        mask: 1 at elements that may change, 0 at the others; None if all may.
    """

    parameter: torch.Tensor
    mask: torch.Tensor | None = None


class Survivors:
    """The kept channels of a loaded block's FFN.

    In every run of this class, the write projection is taken out: its input is recorded, and its output is replaced by that of
    another matrix, or by nothing. Until `narrow` is called, other runs of the block are unchanged.

    Args:
        number: Number of the block in ``chain``. The block is loaded.
        ffn: A dense FFN of that block.
        kept: Ids of the channels that stay, int64 (kept,).

    Attributes:
        weight: The write vectors of the kept channels as columns, float32 (outputs, kept).
        bias: Bias of the write projection, float32 (outputs,); None if it has none.
    """

    def __init__(self, chain: Chain, number: int, ffn: FFN, kept: torch.Tensor) -> None:
        self._chain = chain
        self._number = number
        self._ffn = ffn
        self._matrix = ffn.members[0].write.matrix
        self._kept: torch.Tensor | None = kept
        self._ids = kept
        self._parameter = chain.model.get_parameter(self._matrix.parameter)
        self.weight = matrix_of(chain.model, self._matrix)[:, kept].float()
        bias = ffn.members[0].write.bias
        self.bias = None if bias is None else chain.model.get_parameter(bias.parameter).detach().float()
        self._put_in: Write | None = None
        self._narrowed: dict[str, torch.Tensor] = {}
        self._module = chain.model.get_submodule(ffn.container)
        self._seen: list[torch.Tensor] = []
        self._interceptor = Interceptor(chain.model)
        self._interceptor.on(self._matrix, before=self._before, after=self._after)

    def run(self, call: Call, hidden: torch.Tensor, write: Write | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block on ``hidden``.

        Args:
            write: The write projection of the kept channels; None for none, so that the FFN writes only its bias.

        Returns:
            The activations, float32 (token, kept), and the block's output (sequence, position, feature).

        Raises:
            ModelError: The block does not run the FFN exactly once.
        """
        with self._out(write):
            output = self._chain.run(self._number, call, hidden)
        seen, self._seen = self._seen, []
        if len(seen) != 1:
            raise ModelError(f"{self._ffn.container} runs {len(seen)} times in its block, and --recover fits FFNs that run once")
        return seen[0], output

    @contextlib.contextmanager
    def _out(self, write: Write | None = None) -> Iterator[None]:
        """In the body, the write projection is taken out, and ``write`` is in its place."""
        self._put_in = write
        self._seen = []
        whole = self._parameter.data
        if self._alone(whole):
            # A product over zero channels costs nothing.
            self._parameter.data = whole.narrow(0 if self._matrix.transposed else 1, 0, 0)
        try:
            with self._interceptor:
                yield
        finally:
            self._parameter.data = whole

    def adds(self, call: Call, hidden: torch.Tensor) -> bool:
        """Whether the block adds the FFN's output to its own output. It does not if a norm follows the FFN, for example."""
        write = Write(self.weight)
        activations, without = self.run(call, hidden)
        _, output = self.run(call, hidden, write)
        update = write.of(activations).reshape(output.shape)
        return is_close(output.float() - without.float(), update, output)

    def narrow(self, call: Call, hidden: torch.Tensor) -> None:
        """Compute only the kept channels from now on, if the block's code allows it. ``hidden`` is used to try."""
        narrowed = self._narrowed_reads()
        if narrowed is None:
            return
        before, _ = self.run(call, hidden)
        parameters = {name: self._chain.model.get_parameter(name) for name in narrowed}
        whole = {name: parameter.data for name, parameter in parameters.items()}
        kept, self._kept = self._kept, None
        for name, parameter in parameters.items():
            parameter.data = narrowed[name]
        try:
            after, _ = self.run(call, hidden)
            worked = after.shape == before.shape and is_close(after, before, before)
        except (RuntimeError, ValueError, TypeError, IndexError):
            # The code takes the width from the config, not from the weights.
            worked = False
        if worked:
            self._narrowed = {name: rows for (name, _), rows in self._positions().items()}
        else:
            self._kept = kept
            for name, parameter in parameters.items():
                parameter.data = whole[name]

    def read_and_run(self, call: Call, hidden: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """`run` without a write projection, and in front of its results what the FFN's module read; None if the module takes more
        than one tensor."""
        seen: list[torch.Tensor | None] = []

        def record(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
            single = len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor)
            seen.append(args[0] if single else None)  # type: ignore[arg-type]

        handle = self._module.register_forward_pre_hook(record, with_kwargs=True)
        try:
            activations, output = self.run(call, hidden)
        finally:
            handle.remove()
        return (seen[0] if len(seen) == 1 else None), activations, output

    def activations(self, inputs: torch.Tensor) -> torch.Tensor:
        """Activations of the kept channels, float32 (token, kept), when the FFN's module reads ``inputs``."""
        with self._out():
            self._module(inputs)
        seen, self._seen = self._seen, []
        return seen[0]

    def stands_alone(self, call: Call, hidden: torch.Tensor) -> bool:
        """Whether the FFN's module, given what it reads, has the activations that it has in its block."""
        inputs, expected, _ = self.read_and_run(call, hidden)
        if inputs is None:
            return False
        found = self.activations(inputs)
        return found.shape == expected.shape and is_close(found, expected, expected)

    def read_leaves(self) -> list[Leaf]:
        """The parameters of the read projections, in float32, with the elements of the kept channels free to change.

        Empty if the rows of the channels cannot be told apart from other weights.
        """
        if not self._adaptable():
            return []
        leaves = []
        for (name, axis), rows in self._positions().items():
            parameter = self._chain.model.get_parameter(name)
            parameter.data = parameter.data.float()
            mask = None
            if name not in self._narrowed:
                mask = torch.zeros(parameter.shape[axis], device=parameter.device)
                mask[rows] = 1
                mask = mask.reshape([-1 if other == axis else 1 for other in range(parameter.ndim)])
            leaves.append(Leaf(parameter, mask))
        return leaves

    def reads(self) -> dict[str, torch.Tensor]:
        """Role of each read projection to its rows of the kept channels, (kept, inputs), and of its bias, (kept,).

        Empty if the rows cannot be told apart from other weights.
        """
        return {role: values.clone() for role, values, _, _ in self._read_values()}

    def set_reads(self, values: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Replace the rows of the kept channels by ``values`` as `reads` gives them, and compute in ``dtype`` again."""
        for role, _, (name, axis), rows in self._read_values():
            parameter = self._chain.model.get_parameter(name)
            new = values[role].to(parameter)
            parameter.data.index_copy_(axis, rows, new.T.contiguous() if axis else new)
        for name in {name for name, _ in self._positions()}:
            parameter = self._chain.model.get_parameter(name)
            parameter.data = parameter.data.to(dtype)

    def _adaptable(self) -> bool:
        """Whether each role is one matrix, whose channels lie along one axis."""
        reads = self._ffn.members[0].reads
        for read in reads:
            matrix, bias = read.projection.matrix, read.projection.bias
            if matrix.index is not None or (matrix.transposed and matrix.row) or (bias is not None and bias.index is not None):
                return False
        return len({read.role for read in reads}) == len(reads)

    def _read_values(self) -> Iterator[tuple[str, torch.Tensor, tuple[str, int], torch.Tensor]]:
        """Role, values, parameter with the axis of its channels, and the present positions on that axis, of every read."""
        for read in self._ffn.members[0].reads if self._adaptable() else ():
            for role, key, rows in self._rows(read):
                name, axis = key
                rows = torch.searchsorted(self._narrowed[name], rows) if name in self._narrowed else rows
                values = self._chain.model.get_parameter(name).detach().index_select(axis, rows)
                yield role, (values.T if axis else values), key, rows

    def _rows(self, read: Read) -> Iterator[tuple[str, tuple[str, int], torch.Tensor]]:
        """Role, parameter with the axis of its channels, and the original positions of the kept channels on that axis."""
        matrix, bias = read.projection.matrix, read.projection.bias
        rows = read.start + read.step * self._ids
        yield read.role, (matrix.parameter, int(matrix.transposed)), rows + (0 if matrix.transposed else matrix.row)
        if bias is not None:
            yield f"{read.role}_bias", (bias.parameter, 0), rows

    def _positions(self) -> dict[tuple[str, int], torch.Tensor]:
        """The original positions of the kept channels of all roles, ascending, in each parameter of the reads."""
        found: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)
        for read in self._ffn.members[0].reads:
            for _, key, rows in self._rows(read):
                found[key].append(rows)
        return {key: torch.cat(rows).sort().values for key, rows in found.items()}

    def _before(self, inputs: torch.Tensor) -> torch.Tensor:
        activations = inputs.reshape(-1, inputs.shape[-1])
        self._seen.append((activations if self._kept is None else activations[:, self._kept]).float())
        return inputs[..., :0] if not self._parameter.numel() else torch.zeros_like(inputs)

    def _after(self, output: torch.Tensor) -> torch.Tensor | None:
        if self._put_in is None:
            return None
        return output + self._put_in.of(self._seen[-1]).to(output.dtype).reshape(output.shape)

    def _alone(self, parameter: torch.Tensor) -> bool:
        """Whether the parameter holds only the write projection."""
        shape = (self._matrix.outputs, self._matrix.inputs)
        return parameter.shape == (shape[::-1] if self._matrix.transposed else shape)

    def _narrowed_reads(self) -> dict[str, torch.Tensor] | None:
        """Parameters of the read projections, reduced to the kept channels; None if they hold other weights too."""
        assert self._kept is not None
        positions: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)
        for read in self._ffn.members[0].reads:
            matrix, bias = read.projection.matrix, read.projection.bias
            if matrix.index is not None or (bias is not None and bias.index is not None):
                return None
            rows = read.start + read.step * self._kept
            positions[matrix.parameter, int(matrix.transposed)].append(rows)
            if bias is not None:
                positions[bias.parameter, 0].append(rows)
        narrowed = {}
        for (name, axis), rows_of_roles in positions.items():
            parameter = self._chain.model.get_parameter(name).data
            if parameter.shape[axis] != len(rows_of_roles) * self._ffn.width:
                return None
            narrowed[name] = parameter.index_select(axis, torch.cat(rows_of_roles).sort().values)
        return narrowed


def is_close(one: torch.Tensor, other: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether two tensors differ by no more than the rounding of numbers as large as those of ``scale``."""
    tolerance = _TOLERANCE.get(scale.dtype, _HALF_TOLERANCE)
    return float((one - other).abs().max()) <= tolerance * float(scale.abs().max())
