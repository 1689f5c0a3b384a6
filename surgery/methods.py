"""Score every channel of an FFN from its atlas alone: higher means keep. Pure numpy, float64.

`METHODS` is the one table of methods; the command line, the plan and the browser follow it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.errors import AtlasError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from chanfmt.atlas import Atlas, Stack
    from chanfmt.records import Block


@dataclass(frozen=True)
class Channels:
    """One FFN's row of its stack, and the seed of whatever is random.

    Attributes:
        stack: Arrays of the FFN's stack.
        row: The FFN's row in them.
        block: The FFN.
        seed: Seed of the `random` method.
    """

    stack: Stack
    row: int
    block: Block
    seed: int

    def __getitem__(self, name: str) -> np.ndarray:
        """The variable ``name``, float64: (channels,), or () for one value per FFN.

        Raises:
            AtlasError: The atlas lacks it.
        """
        return np.asarray(self.stack.row(name, self.row), dtype=np.float64)


@dataclass(frozen=True)
class Method:
    """One way to rank channels.

    Attributes:
        name: As written after ``--method``.
        description: One line for people.
        source: Where the formula comes from.
        score: Channels to scores, (channels,) float64.
        always_protects: Selectors of `surgery.protect` that belong to the method's definition.
    """

    name: str
    description: str
    source: str
    score: Callable[[Channels], np.ndarray]
    always_protects: tuple[str, ...] = ()


def score(method: str, atlas: Atlas, block: Block, seed: int = 0) -> np.ndarray:
    """Scores of ``block``'s channels, (channels,) float64, finite; the lowest is pruned first.

    Raises:
        UsageError: There is no such method.
        AtlasError: The atlas lacks what the method needs, or has no value for some channel.
    """
    chosen = find_method(method)
    if block.n_experts:
        raise AtlasError(
            f"the FFN {block.module} has {block.n_experts} experts, and only dense FFNs are scored so far"
        )
    stack = atlas.stacks[block.stack]
    values = chosen.score(Channels(stack, block.row, block, seed))
    undefined = int(np.count_nonzero(~np.isfinite(values)))
    if undefined:
        unseen = not stack.row("tokens", block.row)
        reason = "no calibration token reached it" if unseen else "the atlas has no value there"
        raise AtlasError(
            f"{method} is undefined for {undefined} of {block.n_channels} channels of layer {block.layer_index} "
            f"({block.module}): {reason}",
            hint="build the atlas on more text, or choose a method that needs weights only: magnitude",
        )
    return values


def find_method(name: str) -> Method:
    """The method called ``name``. Raises `UsageError` where there is none."""
    if name not in METHODS:
        raise UsageError(f"there is no method {name!r}", hint=f"methods: {', '.join(METHODS)}")
    return METHODS[name]


def _scar_lp(channels: Channels) -> np.ndarray:
    return channels["lp"]


def _scar_prot(channels: Channels) -> np.ndarray:
    return channels["lp"] * channels["protection"]


def _scar_conn(channels: Channels) -> np.ndarray:
    conn = channels["connectivity"]
    return channels["lp"] * ((1 - conn) + conn * channels["protection"])


def _taylor(channels: Channels) -> np.ndarray:
    return channels["taylor"]


def _activation(channels: Channels) -> np.ndarray:
    return channels["activation_power"]


def _wanda(channels: Channels) -> np.ndarray:
    return np.sqrt(channels["activation_power"]) * channels["write_norm_l1"]


def _wanda_group(channels: Channels) -> np.ndarray:
    return channels["wanda_group"]


def _flap(channels: Channels) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = channels["sum_u"] / channels["tokens"]
        power = channels["sum_u2"] / channels["tokens"]
    # The difference of two equal terms may round below zero.
    return np.maximum(power - mean**2, 0.0) * channels["write_norm"] ** 2


def _magnitude(channels: Channels) -> np.ndarray:
    total = channels["write_norm"] + channels["up_norm"]
    return total + channels["gate_norm"] if channels.stack.gated else total


def _random(channels: Channels) -> np.ndarray:
    # Seeded by the FFN's own index, so that no score depends on which FFNs were scored before.
    return np.random.default_rng([channels.seed, channels.block.index]).random(channels.block.n_channels)


_PAPER = "arXiv 2604.23475"

METHODS: dict[str, Method] = {method.name: method for method in (
    Method("scar-lp", "loss proxy LP", f"{_PAPER}, equation 11", _scar_lp, ("supernodes",)),
    Method("scar-prot", "LP x Protect", f"{_PAPER}, equation 12", _scar_prot, ("supernodes",)),
    Method(
        "scar-conn", "LP x ((1 - Conn) + Conn x Protect)", f"{_PAPER}, equation 13", _scar_conn, ("supernodes",)
    ),
    Method("taylor", "E|u s|", "first-order Taylor expansion, arXiv 1906.10771", _taylor),
    Method("activation", "E[u^2]", "activation power", _activation),
    Method("wanda", "sqrt(E[u^2]) x L1 norm of the write vector", "Wanda-sp, arXiv 2306.11695", _wanda),
    Method(
        "wanda-group", "|W| x RMS input, summed over gate, up and write weights", f"{_PAPER}, Wanda-channel",
        _wanda_group,
    ),
    Method("flap", "Var[u] x squared L2 norm of the write vector", "arXiv 2312.11983", _flap),
    Method("magnitude", "sum of the L2 norms of write, up and gate", "weights alone", _magnitude),
    Method("random", "uniform random numbers", "control", _random),
)}
