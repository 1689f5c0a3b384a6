"""Which model an atlas or a plan is of, and whether the one at hand is that model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chanfmt.base.errors import ModelError, UsageError
from chanfmt.base.narrate import say
from chanfmt.hub.locate import locate_model, main_commit
from chanfmt.models.source import own_revision

if TYPE_CHECKING:
    from pathlib import Path

    from chanfmt.models.source import ModelSource, Named


def find_model(model: Named, given: str | None, revision: str | None = None) -> ModelSource:
    """The model of an atlas or a plan, at the commit that was measured, or what the user names in its place.

    Args:
        given: What the user names.
        revision: Branch, tag or commit in place of the measured one.

    Raises:
        UsageError: The model is on some machine only.
        ModelError: It cannot be had.
    """
    name = _name_of(model) if given is None else given
    found = locate_model(name, revision=revision or own_revision(name, model))
    if found.source != "hub" or found.id != model.id or model.source != "hub":
        return found
    if model.revision and found.revision != model.revision:
        say(f"using {found.id} at {found.revision[:12]}; the atlas was measured at {model.revision[:12]}")
    main = main_commit(found)
    if main and main != found.revision:
        say(f"{found.id} has moved on: its main branch is at {main[:12]}, and this uses {found.revision[:12]}")
    return found


def _name_of(model: Named) -> str:
    """Where the atlas says its model is. Raises `UsageError` where that is on some machine only."""
    if model.source != "hub":
        raise UsageError(
            f"the atlas was built from a local model named {model.id!r}, and does not say where it is",
            hint="add --model DIRECTORY_OR_GGUF_FILE",
        )
    return model.id


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
