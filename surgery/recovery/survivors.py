"""Run a block of a model with the kept channels of its one dense FFN, and see their activations and the block's output."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from chanfmt.base.errors import ModelError
from surgery.recovery.routed import Routed
from surgery.recovery.writes import Write, Writes, is_close

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from torch import nn

    from chanfmt.models.ffn import FFN
    from chanfmt.models.streaming.chain import Call, Chain
    from surgery.recovery.writes import Leaf


class Survivors:
    """The kept channels of a loaded block's dense FFN: a block of `surgery.recovery.routed.Routed` with a single unit.

    Args:
        number: Number of the block in ``chain``. The block is loaded.
        ffn: A dense FFN of that block.
        kept: Ids of the channels that stay, int (kept,).

    Attributes:
        weight: The write vectors of the kept channels as columns, float32 (outputs, kept).
        bias: Bias of the write projection, float32 (outputs,); None if it has none.
    """

    def __init__(self, chain: Chain, number: int, ffn: FFN, kept: np.ndarray) -> None:
        self._unit = Routed(chain, number, [(ffn, kept)])
        self._ffn = ffn
        self._module = chain.model.get_submodule(ffn.container)
        self.weight = self._unit.weights[0][0]
        bias = self._unit.biases[0]
        self.bias = None if bias is None else bias[0]

    def run(self, call: Call, hidden: torch.Tensor, write: Write | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block on ``hidden``.

        Args:
            write: The write projection of the kept channels; None for none, so that the FFN writes only its bias.

        Returns:
            The activations, float32 (token, kept), and the block's output (sequence, position, feature).

        Raises:
            ModelError: The block does not run the FFN exactly once.
        """
        of_unit = None
        if write is not None:
            of_unit = Writes((Write(write.weight[None], None if write.shift is None else write.shift[None]),))
        _, output = self._unit.run(call, hidden, of_unit)
        return self._once(), output

    def adds(self, call: Call, hidden: torch.Tensor) -> bool:
        """Whether the block adds the FFN's output to its own output. It does not if a norm follows the FFN, for example."""
        write = Write(self.weight)
        activations, without = self.run(call, hidden)
        _, output = self.run(call, hidden, write)
        update = write.of(activations).reshape(output.shape)
        return is_close(output.float() - without.float(), update, output)

    def narrow(self, call: Call, hidden: torch.Tensor) -> None:
        """Compute only the kept channels from now on, if the block's code allows it. ``hidden`` is used to try."""
        self._unit.narrow(call, hidden)

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
        with self._unit.taken_out(None):
            self._module(inputs)
        return self._once()

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
        return self._unit.read_leaves([torch.ones(1, dtype=torch.bool)])

    def reads(self) -> dict[str, torch.Tensor]:
        """Role of each read projection to its rows of the kept channels, (kept, inputs), and of its bias, (kept,).

        Empty if the rows cannot be told apart from other weights.
        """
        return {role: values[0] for role, values in self._unit.reads()[0].items()}

    def set_reads(self, values: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Replace the rows of the kept channels by ``values`` as `reads` gives them, and compute in ``dtype`` again."""
        self._unit.set_reads([{role: rows[None] for role, rows in values.items()}], dtype)

    def _once(self) -> torch.Tensor:
        """The activations of the last run, which are forgotten."""
        calls, self._unit.seen = self._unit.seen[0][0], []
        if len(calls) != 1:
            raise ModelError(f"{self._ffn.container} runs {len(calls)} times in its block, and --recover fits FFNs that run once")
        return calls[0]
