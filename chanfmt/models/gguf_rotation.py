"""How a GGUF file scales the positions of a model with rotary embeddings, which transformers reads for few models only.

llama.cpp keeps the scaling of Llama 3.1 and later as a tensor of divisors, one for each pair of rotated numbers, and other
scalings as metadata.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from chanfmt.base.errors import ModelError
from chanfmt.base.text import one_line
from chanfmt.models.gguf_header import F32

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chanfmt.models.gguf_header import Header

DIVISORS = "rope_freqs.weight"
"""Tensor of the divisors of the frequencies, float32 (pairs,)."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""What all published models with these divisors share. Only the largest divisor differs."""
_LONG = "rope_factors_long.weight"
_READ_BY_TRANSFORMERS = ("gpt-oss",)
"""Architectures whose scaling transformers reads itself."""
_PLAIN_YARN = ("attn_factor", "factor", "original_context_length", "finetuned")
_WAY_OUT = "use the checkpoint that the GGUF file was made from"


def divisors(parameters: Mapping[str, Any], head: int) -> np.ndarray:
    """The divisors of a rotation of the type ``llama3``, float32 (head / 2,).

    Args:
        parameters: ``rope_parameters`` of the model's config.
        head: Numbers of an attention head.
    """
    waves = 2 * math.pi * float(parameters["rope_theta"]) ** (np.arange(0, head, 2, dtype=np.float64) / head)
    low, high, factor = (float(parameters[name]) for name in ("low_freq_factor", "high_freq_factor", "factor"))
    share = (float(parameters["original_max_position_embeddings"]) / waves - low) / (high - low)
    return (1 / (np.clip(share, 0, 1) * (1 - 1 / factor) + 1 / factor)).astype(np.float32)


def stored_scaling(path: Path, header: Header, theta: float, head: int) -> dict[str, Any] | None:
    """The entries of ``rope_parameters`` that say what the GGUF file ``path`` says; None if transformers reads them or there are none.

    Args:
        header: The header of the file.
        theta, head: The base of the rotation, and the numbers of an attention head.

    Raises:
        ModelError: The positions are scaled in a way that transformers has no entries for, or that is not known.
    """
    architecture = header.text("general.architecture")
    if architecture in _READ_BY_TRANSFORMERS:
        return None
    said = _said(header, architecture)
    kind = said.pop("type", "linear")
    factor = said.get("factor")
    # llama.cpp takes a factor of 0 for none, and a factor without a type for a linear scaling.
    scaled = kind not in ("none", "linear") or (kind == "linear" and factor not in (None, 0, 1)) or _LONG in header.tensors
    scaled = scaled or said.get("attn_factor", 1) != 1
    if DIVISORS in header.tensors:
        found = _llama3(path, header, theta, head)
        if not scaled:
            return found
        if found is not None:
            raise ModelError(f"{path} scales its positions in two ways, which is not read from GGUF files", hint=_WAY_OUT)
    if not scaled:
        return None
    if _is_scale(factor) and said.get("attn_factor", 1) == 1 and _LONG not in header.tensors:
        if kind == "linear":
            return {"rope_type": "linear", "factor": float(factor)}
        original = said.get("original_context_length")
        if kind == "yarn" and _is_scale(original) and said.keys() <= set(_PLAIN_YARN):
            return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": int(original)}
    raise ModelError(
        f"{path} scales its positions in a way that is not read from GGUF files ({one_line(str(kind or 'longrope'))})",
        hint=_WAY_OUT,
    )


def _said(header: Header, architecture: str) -> dict[str, Any]:
    """What ``header`` says about a scaling, by the keys of ``rope.scaling``."""
    prefix = f"{architecture}.rope.scaling."
    said = {name.removeprefix(prefix): value.content for name, value in header.values.items() if name.startswith(prefix)}
    old = header.values.get(f"{architecture}.rope.scale_linear")
    return said if old is None else {"factor": old.content, **said}


def _is_scale(value: Any) -> TypeGuard[float]:
    """Whether ``value`` is a positive number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _llama3(path: Path, header: Header, theta: float, head: int) -> dict[str, Any] | None:
    tensor = header.tensors[DIVISORS]
    if tensor.kind != F32:
        raise ModelError(f"{DIVISORS} of {path} is not stored as F32", hint=_WAY_OUT)
    count, begin = math.prod(tensor.shape), header.data + tensor.offset
    if count > head // 2 or begin + 4 * count > path.stat().st_size:
        raise ModelError(
            f"{DIVISORS} of {path} has {count} numbers; there must be {head // 2}, and all of them in the file", hint=_WAY_OUT
        )
    with open(path, "rb") as file:
        file.seek(begin)
        found = np.frombuffer(file.read(4 * count), dtype="<f4")
    if np.array_equal(found, np.ones_like(found)):
        return None
    known = {"rope_type": "llama3", "factor": float(found.max(initial=1.0)), **LLAMA3}
    expected = divisors({"rope_theta": theta, **known}, head)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4, atol=0):
        raise ModelError(f"{path} scales its positions by divisors that are not those of a Llama 3", hint=_WAY_OUT)
    return known
