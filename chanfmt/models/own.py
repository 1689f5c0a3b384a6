"""Results that bring a small modelling file of ours: which they are, the classes that load them, and the files that travel.

A checkpoint of this kind is read with the classes of this package. The code in its directory never runs, except in the check
of a cut that was just written, which loads the result as a user does.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import ModelError
from chanfmt.base.own_names import DECI_TYPE, NARROWED_FIELD
from chanfmt.base.text import one_line

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CONFIGURATION_FILE = "configuration_uneven.py"
MODELING_FILE = "modeling_uneven.py"
AUTO_MAP = {
    "AutoConfig": "configuration_uneven.DeciLMConfig",
    "AutoModel": "modeling_uneven.DeciLMModel",
    "AutoModelForCausalLM": "modeling_uneven.DeciLMForCausalLM",
}
"""The field ``auto_map`` of such a result. transformers finds its classes by it."""
NARROWED_FILE = "modeling_narrowed.py"
_CLASSES = ("AutoConfig", "AutoModelForCausalLM")
"""What ``save_pretrained`` leaves of the map, at least."""


def is_own(fields: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` with these fields belongs to a result with a modelling file of ours."""
    return _is_deci(fields) or is_narrowed(fields)


def _is_deci(fields: Mapping[str, Any]) -> bool:
    named = fields.get("auto_map")
    return (
        fields.get("model_type") == DECI_TYPE
        and isinstance(named, dict)
        and all(named.get(name) == AUTO_MAP[name] for name in _CLASSES)
        and set(named) <= set(AUTO_MAP)
    )


def is_narrowed(fields: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` with these fields belongs to a result in the layout ``custom``."""
    saved, listed = fields.get("architectures"), fields.get(NARROWED_FIELD)
    return (
        isinstance(saved, list)
        and len(saved) == 1
        and isinstance(listed, list)
        and all(map(_is_entry, listed))
        and fields.get("auto_map") == narrowed_map(str(saved[0]))
    )


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == {"module", "fields"}
        and isinstance(entry["module"], str)
        and isinstance(entry["fields"], dict)
    )


def narrowed_map(architecture: str) -> dict[str, str]:
    """The field ``auto_map`` of a result whose FFNs are narrowed, and whose stock class is ``architecture``."""
    return {"AutoModelForCausalLM": f"{NARROWED_FILE.removesuffix('.py')}.{architecture}"}


def parse_own(fields: Mapping[str, Any], parse: Callable[[Any], Any]) -> Any:
    """The config object of a result of ours, for the classes of this package.

    Args:
        parse: Makes a config object of the class that it is given.
    """
    import transformers

    if _is_deci(fields):
        from chanfmt.models.uneven.configuration_uneven import DeciLMConfig

        return parse(DeciLMConfig)
    config = parse(transformers.CONFIG_MAPPING[fields["model_type"]])
    # Without the map, nothing makes transformers run the code of the directory.
    del config.auto_map
    return config


def own_model_class(config: Any) -> Any:
    """The class that loads the model of ``config``, if ``config`` comes from `parse_own`; otherwise None.

    Raises:
        ModelError: transformers lacks the class that ``config`` narrows.
    """
    if getattr(config, NARROWED_FIELD, None) is not None and not hasattr(config, "auto_map"):
        from chanfmt.models.uneven import modeling_narrowed

        name = config.architectures[0]
        try:
            return getattr(modeling_narrowed, name)
        except AttributeError:
            raise ModelError(f"config.json names the class {one_line(name)}, and transformers has no such class") from None
    # No such config exists before the module is imported.
    if not type(config).__module__.startswith("chanfmt."):
        return None
    from chanfmt.models.uneven.configuration_uneven import DeciLMConfig
    from chanfmt.models.uneven.modeling_uneven import DeciLMForCausalLM

    return DeciLMForCausalLM if isinstance(config, DeciLMConfig) else None


def own_files(fields: Mapping[str, Any]) -> dict[str, str]:
    """Name to text of the code files that travel with a result of this ``config.json``; empty for a stock model."""
    if not is_own(fields):
        return {}
    home = Path(__file__).parent / "uneven"
    names = (CONFIGURATION_FILE, MODELING_FILE) if _is_deci(fields) else (NARROWED_FILE,)
    return {name: (home / name).read_text(encoding="utf-8") for name in names}


def code_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a ``config.json`` that name code files, if they name ours."""
    return {"auto_map": fields["auto_map"]} if is_own(fields) else {}


def forget_code(directory: Path) -> None:
    """Remove transformers' copy of the code in ``directory``, and what was imported from it.

    transformers imports remote code from a copy in the user's cache. The copy of a result that has no name yet would stay there.
    """
    from transformers.dynamic_module_utils import TRANSFORMERS_DYNAMIC_MODULE_NAME, _sanitize_module_name
    from transformers.utils import HF_MODULES_CACHE

    package = _sanitize_module_name(directory.name)
    name = f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}.{package}"
    for module in [module for module in sys.modules if f"{module}.".startswith(f"{name}.")]:
        del sys.modules[module]
    shutil.rmtree(Path(HF_MODULES_CACHE) / TRANSFORMERS_DYNAMIC_MODULE_NAME / package, ignore_errors=True)
