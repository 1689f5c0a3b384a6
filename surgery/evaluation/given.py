"""The models and the text that a caller names or passes, in one form."""

from __future__ import annotations

import contextlib
import hashlib
import os
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import UsageError
from chanfmt.models.source import ModelSource
from surgery.evaluation.loaded import LoadedModel, is_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from chanfmt.data.text import Text

    GivenModel = str | os.PathLike[str] | ModelSource | LoadedModel | tuple[Any, Any]
    """A Hub id, a directory or ``.gguf`` file, a `ModelSource`, a `LoadedModel`, or a pair of a model and its tokenizer."""

PASSED = "text"
"""Source of a text that was passed itself."""


def given_models(models: GivenModel | Iterable[GivenModel]) -> tuple[GivenModel, ...]:
    """``models`` as a tuple; a single model may be passed as it is. Raises `UsageError` if there are none."""
    if isinstance(models, str | os.PathLike | ModelSource | LoadedModel) or _is_pair(models) or is_model(models):
        return (models,)  # type: ignore[return-value]
    found = tuple(models)
    if not found:
        raise UsageError("there is no model to evaluate", hint="pass at least one")
    return found


def given_model(model: GivenModel, *, revision: str | None = None) -> tuple[str, ModelSource | LoadedModel]:
    """The name that results give ``model``, and the model itself. The Hub is asked only for a name that is not on this machine.

    Raises:
        ModelError: There is no such model, or it cannot be fetched.
        UsageError: ``model`` is a model without its tokenizer, or ``revision`` is given with a local model.
    """
    if isinstance(model, LoadedModel):
        return model.name, model
    if isinstance(model, ModelSource):
        return model.id, model
    if isinstance(model, str | os.PathLike):
        from chanfmt.hub.locate import locate_model

        return os.fspath(model), locate_model(os.fspath(model), revision=revision)
    if _is_pair(model):
        loaded = LoadedModel(*model)
        return loaded.name, loaded
    raise UsageError(
        f"{type(model).__name__} is not a model that can be measured by itself",
        hint="pass a Hub id, a directory, or a pair: (model, tokenizer)",
    )


def check_given(model: GivenModel, *, revision: str | None = None) -> None:
    """Raise the errors of `given_model` that need neither the network nor a weight."""
    if isinstance(model, str | os.PathLike):
        from chanfmt.hub.locate import check_model

        check_model(os.fspath(model), revision=revision)
    elif not isinstance(model, ModelSource):
        given_model(model)


def check_given_text(text: str | os.PathLike[str] | Text) -> None:
    """Raise the errors of `given_text` for a source that cannot be read. Nothing is read, and the network is not used."""
    from chanfmt.data.text import Text, check_text

    if not isinstance(text, Text) and "\n" not in os.fspath(text):
        check_text(os.fspath(text))


def check_running(text: str | os.PathLike[str] | Text, device: str) -> None:
    """Raise an error for a text or a device that cannot be used, before a model is looked for or a plan is made.

    Raises:
        UsageError: As `check_given_text`.
        ModelError: The device cannot be used.
    """
    from chanfmt.models.load import pick_device

    pick_device(device)
    check_given_text(text)


def given_text(text: str | os.PathLike[str] | Text, *, empty_rows: bool = False) -> Text:
    """The text that ``text`` is or names.

    Args:
        text: A `Text`; a string with a line break, which is the text itself; or the name of a source as
            `chanfmt.data.text.read_text` takes it.
        empty_rows: Keep the empty rows of a source.

    Raises:
        UsageError: The source does not exist, cannot be read, or holds no text.
    """
    from chanfmt.data.text import Text, read_text

    if isinstance(text, Text):
        return text
    name = os.fspath(text)
    if "\n" in name:
        content = name.encode("utf-8", "replace")
        return Text(PASSED, hashlib.sha256(content).hexdigest(), content.decode("utf-8"))
    return read_text(name, "evaluate", empty_rows=empty_rows)


def text_name(text: str | os.PathLike[str] | Text) -> str:
    """What results call ``text``: the name as it was given, or the source of a text that was passed itself."""
    if not isinstance(text, str | os.PathLike):
        return text.source
    name = os.fspath(text)
    return PASSED if "\n" in name else name


@contextlib.contextmanager
def runnable(
    model: ModelSource | LoadedModel, *, dtype: str = "auto", device: str = "auto", device_map: str | None = None
) -> Iterator[Any]:
    """A causal language model in evaluation mode with frozen parameters, for the body.

    A `ModelSource` is loaded. A `LoadedModel` stays on its device and in its dtype, and is afterwards as it was.

    Raises:
        ModelError: The model cannot be loaded, or it is not causal.
    """
    from chanfmt.models.causal import check_causal
    from chanfmt.models.frozen import frozen
    from chanfmt.models.load import load_model

    with contextlib.ExitStack() as stack:
        if isinstance(model, LoadedModel):
            loaded = model.model
            stack.enter_context(frozen(loaded))
        else:
            loaded = load_model(model, dtype=dtype, device=device, device_map=device_map)
        check_causal(loaded)
        yield loaded


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and is_model(value[0])
