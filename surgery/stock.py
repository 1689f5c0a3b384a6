"""What stock transformers makes of a config: the model class, its shapes, its loading report."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

from chanfmt.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

Shapes = dict[str, tuple[int, ...]]


def model_class(config: dict[str, Any]) -> Any:
    """The class that loads a checkpoint with this ``config.json``: its first known architecture.

    Raises:
        ModelError: transformers knows neither an architecture nor a causal language model for it.
    """
    import transformers

    for name in config.get("architectures") or ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    mapping = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    try:
        return mapping[type(parse_config(config))]
    except KeyError:
        raise ModelError(
            f"transformers {transformers.__version__} has no language model of type {config.get('model_type')!r}"
        ) from None


def parse_config(config: dict[str, Any]) -> Any:
    """The transformers config object of a ``config.json``.

    Raises:
        ModelError: Its model type is unknown to the installed transformers, or it does not parse.
    """
    import transformers

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise ModelError(
            f"transformers {transformers.__version__} does not know the model type {model_type!r}",
            hint="update it with: pip install -U transformers",
        )
    try:
        # from_dict edits its argument.
        return transformers.CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(config))
    except Exception as error:
        raise ModelError(f"config.json is not a valid {model_type} config: {error}") from None


def meta_shapes(config: dict[str, Any]) -> Shapes:
    """Name to shape of every parameter and stored buffer of the stock model, which is never filled.

    Raises:
        ModelError: The stock class cannot be built from ``config``.
    """
    import torch

    parsed, found = parse_config(config), model_class(config)
    try:
        with quiet(), torch.device("meta"):
            model = found(parsed)
    except Exception as error:
        raise ModelError(f"{found.__name__} cannot be built from its config: {error}") from None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from logging and drawing bars while it works for us."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
