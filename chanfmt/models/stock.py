"""The model that stock transformers builds from a config, and its shapes."""

from __future__ import annotations

import contextlib
import copy
import json
import tempfile
from pathlib import Path
from typing import Any

from chanfmt.base.errors import ChanfmtError, ModelError
from chanfmt.models.load import auto_class
from chanfmt.models.own import is_own, parse_own
from chanfmt.models.quiet import quiet_transformers
from chanfmt.models.source import own_code

Shapes = dict[str, tuple[int, ...]]


def parse_config(config: dict[str, Any]) -> Any:
    """The transformers config object of a ``config.json``.

    Raises:
        ModelError: The installed transformers does not know the model type, or cannot read the config.
        ChanfmtError: There is no place for a temporary file.
    """
    import transformers

    model_type = config.get("model_type")
    if reason := own_code(config):
        raise ModelError(reason, hint="cut a model whose type transformers knows; an atlas of this model can still be read")
    own = is_own(config)
    if not own and (not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING):
        raise ModelError(
            f"transformers {transformers.__version__} does not know the model type {model_type!r}",
            hint="update it with: pip install -U transformers",
        )
    with contextlib.ExitStack() as stack:
        try:
            # Only a file restores numbers that JSON cannot name, such as an infinite limit.
            directory = stack.enter_context(tempfile.TemporaryDirectory())
            (Path(directory) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        except OSError as error:
            # Not a `ModelError`: nothing is said about the config, and the search for a layout must not go on without it.
            raise ChanfmtError(
                f"cannot write in {tempfile.gettempdir()}: {error.strerror}",
                hint="free some space there, or name another directory in TMPDIR",
            ) from None
        try:
            with quiet_transformers():
                if own:
                    return parse_own(config, lambda kind: kind.from_pretrained(directory))
                return transformers.CONFIG_MAPPING[model_type].from_pretrained(directory)
        except Exception as error:
            raise ModelError(f"config.json is not a valid {model_type} config: {error}") from None


def meta_model(config: dict[str, Any]) -> Any:
    """The stock model of ``config`` on the meta device, which has names and shapes but no numbers.

    Raises:
        ModelError: The stock class cannot be built from ``config``.
    """
    import torch

    parsed = parse_config(config)
    found = auto_class(parsed)
    build = getattr(found, "from_config", found)
    try:
        with quiet_transformers(), torch.device("meta"):
            return build(copy.deepcopy(parsed))
    except Exception as error:
        raise ModelError(f"{found.__name__} cannot be built from its config: {error}") from None


def meta_shapes(config: dict[str, Any]) -> Shapes:
    """Name to shape, for every parameter and stored buffer of the stock model of ``config``.

    Raises:
        ModelError: As `meta_model`.
    """
    return {name: tuple(tensor.shape) for name, tensor in meta_model(config).state_dict().items()}


def meta_ties(config: dict[str, Any]) -> list[set[str]]:
    """Names of the stock model's parameters that are one parameter, group by group.

    Raises:
        ModelError: As `meta_model`.
    """
    groups: dict[int, set[str]] = {}
    # The model holds the parameters, so that no two of them can have the same id in turn.
    model = meta_model(config)
    for name, parameter in model.state_dict(keep_vars=True).items():
        groups.setdefault(id(parameter), set()).add(name)
    return [names for names in groups.values() if len(names) > 1]
