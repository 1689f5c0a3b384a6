"""The default name of a result, and the names of its files."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from surgery.planning.plan import PruningPlan

MAX_REPORT = 64 << 20
"""Bytes of the largest ``surgery.json`` that is read."""
REPORT_FILE = "surgery.json"
MAX_REPORT = 64 << 20
"""Bytes of the largest `REPORT_FILE` that is read."""
KEPT_FILE = "kept_channels.safetensors"
CARD_FILE = "README.md"
ATLAS_FILE = "atlas.h5"
PICTURE_FILE = "layers.svg"
EVALUATION_FILE = "evaluation.json"
IMATRIX_FILE = "imatrix.gguf"


def default_name(plan: PruningPlan) -> str:
    """``MODEL-METHOD-PERCENT`` and further options: a valid directory name, whatever name the atlas gives the model."""
    base = re.sub(r"[^A-Za-z0-9._-]+", "_", plan.model.id.rstrip("/").rsplit("/", 1)[-1]).lstrip("._-")
    base = base.removesuffix(".gguf")
    extra = [
        *(["global"] if plan.allocation == "global" else []),
        *(["partial"] if plan.layers is not None or plan.stack else []),
        *(["inverted"] if plan.invert else []),
    ]
    return "-".join([base or "model", plan.method, f"{100 * plan.sparsity:g}", *extra])


def default_repository(plan: PruningPlan) -> str:
    """`default_name` in the spelling that the Hub accepts, for the logged-in user's namespace."""
    name = re.sub(r"-{2,}", "-", re.sub(r"[.]{2,}", ".", default_name(plan)))
    # The name together with its namespace, which has at most 42 characters, must not exceed the Hub's limit.
    return name[:53].strip("-.")
