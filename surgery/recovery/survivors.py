"""Run a block of a model with what stays of its FFN: what those channels give, and what the block makes of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from chanfmt.base.errors import ModelError
from chanfmt.models.find.intercept import Interceptor
from chanfmt.models.matrices import matrix_of

if TYPE_CHECKING:
    from chanfmt.models.ffn import FFN
    from chanfmt.models.streaming.chain import Call, Chain

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 5e-2


@dataclass(frozen=True, eq=False)
class Write:
    """What is made of the channels that stay, besides the bias that was there.

    Attributes:
        weight: Write vectors as columns, (outputs, kept) float32.
        shift: What the bias gains, (outputs,) float32; None for nothing.
    """

    weight: torch.Tensor
    shift: torch.Tensor | None = None

    def of(self, activations: torch.Tensor) -> torch.Tensor:
        """What ``activations`` (token, kept) write, (token, outputs)."""
        written = activations @ self.weight.T
        return written if self.shift is None else written + self.shift


class Survivors:
    """The channels of a loaded block's FFN that stay.

    The write projection is taken out of every run here: its input is seen, and what it gives is that of
    another matrix, or nothing. Other runs of the block are as ever, up to `narrow`.

    Args:
        number: The block in ``chain``, which is loaded.
        ffn: Dense, in that block.
        kept: Ids of the channels that stay, int64 (kept,).

    Attributes:
        weight: Their write vectors as columns, (outputs, kept) float32.
        bias: What the write projection adds, (outputs,) float32; None where it has no bias.
    """

    def __init__(self, chain: Chain, number: int, ffn: FFN, kept: torch.Tensor) -> None:
        self._chain = chain
        self._number = number
        self._ffn = ffn
        self._matrix = ffn.members[0].write.matrix
        self._kept: torch.Tensor | None = kept
        self._parameter = chain.model.get_parameter(self._matrix.parameter)
        self.weight = matrix_of(chain.model, self._matrix)[:, kept].float()
        bias = ffn.members[0].write.bias
        self.bias = None if bias is None else chain.model.get_parameter(bias.parameter).detach().float()
        self._put_in: Write | None = None
        self._seen: list[torch.Tensor] = []
        self._interceptor = Interceptor(chain.model)
        self._interceptor.on(self._matrix, before=self._before, after=self._after)

    def run(self, call: Call, hidden: torch.Tensor, write: Write | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """What the channels give for ``hidden`` and what the block does.

        Args:
            write: What is made of them; None for nothing: the FFN then writes its bias only.

        Returns:
            Activations (token, kept), float32; the block's output (sequence, position, feature).

        Raises:
            ModelError: The block does not run the FFN exactly once.
        """
        self._put_in = write
        whole = self._parameter.data
        if self._alone(whole):
            # A product over no channels costs nothing.
            self._parameter.data = whole.narrow(0 if self._matrix.transposed else 1, 0, 0)
        try:
            with self._interceptor:
                output = self._chain.run(self._number, call, hidden)
        finally:
            self._parameter.data = whole
            seen, self._seen = self._seen, []
        if len(seen) != 1:
            raise ModelError(f"{self._ffn.container} runs {len(seen)} times in its block, and --recover fits FFNs that run once")
        return seen[0], output

    def adds(self, call: Call, hidden: torch.Tensor) -> bool:
        """Whether the block's output is what it is without the FFN, plus what that writes: no norm follows, for one."""
        write = Write(self.weight)
        activations, without = self.run(call, hidden)
        _, output = self.run(call, hidden, write)
        update = write.of(activations).reshape(output.shape)
        return _close(output.float() - without.float(), update, output)

    def narrow(self, call: Call, hidden: torch.Tensor) -> None:
        """Compute no other channels from here on, where the block's code allows that, which is tried on ``hidden``."""
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
            worked = after.shape == before.shape and _close(after, before, before)
        except (RuntimeError, ValueError, TypeError, IndexError):
            # Code that goes by the config's width rather than by the weights.
            worked = False
        if not worked:
            self._kept = kept
            for name, parameter in parameters.items():
                parameter.data = whole[name]

    def _before(self, inputs: torch.Tensor) -> torch.Tensor:
        activations = inputs.reshape(-1, inputs.shape[-1])
        self._seen.append((activations if self._kept is None else activations[:, self._kept]).float())
        return inputs[..., :0] if not self._parameter.numel() else torch.zeros_like(inputs)

    def _after(self, output: torch.Tensor) -> torch.Tensor | None:
        if self._put_in is None:
            return None
        return output + self._put_in.of(self._seen[-1]).to(output.dtype).reshape(output.shape)

    def _alone(self, parameter: torch.Tensor) -> bool:
        """Whether the write projection has its parameter to itself."""
        shape = (self._matrix.outputs, self._matrix.inputs)
        return parameter.shape == (shape[::-1] if self._matrix.transposed else shape)

    def _narrowed_reads(self) -> dict[str, torch.Tensor] | None:
        """Parameters of the read projections, reduced to the channels that stay; None where other things lie in them too."""
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


def _close(one: torch.Tensor, other: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether two tensors differ by no more than rounding in numbers like those of ``scale``."""
    tolerance = _TOLERANCE.get(scale.dtype, _HALF_TOLERANCE)
    return float((one - other).abs().max()) <= tolerance * float(scale.abs().max())
