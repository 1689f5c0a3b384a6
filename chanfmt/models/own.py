"""Results that bring a small modelling file of ours: which they are, the classes that load them, and the files that travel.

A checkpoint of this kind is read with the classes of this package. The code in its directory never runs, except in the check
of a cut that was just written, which loads the result as a user does.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

DECI_TYPE = "nemotron-nas"
"""The model type under which engines know DeciLM."""
CONFIGURATION_FILE = "configuration_uneven.py"
MODELING_FILE = "modeling_uneven.py"
AUTO_MAP = {
    "AutoConfig": "configuration_uneven.DeciLMConfig",
    "AutoModel": "modeling_uneven.DeciLMModel",
    "AutoModelForCausalLM": "modeling_uneven.DeciLMForCausalLM",
}
"""The field ``auto_map`` of such a result. transformers finds its classes by it."""
_CLASSES = ("AutoConfig", "AutoModelForCausalLM")
"""What ``save_pretrained`` leaves of the map, at least."""


def is_own(fields: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` with these fields belongs to a result with our modelling file."""
    named = fields.get("auto_map")
    return (
        fields.get("model_type") == DECI_TYPE
        and isinstance(named, dict)
        and all(named.get(name) == AUTO_MAP[name] for name in _CLASSES)
        and set(named) <= set(AUTO_MAP)
    )


def own_config_class() -> Any:
    """The config class of such results."""
    from chanfmt.models.uneven.configuration_uneven import DeciLMConfig

    return DeciLMConfig


def own_model_class(config: Any) -> Any:
    """The class that loads the model of ``config``, if ``config`` is an `own_config_class` of this package; otherwise None."""
    # No such config exists before the module is imported.
    if not type(config).__module__.startswith("chanfmt."):
        return None
    from chanfmt.models.uneven.modeling_uneven import DeciLMForCausalLM

    return DeciLMForCausalLM if isinstance(config, own_config_class()) else None


def own_files(fields: Mapping[str, Any]) -> dict[str, str]:
    """Name to text of the code files that travel with a result of this ``config.json``; empty for a stock model."""
    if not is_own(fields):
        return {}
    home = Path(__file__).parent / "uneven"
    return {name: (home / name).read_text(encoding="utf-8") for name in (CONFIGURATION_FILE, MODELING_FILE)}


def code_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ``config.json`` that name code files, if they name ours."""
    return {"auto_map": fields["auto_map"]} if is_own(fields) else {}


def forget_code(config: Any) -> None:
    """Remove transformers' copy of the code that ``config`` came from, if it came from code in a directory.

    transformers imports remote code from a copy in the user's cache. The copy of a result that has no name yet would stay there.
    """
    from transformers.utils import HF_MODULES_CACHE

    package, _, rest = type(config).__module__.partition(".")
    if package != "transformers_modules" or not rest:
        return
    name = f"{package}.{rest.partition('.')[0]}"
    for module in [module for module in sys.modules if f"{module}.".startswith(f"{name}.")]:
        del sys.modules[module]
    shutil.rmtree(Path(HF_MODULES_CACHE).joinpath(*name.split(".")), ignore_errors=True)
