"""What an FFN of a model is made of, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Matrix:
    """One matrix that a product applies: a parameter, or a slice of one.

    Attributes:
        parameter: Name in the model.
        index: Index on the parameter's first axis, where that axis runs over experts; None otherwise.
        row: First row on the parameter's first axis, where the matrix is a run of its rows.
        transposed: Whether it is stored as (inputs, outputs) rather than (outputs, inputs).
        inputs, outputs: Its size.
        batched: Whether one product applies the matrices of all experts, each to inputs of its own.
    """

    parameter: str
    index: int | None
    row: int
    transposed: bool
    inputs: int
    outputs: int
    batched: bool = False


@dataclass(frozen=True)
class Bias:
    """What is added to a product: a vector parameter, or row ``index`` of a matrix of them."""

    parameter: str
    index: int | None


@dataclass(frozen=True)
class Projection:
    """A linear map of the model."""

    matrix: Matrix
    bias: Bias | None


@dataclass(frozen=True)
class Read:
    """One role of a read projection: channel i is output ``start + i * step`` of ``projection``."""

    projection: Projection
    role: str
    start: int
    step: int


@dataclass(frozen=True)
class Member:
    """A dense FFN's projections, or one expert's.

    Attributes:
        reads: ``gate`` first where there is one, then ``up``; a role can have several (an adapter beside it).
    """

    write: Projection
    reads: tuple[Read, ...]


@dataclass(frozen=True)
class FFN:
    """One FFN as found in a model, or the routed experts of one layer.

    Attributes:
        layer_index: Position of its block in the model.
        place: ``decoder``, ``encoder`` or ``other``.
        kind: ``dense``, ``shared`` or ``experts``.
        container: Smallest module that holds reads and write.
        members: One where it is dense, otherwise one per expert.
        width: Number of channels, of each expert.
        uses: How many times the model applies it to a token.
        mixed: Whether numbers computed from all channels (a norm, a threshold) act between read and write.
    """

    layer_index: int
    place: str
    kind: str
    container: str
    members: tuple[Member, ...]
    width: int
    uses: int = 1
    mixed: bool = False

    @property
    def gated(self) -> bool:
        return any(read.role == "gate" for read in self.members[0].reads)

    @property
    def experts(self) -> int:
        """Number of routed experts, 0 where it is dense or shared."""
        return len(self.members) if self.kind == "experts" else 0

    @property
    def write(self) -> str:
        """Parameter that holds the write projection."""
        return self.members[0].write.matrix.parameter

    @property
    def outputs(self) -> int:
        """Residual dimensions that it writes to."""
        return self.members[0].write.matrix.outputs

    @property
    def read_inputs(self) -> int:
        """Length of the vectors that the read projections read."""
        return self.members[0].reads[0].projection.matrix.inputs
