"""The config of a Llama model with widths of its own for every layer, in the fields of DeciLM (Nemotron-NAS)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from chanfmt.base.own_names import DECI_TYPE
from chanfmt.models.own import AUTO_MAP
from chanfmt.models.rotary_fields import older_fields
from chanfmt.models.stock import parse_config
from surgery.planning.layouts import DECI_MULTIPLE
from surgery.planning.plan import Change

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

DECI_ADDED = ("auto_map", "block_configs", "rope_theta", "rope_scaling")
"""Fields that the stock config may lack."""
_DIGITS = 6
"""Decimals of ``ffn_mult`` that programs keep."""


def deci_config(config: dict[str, Any], widths: Sequence[int]) -> tuple[dict[str, Any], dict[str, Change]]:
    """``config`` of a Llama model as that of a DeciLM model whose layers have FFNs of ``widths``, and the changed fields.

    If every width is a multiple of 256, ``ffn_mult`` says it, which all programs read. Otherwise ``intermediate_size`` does.

    Raises:
        ModelError: transformers cannot read ``config``.
    """
    parsed = parse_config(config)
    shared = parsed.num_attention_heads // parsed.num_key_value_heads
    by_ratio = not any(width % DECI_MULTIPLE for width in widths)
    plain = {"no_op": False, "replace_with_linear": False}
    blocks = [
        {
            "attention": {"n_heads_in_group": shared, **plain},
            "ffn": {**({"ffn_mult": ffn_mult(width, parsed.hidden_size)} if by_ratio else {"intermediate_size": width}), **plain},
        }
        for width in widths
    ]
    after = {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": DECI_TYPE,
        "auto_map": dict(AUTO_MAP),
        "block_configs": blocks,
        "intermediate_size": max(widths),
        **_rotary(config, parsed),
    }
    changes = {name: Change(config.get(name), value) for name, value in after.items() if config.get(name) != value}
    return config | after, changes


def ffn_mult(width: int, hidden: int) -> float:
    """The ratio from which programs compute ``width``, a multiple of 256: two thirds of it times ``hidden``, rounded up to one.

    It is rounded down, so that a program never computes the next multiple.
    """
    return math.floor(1.5 * width / hidden * 10**_DIGITS) / 10**_DIGITS


def _rotary(config: Mapping[str, Any], parsed: Any) -> dict[str, Any]:
    """The rotary embedding in the fields from which other programs read it."""
    found = older_fields(getattr(parsed, "rope_parameters", None))
    return {"rope_scaling": None, **found} if found and "rope_scaling" in config else found
