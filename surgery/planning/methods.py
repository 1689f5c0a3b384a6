"""Score every channel of an FFN from its atlas alone: higher means keep. Pure numpy, float64.

An FFN with experts has a row of scores per expert, each from the expert's own tokens.

`METHODS` is the one table of methods; the command line, the plan and the browser follow it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.base.choices import unknown
from chanfmt.base.errors import AtlasError
from chanfmt.format import schema

if TYPE_CHECKING:
    from collections.abc import Callable

    from chanfmt.format.reader import Atlas, Stack
    from chanfmt.format.records import Block


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
        """The variable ``name``, float64: (channels,), or (1,) for one value per FFN; experts come before.

        Raises:
            AtlasError: The atlas lacks it.
        """
        values = np.asarray(self.stack.row(name, self.row), dtype=np.float64)
        return values if "channel" in schema.STACK_VARIABLE_BY_NAME[name].dimensions else values[..., None]


@dataclass(frozen=True)
class Method:
    """One way to rank channels.

    Attributes:
        name: As written after ``--method``.
        description: One line for people.
        source: Where the formula comes from.
        score: Channels to scores, float64: (channels,), or (expert, channels).
        always_protects: Selectors of `surgery.planning.protect` that belong to the method's definition.
        needs_tokens: Whether its scores are undefined where no calibration token came.
        standardised: Whether scores of different FFNs compare only after each FFN's are standardised.
    """

    name: str
    description: str
    source: str
    score: Callable[[Channels], np.ndarray]
    always_protects: tuple[str, ...] = ()
    needs_tokens: bool = True
    standardised: bool = False


def score(method: str, atlas: Atlas, block: Block, seed: int = 0) -> np.ndarray:
    """Scores of ``block``'s channels, float64, finite; the lowest is pruned first.

    Returns:
        (channels,), or (expert, channels) where it has experts. The row of an expert that
        `ranked_by_magnitude` is in other units than the rest.

    Raises:
        UsageError: There is no such method.
        AtlasError: The atlas lacks what the method needs, or has no value for some channel.
    """
    chosen = find_method(method)
    stack = atlas.stacks[block.stack]
    channels = Channels(stack, block.row, block, seed)
    values = chosen.score(channels)
    if block.n_experts:
        unseen = ranked_by_magnitude(method, atlas, block)
        if unseen.any():
            values = np.where(unseen[:, None], _magnitude(channels), values)
    undefined = int(np.count_nonzero(~np.isfinite(values)))
    if undefined:
        reached = np.any(stack.row("tokens", block.row))
        reason = "the atlas has no value there" if reached else "no calibration token reached it"
        raise AtlasError(
            f"{method} is undefined for {undefined} of {values.size} channels of layer {block.layer_index} "
            f"({block.module}): {reason}",
            hint="build the atlas on more text, or choose a method that needs weights only: magnitude",
        )
    return values


def ranked_by_magnitude(method: str, atlas: Atlas, block: Block) -> np.ndarray:
    """Which experts no calibration token reached, so that only their weights can rank their channels, bool (expert,).

    None (and an empty array for a dense FFN) where ``method`` needs no tokens.
    """
    if not block.n_experts or not find_method(method).needs_tokens:
        return np.zeros(block.n_experts, dtype=bool)
    return np.asarray(atlas.stacks[block.stack].row("tokens", block.row)) == 0


def find_method(name: str) -> Method:
    """The method called ``name``. Raises `UsageError` where there is none."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
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
    return np.random.default_rng([channels.seed, channels.block.index]).random(channels.block.shape)


_PAPER = "arXiv 2604.23475"

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("scar-lp", "loss proxy LP", f"{_PAPER}, equation 11", _scar_lp, ("supernodes",)),
        Method("scar-prot", "LP x Protect", f"{_PAPER}, equation 12", _scar_prot, ("supernodes",)),
        Method("scar-conn", "LP x ((1 - Conn) + Conn x Protect)", f"{_PAPER}, equation 13", _scar_conn, ("supernodes",)),
        Method("taylor", "E|u s|", "first-order Taylor expansion, arXiv 1906.10771", _taylor),
        Method("activation", "E[u^2]", "activation power", _activation),
        Method("wanda", "sqrt(E[u^2]) x L1 norm of the write vector", "Wanda-sp, arXiv 2306.11695", _wanda),
        Method(
            "wanda-group",
            "|W| x RMS input, summed over gate, up and write weights",
            f"{_PAPER}, Wanda-channel",
            _wanda_group,
        ),
        Method("flap", "Var[u] x squared L2 norm of the write vector", "arXiv 2312.11983", _flap, standardised=True),
        Method("magnitude", "sum of the L2 norms of write, up and gate", "weights alone", _magnitude, needs_tokens=False),
        Method("random", "uniform random numbers", "control", _random, needs_tokens=False),
    )
}
