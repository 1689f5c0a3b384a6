"""Files beside a model's weights that would change what is loaded: adapters, and other weights for the same model.

transformers loads an adapter if peft is installed, and ignores the adapter if it is not. A number must not depend on what
is installed, so a model with such files is refused.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import ModelError
from chanfmt.base.inputs import file_size
from chanfmt.models.safetensors import INDEX_FILE, SINGLE_FILE

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = re.compile(r"adapter_model(\.\w+)?\.(safetensors|bin)(\.index\.json)?")
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_MAX_CONFIG = 16 << 20


def check_alone(directory: Path, config: Mapping[str, Any], name: str) -> None:
    """Raise `ModelError` unless ``model.safetensors``, or the shards of its index, are all that is loaded from ``directory``.

    Args:
        config: The fields of ``config.json``.
        name: Name of the model.
    """
    adapter = adapter_files(directory)
    if adapter:
        raise ModelError(
            f"{name} has an adapter beside its weights ({adapter[0]}), which some programs add to the weights and some ignore",
            hint=f"merge it first, with peft: {_merge(repr(str(directory)), repr('ADAPTER'))}, with the adapter's files moved to the directory "
            f"ADAPTER; or, to use the model without the adapter, remove {' and '.join(adapter)}",
        )
    other = config.get("transformers_weights")
    if other and other not in (SINGLE_FILE, INDEX_FILE):
        raise ModelError(
            f"config.json of {name} names another file of weights (transformers_weights: {str(other)[:80]!r})",
            hint=f"rename that file to {SINGLE_FILE}, or its index to {INDEX_FILE}, and remove the field",
        )
    distributed = sorted(path.name for path in directory.iterdir() if _DISTRIBUTED.fullmatch(path.name))
    if distributed:
        raise ModelError(
            f"{name} has the shards of a distributed checkpoint ({distributed[0]}), which transformers loads before all others",
            hint="load the model with transformers, save it with save_pretrained, and use that directory",
        )


def check_adapter_alone(directory: Path, name: str) -> None:
    """Raise `ModelError` if ``directory``, which has no ``config.json``, holds an adapter."""
    if adapter_files(directory):
        raise ModelError(
            f"{name} is an adapter, not a model: it holds only what is added to another model's weights",
            hint=f"merge it first, with peft: {_merge(_base(directory), repr(str(directory)))}",
        )


def adapter_files(directory: Path) -> list[str]:
    """Names of the files of an adapter in ``directory``, as peft writes them, the config first. Raises `ModelError`."""
    try:
        names = sorted(path.name for path in directory.iterdir())
    except OSError as error:
        raise ModelError(f"cannot read {directory}: {error.strerror}") from None
    return [name for name in names if name == ADAPTER_CONFIG or _ADAPTER_WEIGHTS.fullmatch(name)]


def _base(directory: Path) -> str:
    """The model that the adapter in ``directory`` names, as a Python string; BASE if it names none."""
    try:
        path = directory / ADAPTER_CONFIG
        if file_size(path) <= _MAX_CONFIG:
            found = json.loads(path.read_bytes()).get("base_model_name_or_path")
            return repr(found[:200]) if found and isinstance(found, str) else "BASE"
    except (OSError, ValueError, RecursionError, AttributeError):
        pass
    return "BASE"


def _merge(base: str, adapter: str) -> str:
    return (
        f"PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({base}), {adapter}).merge_and_unload()"
        ".save_pretrained(DIRECTORY)"
    )
