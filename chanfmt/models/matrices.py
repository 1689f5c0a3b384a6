"""The weight matrices of one FFN of a loaded model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from chanfmt.models.ffn import Bias, Matrix, Member


@dataclass(frozen=True)
class FFNWeights:
    """The weights of one dense FFN or one expert, channel by channel, as views of the parameters.

    Attributes:
        write: Write vectors as columns, (d, m).
        reads: Role (``gate``, ``up``) to read rows, (m, d).
    """

    write: torch.Tensor
    reads: dict[str, torch.Tensor]


def ffn_weights(model: nn.Module, member: Member) -> FFNWeights:
    """Weights of ``member``, on the device and in the dtype of the model."""
    width = member.write.matrix.inputs
    reads: dict[str, torch.Tensor] = {}
    for read in member.reads:
        # The rows of an adapter beside a read projection lie in another space than the residual stream.
        if read.role not in reads:
            reads[read.role] = matrix_of(model, read.projection.matrix)[read.start :: read.step][:width]
    return FFNWeights(matrix_of(model, member.write.matrix), reads)


def matrix_of(model: nn.Module, matrix: Matrix) -> torch.Tensor:
    """The values of ``matrix``, (outputs, inputs), as a view of its parameter."""
    weight = model.get_parameter(matrix.parameter).detach()
    if matrix.index is not None:
        weight = weight[matrix.index]
    elif weight.shape != (matrix.outputs, matrix.inputs) and not matrix.transposed:
        weight = weight[matrix.row : matrix.row + matrix.outputs]
    elif weight.shape != (matrix.inputs, matrix.outputs) and matrix.transposed:
        weight = weight[matrix.row : matrix.row + matrix.inputs]
    return weight.T if matrix.transposed else weight


def bias_of(model: nn.Module, bias: Bias) -> torch.Tensor:
    """The values of ``bias``, (outputs,), as a view of its parameter."""
    values = model.get_parameter(bias.parameter).detach()
    return values if bias.index is None else values[bias.index]
