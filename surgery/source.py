"""Which model an atlas or a plan is of, and whether the one at hand is that model."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Protocol

from chanfmt.command_line import names_directory
from chanfmt.errors import ModelError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from chanfmt.atlas import Atlas


class Named(Protocol):
    """What `chanfmt.records.ModelRecord` and `surgery.plan.PlannedModel` say alike of a model."""

    @property
    def id(self) -> str: ...
    @property
    def revision(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def fingerprint(self) -> str: ...


def model_of(model: Named) -> tuple[str, str | None]:
    """Where the atlas says its model is. Raises `UsageError` where that is on some machine only."""
    if model.source != "hub":
        raise UsageError(
            f"the atlas was built from a local model named {model.id!r}, and does not say where it is",
            hint="add --model DIRECTORY_OR_GGUF_FILE",
        )
    return model.id, model.revision or None


def check_fingerprint(model: Named, directory: Path, found: str, way_out: str = "") -> None:
    """Raise `ModelError` where ``directory``, of fingerprint ``found``, holds other weights than the atlas was built from.

    Args:
        way_out: What the hint says besides.
    """
    if found != model.fingerprint:
        raise ModelError(
            f"{directory} is not the model of the atlas: its weights differ from those of {model.id!r}",
            hint=f"pass the model (and the revision) that the atlas was built from{way_out}",
        )


def tells_directories(atlas: Atlas) -> bool:
    """Whether the commands that ``atlas`` records name directories of a machine, as builds once wrote them."""
    commands = [atlas.producer.command, *(str(line.get("command", "")) for line in atlas.producer.history)]
    return any(names_directory(word.partition("=")[2] if word.startswith("--") else word)
               for command in commands for word in shlex.split(command))
