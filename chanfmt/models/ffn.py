"""The parts of an FFN of a model, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Matrix:
    """One matrix that a product applies: a parameter, or a slice of a parameter.

    Attributes:
        parameter: Name of the parameter in the model.
        index: Index on the parameter's first axis if that axis runs over experts; otherwise None.
        row: First row on the parameter's first axis if the matrix is a run of its rows; otherwise 0.
        transposed: Whether the matrix is stored as (inputs, outputs) rather than (outputs, inputs).
        inputs, outputs: Size of the matrix.
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
    """The bias added to a product: a vector parameter, or row ``index`` of a matrix parameter."""

    parameter: str
    index: int | None


@dataclass(frozen=True)
class Projection:
    """A linear map of the model: a matrix and perhaps a bias."""

    matrix: Matrix
    bias: Bias | None


@dataclass(frozen=True)
class Read:
    """A read projection in one role, ``gate`` or ``up``: channel i is output ``start + i * step`` of ``projection``."""

    projection: Projection
    role: str
    start: int
    step: int


@dataclass(frozen=True)
class Member:
    """The projections of a dense FFN, or of one expert.

    Attributes:
        write: The write projection.
        reads: The read projections: ``gate`` first if the FFN is gated, then ``up``. A role has several read projections if
            an adapter lies beside the first.
    """

    write: Projection
    reads: tuple[Read, ...]


@dataclass(frozen=True)
class FFN:
    """One FFN of a model, or the routed experts of one layer.

    Attributes:
        layer_index: Position of its block in the model.
        place: ``decoder``, ``encoder`` or ``other``.
        kind: ``dense``, ``shared`` or ``experts``.
        container: Name of the smallest module that holds the read and write projections.
        members: One member for each expert; a single member for a dense or shared FFN.
        width: Number of channels; for experts, of each expert.
        uses: How many times the model applies the FFN to a token.
        mixed: Whether numbers computed from all channels (a norm, a threshold) act between the reads and the write.
        other_maps: The other linear maps of its block, such as those of attention and a router, in the order in which they run.
            The first FFN of a block has them.
    """

    layer_index: int
    place: str
    kind: str
    container: str
    members: tuple[Member, ...]
    width: int
    uses: int = 1
    mixed: bool = False
    other_maps: tuple[Matrix, ...] = ()

    @property
    def gated(self) -> bool:
        """Whether the FFN has a gate."""
        return any(read.role == "gate" for read in self.members[0].reads)

    @property
    def experts(self) -> int:
        """Number of routed experts; 0 for a dense or shared FFN."""
        return len(self.members) if self.kind == "experts" else 0

    @property
    def write(self) -> str:
        """Name of the parameter that holds the write projection, or the first expert's."""
        return self.members[0].write.matrix.parameter

    @property
    def outputs(self) -> int:
        """Number of residual dimensions that the FFN writes to."""
        return self.members[0].write.matrix.outputs

    @property
    def read_inputs(self) -> int:
        """Length of the vectors that the read projections read."""
        return self.members[0].reads[0].projection.matrix.inputs
