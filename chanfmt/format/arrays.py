"""What an open atlas offers of its arrays, for modules that the reader itself builds on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import numpy as np

    from chanfmt.format import schema
    from chanfmt.format.records import Block


class StackArrays(Protocol):
    """What `chanfmt.format.reader.Stack` offers of its arrays."""

    name: str
    kind: str
    activation: str
    layers: np.ndarray
    n_channels: int
    n_experts: int
    splits: int
    supports: tuple[int, ...]

    @property
    def variables(self) -> list[str]: ...
    @property
    def all_metrics(self) -> list[schema.Variable]: ...
    @property
    def extension_metrics(self) -> list[schema.Variable]: ...
    def __contains__(self, name: str) -> bool: ...
    def __getitem__(self, name: str) -> np.ndarray: ...
    def row(self, name: str, row: int) -> np.ndarray: ...


class AtlasArrays(Protocol):
    """What `chanfmt.format.reader.Atlas` offers of its arrays."""

    path: Path

    @property
    def stacks(self) -> Mapping[str, StackArrays]: ...
    def rows(self) -> Iterator[tuple[Block, StackArrays]]: ...
