"""What stock transformers makes of a config: the model class, its shapes."""

from __future__ import annotations

import copy
import inspect
from typing import Any, cast

from chanfmt.errors import ModelError
from chanfmt.models.load import quiet_transformers

Shapes = dict[str, tuple[int, ...]]


def model_class(config: dict[str, Any]) -> Any:
    """What loads a checkpoint with this ``config.json``: `AutoModelForCausalLM`, else its first known architecture.

    Encoder-decoders and types without a causal language model are loaded by their architecture.

    Raises:
        ModelError: transformers knows neither for it, or it reads no tokens.
    """
    import transformers

    parsed = parse_config(config)
    if type(parsed) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and not parsed.is_encoder_decoder:
        return transformers.AutoModelForCausalLM
    for name in config.get("architectures") or ():
        # The name comes from a file: only a model class will do.
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            found = cast("Any", found)
            if "input_ids" not in inspect.signature(found.forward).parameters:
                raise ModelError(f"{name} reads {found.main_input_name}; what is cut is checked on tokens, "
                                 "so only models that read tokens are cut so far")
            return found
    raise ModelError(
        f"transformers {transformers.__version__} has no language model of type {config.get('model_type')!r}"
    )


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
    import transformers

    parsed, found = parse_config(config), model_class(config)
    try:
        with quiet_transformers(), torch.device("meta"):
            model = found.from_config(parsed) if found is transformers.AutoModelForCausalLM else found(parsed)
    except Exception as error:
        raise ModelError(f"{found.__name__} cannot be built from its config: {error}") from None
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
