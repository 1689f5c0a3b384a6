"""The model of an atlas or a plan: how it is found, and whether it is the model that was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import ModelError, UsageError
from chanfmt.base.hub_ids import is_commit, is_hub_id
from chanfmt.base.narrate import say
from chanfmt.format.show import short
from chanfmt.hub.locate import hub_model, locate_model, main_commit, model_name
from chanfmt.models.accounting import check_accounted
from chanfmt.models.source import ModelSource, check_plain, own_revision
from surgery.cut.stock import parse_config
from surgery.result.names import REPORT_FILE

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
    if given is None:
        check_name(model)
        found = hub_model(model.id, revision=revision or model.revision or None)
    else:
        name = model_name(given)
        found = locate_model(name, revision=revision or own_revision(name, model))
    if found.source != "hub" or found.id != model.id or model.source != "hub":
        return found
    if model.revision and found.revision != model.revision:
        say(f"using {found.id} at {found.revision[:12]}; the atlas was measured at {model.revision[:12]}")
    main = main_commit(found)
    if main and main != found.revision:
        say(f"{found.id} has moved on: its main branch is at {main[:12]}, and this uses {found.revision[:12]}")
    return found


def check_name(model: Named) -> None:
    """Raise `UsageError` unless ``model``, which a file names, can be looked up on the Hub.

    A file may name anything: a path, or a branch with a path in its name. Nothing but a Hub id and a commit is looked up.
    """
    if model.source != "hub":
        raise UsageError(
            f"the atlas was built from a local model named {short(model.id)!r}, and does not say where it is",
            hint="add --model DIRECTORY_OR_GGUF_FILE",
        )
    if not is_hub_id(model.id):
        raise UsageError(
            f"the atlas says that {short(model.id)!r} is a model on the Hub, and the Hub has no such names",
            hint="if you trust the atlas, add --model MODEL",
        )
    if model.revision and not is_commit(model.revision):
        raise UsageError(
            f"the atlas names the revision {short(model.revision)!r} of {model.id}, which is not a commit",
            hint=f"if you trust the atlas, add --model {model.id}",
        )


def check_fingerprint(model: Named, source: ModelSource, way_out: str = "") -> None:
    """Raise `ModelError` if ``source`` has other weights than ``model``, from which the atlas was built.

    Args:
        way_out: A further way out, for the end of the hint.
    """
    if source.fingerprint != model.fingerprint and (source.directory / REPORT_FILE).is_file():
        raise ModelError(
            f"{source.directory} is a result of surgery, and not the model of the atlas, {model.id!r}",
            hint="pass the model that the atlas was built from; to cut a result again, build an atlas of it first",
        )
    if source.fingerprint != model.fingerprint:
        raise ModelError(
            f"{source.directory} is not the model of the atlas: its weights differ from those of {model.id!r}",
            hint=f"pass the model (and the revision) that the atlas was built from{way_out}",
        )


def plain_config(source: ModelSource) -> dict[str, Any]:
    """The fields of ``source``'s ``config.json``, after every tensor of its files was accounted for.

    Raises:
        ModelError: As `chanfmt.models.accounting.check_accounted`: the weights are quantised, an adapter lies beside them, or
            the class would ignore a tensor. As `surgery.cut.stock.parse_config`, if stock code does not know the model type.
    """
    check_plain(source)
    parse_config(source.config_fields)
    check_accounted(source)
    return source.config_fields
