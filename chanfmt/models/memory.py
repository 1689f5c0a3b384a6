"""A model that is in memory already, as the source of a measurement."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import ChanfmtError, ModelError, UsageError, first_line
from chanfmt.base.files import check_space
from chanfmt.models.frozen import frozen
from chanfmt.models.load import check_finite
from chanfmt.models.quantised import check_config, check_loaded
from chanfmt.models.quiet import quiet_transformers
from chanfmt.models.source import ModelSource

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel


class LoadedSource(ModelSource):
    """The source of a model that is in memory: its files are the checkpoint that ``save_pretrained`` wrote of it.

    Args:
        directory: The checkpoint.
        id: Name of the model.
        loaded: The model.
        config: The config that was saved.
        tokenizer: The model's tokenizer; None if the model does not read text.
    """

    def __init__(self, directory: Path, id: str, loaded: Any, config: Any, tokenizer: Any) -> None:
        super().__init__(directory, id)
        self.loaded = loaded
        self._config = config
        self._tokenizer = tokenizer

    @property
    def config(self) -> Any:
        """The config of the model. Raises `ModelError` if the model is quantised."""
        check_config(self._config, self.id)
        return self._config

    @property
    def tokenizer(self) -> Any:
        """The tokenizer that was given. Raises `UsageError` if none was."""
        if self._tokenizer is None:
            raise UsageError(f"{self.id} was given without a tokenizer, which text needs", hint="give tokenizer= too")
        return self._tokenizer


@contextlib.contextmanager
def in_memory(model: PreTrainedModel, tokenizer: Any = None, *, id: str = "") -> Iterator[LoadedSource]:
    """Give the source of a loaded model, so that it is measured without being loaded again.

    The model is saved to a temporary directory (``TMPDIR``), so that tensor names, shapes and the fingerprint are those of
    the checkpoint that ``save_pretrained`` writes. In the body the model is in evaluation mode and its parameters are frozen.
    Afterwards every module has the mode, every parameter the ``requires_grad``, and the config the fields that it had
    before, even if the body raises. Dtype, device, values and hooks are never changed.

    Args:
        model: A transformers model, all of whose weights are in memory.
        tokenizer: Its tokenizer, if it is measured on text.
        id: Name of the model in the atlas; by default the name that its config holds, without directories.

    Raises:
        UsageError: ``model`` is not a transformers model with all its weights.
        ModelError: transformers cannot save the model, it is quantised, or a weight is not finite.
        ChanfmtError: The temporary directory has no room for the checkpoint.
    """
    _check_kind(model)
    name = id or _own_name(model)
    check_loaded(model, name)
    with tempfile.TemporaryDirectory(prefix="chanfmt-") as directory:
        config = _saved(model, Path(directory), name)
        with frozen(model):
            check_finite(model)
            yield LoadedSource(Path(directory), name, model, config, tokenizer)


def _check_kind(model: Any) -> None:
    import transformers

    if not hasattr(model, "named_parameters"):
        raise UsageError(
            f"{type(model).__name__} is not a model",
            hint="pass a Hub id, a directory, a .gguf file, or a loaded transformers model; its tokenizer is passed as tokenizer=",
        )
    if not isinstance(model, transformers.PreTrainedModel):
        raise UsageError(
            f"{type(model).__name__} is not a transformers model, so its checkpoint cannot be named",
            hint="give the PreTrainedModel itself: for an adapter model.merge_and_unload(), for a compiled model model._orig_mod",
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise UsageError(
            "the model has an adapter, and save_pretrained saves the adapter alone",
            hint="merge the adapter into the model first",
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UsageError("some weights of the model are not in memory", hint="load the model without offloading")


def _own_name(model: PreTrainedModel) -> str:
    """The name in the model's config: a Hub id, or the last part of a path; the model type if there is none."""
    name = str(getattr(model.config, "name_or_path", "") or "")
    path = Path(name).expanduser()
    if name and (path.is_absolute() or name.startswith(".") or path.exists()):
        name = path.resolve().name
    return name or str(model.config.model_type)


def _saved(model: PreTrainedModel, directory: Path, name: str) -> Any:
    """Save ``model`` to ``directory``, leave its config as it was, and return a copy of the config that was saved."""
    check_space(directory, sum(parameter.nbytes for parameter in model.parameters()))
    # save_pretrained sets fields of the configs that it writes.
    configs = [item for item in (model.config, getattr(model, "generation_config", None)) if item is not None]
    before = [(item, dict(item.__dict__)) for item in configs]
    try:
        with quiet_transformers():
            model.save_pretrained(directory)
        return copy.deepcopy(model.config)
    except OSError as error:
        raise ChanfmtError(
            f"cannot save {name} to {directory}: {error.strerror or error}", hint="set TMPDIR to a directory with more space"
        ) from None
    except Exception as error:
        raise ModelError(f"transformers cannot save {name}: {first_line(error)}") from None
    finally:
        for item, fields in before:
            item.__dict__.clear()
            item.__dict__.update(fields)
