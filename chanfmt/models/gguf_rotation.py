"""How a GGUF file scales the positions of a model with rotary embeddings, which transformers reads for few models only.

llama.cpp keeps the scaling of Llama 3.1 and later as a tensor of divisors, one for each pair of rotated numbers, and other
scalings as metadata.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

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
_PLAIN_YARN = ("type", "factor", "original_context_length", "finetuned")
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
    if DIVISORS in header.tensors:
        return _llama3(path, header, theta, head)
    prefix = f"{architecture}.rope.scaling."
    said = {name.removeprefix(prefix): value.content for name, value in header.values.items() if name.startswith(prefix)}
    kind = said.get("type", "none")
    if kind in ("none", "") and _LONG not in header.tensors:
        return None
    if kind == "linear" and "factor" in said:
        return {"rope_type": "linear", "factor": float(said["factor"])}
    if kind == "yarn" and "factor" in said and "original_context_length" in said and said.keys() <= set(_PLAIN_YARN):
        original = int(said["original_context_length"])
        return {"rope_type": "yarn", "factor": float(said["factor"]), "original_max_position_embeddings": original}
    raise ModelError(
        f"{path} scales its positions in a way that is not read from GGUF files ({one_line(str(kind or 'longrope'))})",
        hint=_WAY_OUT,
    )


def _llama3(path: Path, header: Header, theta: float, head: int) -> dict[str, Any] | None:
    tensor = header.tensors[DIVISORS]
    if tensor.kind != F32:
        raise ModelError(f"{DIVISORS} of {path} is not stored as F32", hint=_WAY_OUT)
    with open(path, "rb") as file:
        file.seek(header.data + tensor.offset)
        found = np.frombuffer(file.read(4 * math.prod(tensor.shape)), dtype="<f4")
    if np.array_equal(found, np.ones_like(found)):
        return None
    known = {"rope_type": "llama3", "factor": float(found.max(initial=1.0)), **LLAMA3}
    expected = divisors({"rope_theta": theta, **known}, head)
    if found.shape != expected.shape or not np.allclose(found, expected, rtol=1e-4, atol=0):
        raise ModelError(f"{path} scales its positions by divisors that are not those of a Llama 3", hint=_WAY_OUT)
    return known
