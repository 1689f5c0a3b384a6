"""Run a block of a model with the kept channels of its FFN, and see their activations and the block's output."""

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
        self._parameter = chain.model.get_parameter(self._matrix.parameter)
        self.weight = matrix_of(chain.model, self._matrix)[:, kept].float()
        bias = ffn.members[0].write.bias
        self.bias = None if bias is None else chain.model.get_parameter(bias.parameter).detach().float()
        self._put_in: Write | None = None
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
        self._put_in = write
        whole = self._parameter.data
        if self._alone(whole):
            # A product over zero channels costs nothing.
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
        """Whether the block adds the FFN's output to its own output. It does not if a norm follows the FFN, for example."""
        write = Write(self.weight)
        activations, without = self.run(call, hidden)
        _, output = self.run(call, hidden, write)
        update = write.of(activations).reshape(output.shape)
        return _close(output.float() - without.float(), update, output)

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
            worked = after.shape == before.shape and _close(after, before, before)
        except (RuntimeError, ValueError, TypeError, IndexError):
            # The code takes the width from the config, not from the weights.
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


def _close(one: torch.Tensor, other: torch.Tensor, scale: torch.Tensor) -> bool:
    """Whether two tensors differ by no more than the rounding of numbers as large as those of ``scale``."""
    tolerance = _TOLERANCE.get(scale.dtype, _HALF_TOLERANCE)
    return float((one - other).abs().max()) <= tolerance * float(scale.abs().max())
