"""Recognise quantised weights: by the config, by the files that quantisers write, by the names and dtypes of tensors.

The fields, files and names are those of GPTQModel and AutoGPTQ, AutoAWQ, bitsandbytes, compressed-tensors (llm-compressor),
NVIDIA ModelOpt, DeepSeek's FP8, MXFP4, HQQ, optimum-quanto, torchao, SqueezeLLM, Marlin and MLX.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import ModelError
from chanfmt.base.inputs import file_size

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chanfmt.models.safetensors import TensorEntry

_FIELDS = ("quantization_config", "compression_config")
_METHODS = ("quant_method", "quant_algo", "quantization_method", "format", "bits")
_FILES = (
    "hf_quant_config.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "awq_config.json",
    "quanto_qmap.json",
)
_MAX_FILE = 16 << 20
_SMALL_FLOATS = ("F8_", "F6_", "F4")
_INTEGERS = frozenset({"I8", "U8", "I16", "U16", "I32", "U32"})
_SCALES = re.compile(
    r"\.(qweight|qzeros|g_idx|SCB|W_q|Qidxs|pre_quant_scale)$"
    r"|\.weight_(packed|scale|scales|scale_inv|scale_2|zero_point|global_scale|g_idx)$"
    r"|\.weight[.:_](absmax|nested_absmax|quant_map|qdata|scale|_data|_scale)$"
    r"|\.weight\.quant_state\."
)
_USE_ORIGINAL = "use the unquantised checkpoint that it was made from"


def check_config(config: Any, name: str) -> None:
    """Raise `ModelError` if ``config``, a config object or its fields, is that of the quantised model called ``name``."""
    fields = config if isinstance(config, dict) else {field: getattr(config, field, None) for field in _FIELDS}
    found = _in_fields(fields)
    if found:
        raise _refused(name, f"config.json has {found}")


def check_files(directory: Path, name: str) -> None:
    """Raise `ModelError` if a quantiser left its own file next to the weights in ``directory``.

    A file that says of itself that nothing is quantised (``"quant_algo": null``) passes.
    """
    for file in _FILES:
        path = directory / file
        if not path.is_file():
            continue
        method: Any = "?"
        try:
            if file_size(path) <= _MAX_FILE:
                method = _method(json.loads(path.read_bytes()))
        except (OSError, ValueError, RecursionError):
            pass
        if method is not None:
            what = f"{file} lies beside its weights" if method == "?" else f"{file} says {method}"
            raise _refused(name, what, f"; if its weights are not quantised, remove {file}")


def check_tensors(tensors: Mapping[str, TensorEntry], name: str) -> None:
    """Raise `ModelError` if ``tensors`` hold packed weights, weights of 8 bits or fewer, or scales for such weights."""
    for tensor, entry in tensors.items():
        if entry.dtype.startswith(_SMALL_FLOATS):
            raise _refused(name, f"{tensor} is stored as {entry.dtype}")
        if entry.dtype in _INTEGERS and len(entry.shape) > 1 and tensor.endswith(("weight", "_blocks")):
            raise _refused(name, f"{tensor} is stored as {entry.dtype}")
        if _SCALES.search(tensor) or (tensor.endswith("_blocks") and f"{tensor.removesuffix('_blocks')}_scales" in tensors):
            raise _refused(name, f"it holds {tensor}, of a quantised weight")


def check_loaded(model: Any, name: str) -> None:
    """Raise `ModelError` if ``model``, a transformers model in memory called ``name``, is quantised."""
    if getattr(model, "hf_quantizer", None) is not None:
        raise _refused(name, f"it was loaded by {type(model.hf_quantizer).__name__}")
    check_config(model.config, name)
    for parameter, values in model.named_parameters():
        if values.ndim > 1 and (not values.is_floating_point() or values.dtype.itemsize < 2):
            raise _refused(name, f"{parameter} is {str(values.dtype).removeprefix('torch.')}")


def _in_fields(value: Any, path: str = "") -> str:
    """The first quantisation field in the fields of a config, nested configs included, with its method; empty if there is none."""
    if not isinstance(value, dict):
        return ""
    for field, item in value.items():
        where = f"{path}{field}"
        if field in _FIELDS and item:
            method = _method(item if isinstance(item, dict) else getattr(item, "__dict__", {}))
            return f"{where}: {method}" if method not in (None, "?") else where
        if found := _in_fields(item, f"{where}."):
            return found
    return ""


def _method(fields: Any) -> str | None:
    """The method that the fields of a quantiser name; "?" if they name none; None if they say that nothing is quantised."""
    if not isinstance(fields, dict):
        return "?"
    inner = fields.get("quantization")
    if isinstance(inner, dict):
        return _method(inner)
    if "quant_algo" in fields and not fields["quant_algo"]:
        return None
    for field in _METHODS:
        item = fields.get(field)
        if isinstance(item, int | str) and item:
            value = str(getattr(item, "value", item))[:40]
            return f"{value} bits" if field == "bits" else value
    return "?"


def _refused(name: str, evidence: str, way_out: str = "") -> ModelError:
    return ModelError(
        f"{name} is quantised ({evidence}); its weights cannot be measured or cut channel by channel",
        hint=_USE_ORIGINAL + way_out,
    )
