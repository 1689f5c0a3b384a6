"""Groups of options that several `atlas` commands share."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class AtlasOptions:
    """Which atlas."""

    file: str = field(metadata={"help": "atlas: a file, or hf://REPO/FILE", "positional": "FILE", "kind": "atlas"})


@dataclass(frozen=True)
class SeveralAtlasesOptions:
    """Which atlases."""

    files: tuple[str, ...] = field(
        metadata={"help": "two or more atlases: files, or hf://REPO/FILE", "positional": "FILE", "nargs": "+"}
    )


@dataclass(frozen=True)
class OutputOptions:
    """Where the result goes."""

    output: str = field(metadata={"help": "atlas to write", "flag": "--output", "short": "-o", "metavar": "FILE"})
    overwrite: bool = field(default=False, metadata={"help": "replace the output if it exists"})
