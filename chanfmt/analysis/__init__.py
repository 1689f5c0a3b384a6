"""Statistics of an atlas: what the paper says about importance, as functions of arrays.

Each function but `super_weights` and `driving_tokens` takes arrays of one FFN, as `Unit.values` and `Unit.by_split` give them: numpy, or xarray
DataArrays. `over_layers` calls a function for every layer. Every function imports its module when it is first used.

| function | answer |
|---|---|
| `concentration` | how much of a metric sits in few channels: mass, top share, effective channels, Gini |
| `cumulative_share` | share of a metric in the largest channels, as a curve |
| `strip_shares` | mean share of a metric in a channel by rank, in bins of a log axis: a row of the heat map |
| `top_overlap` | overlap of the top channels of two metrics, and the overlap that chance gives |
| `rank_correlation` | Spearman's rank correlation of two metrics |
| `compare_channels` | one FFN in two atlases: ranks, overlap of supernodes and halo, captured mass, each with its chance |
| `halo_redundancy` | redundancy of the halo and of channels matched in LP, with the null |
| `read_halo` | whether important channels read what the supernodes of the previous layer write |
| `stability` | supernodes over splits of the calibration text: jackknife, bootstrap, agreement of disjoint parts |
| `matched_control`, `random_control` | channels to compare a selection with |
| `super_weights` | the weights of a model that the largest activations meet; takes an open atlas |
| `driving_tokens` | the tokens that drive a channel hardest, with the tokens around them; takes an open atlas |
| `middle` | a median over FFNs, and its bootstrap interval |
| `over_layers` | one of these functions for every layer of an array |
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chanfmt.algebra.compare import compare_channels, rank_correlation
    from chanfmt.analysis.association import top_overlap
    from chanfmt.analysis.candidates import super_weights
    from chanfmt.analysis.controls import matched_control, random_control
    from chanfmt.analysis.driving import driving_tokens
    from chanfmt.analysis.halo import halo_redundancy
    from chanfmt.analysis.layers import over_layers
    from chanfmt.analysis.mass import concentration, cumulative_share
    from chanfmt.analysis.read import read_halo
    from chanfmt.analysis.resample import middle
    from chanfmt.analysis.splits import stability
    from chanfmt.analysis.strip import strip_shares

__all__ = [
    "compare_channels",
    "concentration",
    "cumulative_share",
    "driving_tokens",
    "halo_redundancy",
    "matched_control",
    "middle",
    "over_layers",
    "random_control",
    "rank_correlation",
    "read_halo",
    "stability",
    "strip_shares",
    "super_weights",
    "top_overlap",
]

# No module here may have the name of a function: importing the module would put it in the function's place.
_HOMES = {
    "compare_channels": "chanfmt.algebra.compare",
    "concentration": "chanfmt.analysis.mass",
    "cumulative_share": "chanfmt.analysis.mass",
    "driving_tokens": "chanfmt.analysis.driving",
    "halo_redundancy": "chanfmt.analysis.halo",
    "matched_control": "chanfmt.analysis.controls",
    "middle": "chanfmt.analysis.resample",
    "over_layers": "chanfmt.analysis.layers",
    "random_control": "chanfmt.analysis.controls",
    "rank_correlation": "chanfmt.algebra.compare",
    "read_halo": "chanfmt.analysis.read",
    "stability": "chanfmt.analysis.splits",
    "strip_shares": "chanfmt.analysis.strip",
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
