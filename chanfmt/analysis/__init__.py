"""Statistics of an atlas: what the paper says about importance, as functions of arrays.

Each function but `super_weights` takes numpy arrays of one FFN, as `Unit.values` and `Unit.by_split` give them. It imports
its module when it is first used.

| function | answer |
|---|---|
| `concentration` | how much of a metric sits in few channels: mass, top share, effective channels, Gini |
| `top_overlap` | overlap of the top channels of two metrics, and the overlap that chance gives |
| `rank_correlation` | Spearman's rank correlation of two metrics |
| `halo_redundancy` | redundancy of the halo and of channels matched in LP, with the null |
| `stability` | supernodes over splits of the calibration text: jackknife, bootstrap, agreement of disjoint parts |
| `matched_control`, `random_control` | channels to compare a selection with |
| `super_weights` | the weights of a model that the largest activations meet; takes an open atlas |
| `middle` | a median over FFNs, and its bootstrap interval |
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chanfmt.algebra.compare import rank_correlation
    from chanfmt.analysis.association import top_overlap
    from chanfmt.analysis.candidates import super_weights
    from chanfmt.analysis.controls import matched_control, random_control
    from chanfmt.analysis.halo import halo_redundancy
    from chanfmt.analysis.mass import concentration
    from chanfmt.analysis.resample import middle
    from chanfmt.analysis.splits import stability

__all__ = [
    "concentration",
    "halo_redundancy",
    "matched_control",
    "middle",
    "random_control",
    "rank_correlation",
    "stability",
    "super_weights",
    "top_overlap",
]

# No module here may have the name of a function: importing the module would put it in the function's place.
_HOMES = {
    "concentration": "chanfmt.analysis.mass",
    "halo_redundancy": "chanfmt.analysis.halo",
    "matched_control": "chanfmt.analysis.controls",
    "middle": "chanfmt.analysis.resample",
    "random_control": "chanfmt.analysis.controls",
    "rank_correlation": "chanfmt.algebra.compare",
    "stability": "chanfmt.analysis.splits",
    "super_weights": "chanfmt.analysis.candidates",
    "top_overlap": "chanfmt.analysis.association",
}
"""Function to the module that defines it."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
