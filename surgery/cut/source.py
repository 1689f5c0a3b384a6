"""The model of an atlas or a plan: how it is found, and whether it is the model that was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import ModelError, UsageError
from chanfmt.base.narrate import say
from chanfmt.hub.locate import locate_model, main_commit, model_name
from chanfmt.models.accounting import check_accounted
from chanfmt.models.source import ModelSource, own_revision

if TYPE_CHECKING:
    import os

    from chanfmt.models.source import Named


def find_model(model: Named, given: ModelSource | str | os.PathLike[str] | None, revision: str | None = None) -> ModelSource:
    """The model of an atlas or a plan, at the commit that was measured, or the model that the user names instead.

    Args:
        given: What the user names: a model's files, a Hub id, a directory or a ``.gguf`` file; None for ``model``.
        revision: Branch, tag or commit in place of the measured one.

    Raises:
        UsageError: ``model`` was a local model, and nothing is ``given``; or ``given`` is not a name.
        ModelError: The model does not exist, or cannot be downloaded.
    """
    if isinstance(given, ModelSource):
        return given
    name = _name_of(model) if given is None else model_name(given)
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
    """The Hub id of ``model``. Raises `UsageError` if it was a local model."""
    if model.source != "hub":
        raise UsageError(
            f"the atlas was built from a local model named {model.id!r}, and does not say where it is",
            hint="add --model DIRECTORY_OR_GGUF_FILE",
        )
    return model.id


def check_fingerprint(model: Named, source: ModelSource, way_out: str = "") -> None:
    """Raise `ModelError` if ``source`` has other weights than ``model``, from which the atlas was built.

    Args:
        way_out: A further way out, for the end of the hint.
    """
    if source.fingerprint != model.fingerprint:
        raise ModelError(
            f"{source.directory} is not the model of the atlas: its weights differ from those of {model.id!r}",
            hint=f"pass the model (and the revision) that the atlas was built from{way_out}",
        )


def plain_config(source: ModelSource) -> dict[str, Any]:
    """The fields of ``source``'s ``config.json``, after every tensor of its files was accounted for.

    Raises:
        ModelError: As `chanfmt.models.accounting.check_accounted`: the weights are quantised, an adapter lies beside them, or
            the class would ignore a tensor.
    """
    check_accounted(source)
    return source.config_fields
