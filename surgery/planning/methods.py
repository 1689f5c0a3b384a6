"""Score every channel of an FFN from its atlas alone: higher means keep. Pure numpy, float64.

An FFN with experts has a row of scores per expert, from the expert's own tokens, as far as these are evidence.

To add a method, add its formula below, under a line with its name, and a test. The command line, plans, model cards and the
browser read the table `METHODS`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.choices import unknown
from chanfmt.base.errors import AtlasError
from chanfmt.format import schema
from surgery.planning.coverage import Believed, believed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from chanfmt.format.reader import Atlas, Stack
    from chanfmt.format.records import Block

    Formula = Callable[["Channels"], np.ndarray]


@dataclass(frozen=True)
class Channels:
    """One FFN's row of its stack, and the seed of the method ``random``.

    Attributes:
        stack: Arrays of the FFN's stack.
        row: The FFN's row in these arrays.
        block: The FFN.
        seed: Seed of the method ``random``.
    """

    stack: Stack
    row: int
    block: Block
    seed: int

    def __getitem__(self, name: str) -> np.ndarray:
        """The variable ``name``, float64: (channels,), or (1,) if it has one value per FFN; with a first axis of experts.

        Raises:
            AtlasError: The atlas lacks the variable.
        """
        values = np.asarray(self.stack.row(name, self.row), dtype=np.float64)
        return values if "channel" in schema.STACK_VARIABLE_BY_NAME[name].dimensions else values[..., None]


@dataclass(frozen=True)
class Method:
    """One way to rank channels.

    Attributes:
        name: As written after ``--method``.
        description: The formula in one line, for people.
        source: The paper or idea that the formula comes from.
        score: The formula. It returns float64 scores: (channels,), or (expert, channels).
        always_protects: Selectors (see `surgery.planning.selectors`) that belong to the method's definition.
        needs_tokens: Whether the scores are undefined for FFNs that no calibration token reached.
        standardised: Whether scores must be standardised within each FFN before FFNs are compared.
        protects_halo: Whether the score is LP, reduced in the halo by the protection factor.
    """

    name: str
    description: str
    source: str
    score: Callable[[Channels], np.ndarray]
    always_protects: tuple[str, ...] = ()
    needs_tokens: bool = True
    standardised: bool = False
    protects_halo: bool = False


_PAPER = "arXiv 2604.23475"

METHODS: dict[str, Method] = {}
"""Name to method, in the order in which they are listed."""


def _method(name: str, description: str, source: str, **traits: Any) -> Callable[[Formula], Formula]:
    """Enter the formula that follows into `METHODS`. See `Method` for the arguments."""

    def enter(formula: Formula) -> Formula:
        METHODS[name] = Method(name, description, source, formula, **traits)
        return formula

    return enter


def score(method: str, atlas: Atlas, block: Block, seed: int = 0) -> np.ndarray:
    """Scores of ``block``'s channels, float64, finite. The lowest score is pruned first.

    Returns:
        (channels,), or (expert, channels) if the FFN has experts. The fewer tokens reached an expert, the more its scores follow
        the norms of its weights (see `surgery.planning.coverage`).

    Raises:
        UsageError: ``method`` is unknown.
        AtlasError: The atlas lacks what the method needs, or has no value for some channel.
    """
    return scored(method, atlas, block, seed).values


def scored(method: str, atlas: Atlas, block: Block, seed: int = 0) -> Believed:
    """As `score`, with the tokens at which an expert's own scores decide; 0 if the method or the FFN needs none."""
    chosen = find_method(method)
    stack = atlas.stacks[block.stack]
    channels = Channels(stack, block.row, block, seed)
    values = chosen.score(channels)
    routed = bool(block.n_experts) and chosen.needs_tokens
    unseen = ranked_by_magnitude(method, atlas, block)
    if unseen.any():
        values = np.where(unseen[:, None], 0.0, values)
    undefined = int(np.count_nonzero(~np.isfinite(values)))
    if undefined:
        reached = np.any(stack.row("tokens", block.row))
        reason = "the atlas has no value there" if reached else "no calibration token reached it"
        raise AtlasError(
            f"{method} is undefined for {undefined} of {values.size} channels of layer {block.layer_index} "
            f"({block.module}): {reason}",
            hint="build the atlas on more text, or choose a method that needs weights only: magnitude",
        )
    if not routed:
        return Believed(values, 0.0)
    return believed(values, _magnitude(channels), np.asarray(stack.row("tokens", block.row)))


def ranked_by_magnitude(method: str, atlas: Atlas, block: Block) -> np.ndarray:
    """Which experts no calibration token reached, bool (expert,). Only the norms of their weights rank their channels.

    All are False if ``method`` needs no tokens. The array is empty for a dense FFN.
    """
    if not block.n_experts or not find_method(method).needs_tokens:
        return np.zeros(block.n_experts, dtype=bool)
    return np.asarray(atlas.stacks[block.stack].row("tokens", block.row)) == 0


def unprotected_halo(method: str, atlas: Atlas, blocks: Iterable[Block]) -> tuple[str, ...]:
    """A warning if ``method`` should reduce the scores of the halo, and the atlas holds no redundancy to do so in ``blocks``."""
    stacks = dict.fromkeys(block.stack for block in blocks)
    without = [name for name in stacks if "redundancy" not in atlas.stacks[name]]
    if not find_method(method).protects_halo or len(without) < len(stacks):
        return ()
    return (
        f"{method} ranks channels as scar-lp does: the atlas holds no redundancy, so the protection factor is 1 everywhere. "
        "Merging atlases drops redundancy, and so does atlas label --rho with --model. The atlas of one build has it, on one text or on "
        "several",
    )


def find_method(name: str) -> Method:
    """The method called ``name``. Raises `UsageError` if it is unknown."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


@_method("scar-lp", "loss proxy LP", f"{_PAPER}, equation 11", always_protects=("supernodes",))
def _scar_lp(channels: Channels) -> np.ndarray:
    return channels["lp"]


@_method("scar-prot", "LP x Protect", f"{_PAPER}, equation 12", always_protects=("supernodes",), protects_halo=True)
def _scar_prot(channels: Channels) -> np.ndarray:
    return channels["lp"] * channels["protection"]


@_method(
    "scar-conn",
    "LP x ((1 - Conn) + Conn x Protect)",
    f"{_PAPER}, equation 13",
    always_protects=("supernodes",),
    protects_halo=True,
)
def _scar_conn(channels: Channels) -> np.ndarray:
    conn = channels["connectivity"]
    return channels["lp"] * ((1 - conn) + conn * channels["protection"])


@_method("taylor", "E|u s|", "first-order Taylor expansion, arXiv 1906.10771")
def _taylor(channels: Channels) -> np.ndarray:
    return channels["taylor"]


@_method("activation", "E[u^2]", "activation power")
def _activation(channels: Channels) -> np.ndarray:
    return channels["activation_power"]


@_method("wanda", "sqrt(E[u^2]) x L1 norm of the write vector", "Wanda-sp, arXiv 2306.11695")
def _wanda(channels: Channels) -> np.ndarray:
    return np.sqrt(channels["activation_power"]) * channels["write_norm_l1"]


@_method("wanda-group", "|W| x RMS input, summed over gate, up and write weights", f"{_PAPER}, Wanda-channel")
def _wanda_group(channels: Channels) -> np.ndarray:
    return channels["wanda_group"]


@_method("flap", "Var[u] x squared L2 norm of the write vector", "arXiv 2312.11983", standardised=True)
def _flap(channels: Channels) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = channels["sum_u"] / channels["tokens"]
        power = channels["sum_u2"] / channels["tokens"]
    # The difference of two equal terms may round below zero.
    return np.maximum(power - mean**2, 0.0) * channels["write_norm"] ** 2


@_method("magnitude", "sum of the L2 norms of write, up and gate", "weights alone", needs_tokens=False)
def _magnitude(channels: Channels) -> np.ndarray:
    total = channels["write_norm"] + channels["up_norm"]
    return total + channels["gate_norm"] if channels.stack.gated else total


@_method("random", "uniform random numbers", "control", needs_tokens=False)
def _random(channels: Channels) -> np.ndarray:
    # The FFN's own index is part of the seed, so the scores do not depend on which FFNs were scored before.
    return np.random.default_rng([channels.seed, channels.block.index]).random(channels.block.shape)
