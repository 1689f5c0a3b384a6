"""How far an expert's scores are to be believed: the fewer tokens reached it, the more the norms of its weights decide. Pure numpy.

The score of a channel is a mean over the n tokens that reached its expert, so the variance of its logarithm is about `VARIANCE`
/ n. The prior of the logarithm is that of the channel's norms, shifted to the level of the layer; the layer's experts scatter
around it with a variance of their own. The posterior mean weighs the score with n / (n + half), and the prior with the rest.
`half`, the tokens at which both weigh the same, is `VARIANCE` divided by the layer's variance. This is empirical Bayes with
a normal prior, also called credibility (Buhlmann, "Experience rating and credibility", ASTIN Bulletin 4, 1967).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.text import span

if TYPE_CHECKING:
    from collections.abc import Sequence

VARIANCE = 8.0
"""Relative variance of what one token adds to a score: that of (u s)^2 for two independent normal variables, 9 - 1."""


@dataclass(frozen=True, eq=False)
class Believed:
    """Scores of a layer's experts, in the light of how many tokens reached them.

    Attributes:
        values: The scores, float64 (expert, channels).
        half: Tokens at which an expert's score and the norms of its weights weigh the same; inf if the scores of the layer show
            nothing that chance would not.
    """

    values: np.ndarray
    half: float


def believed(values: np.ndarray, norms: np.ndarray, tokens: np.ndarray) -> Believed:
    """The posterior means of ``values``.

    An expert without tokens gets the prior, which ranks its channels as ``norms`` do. An expert with many tokens keeps its
    scores. A score or a norm of 0 counts as half of the smallest positive one of the layer, because nothing was seen in so many
    tokens, and not never. If there is no positive score or no positive norm, nothing is changed for experts with tokens.

    Args:
        values: Scores of the experts that tokens reached, not negative, float64 (expert, channels). The others are not read.
        norms: A score from the weights alone, not negative, float64 (expert, channels).
        tokens: Tokens that reached each expert, int (expert,).
    """
    seen = tokens > 0
    if not (values[seen] > 0).any() or not (norms > 0).any():
        return Believed(np.where(seen[:, None], values, norms), math.inf)
    prior = _logarithms(norms)
    excess = _logarithms(values[seen]) - prior[seen]
    share = tokens[seen] / tokens[seen].sum()
    level = float(share @ excess.mean(axis=1))
    # Chance alone scatters the scores too: VARIANCE / n in each expert, weighted by its share of the tokens.
    variance = float(share @ np.square(excess - level).mean(axis=1)) - VARIANCE * len(share) / float(tokens[seen].sum())
    half = VARIANCE / variance if variance > 0 else math.inf
    posterior = prior + level
    posterior[seen] += (tokens[seen] / (tokens[seen] + half))[:, None] * (excess - level)
    return Believed(np.exp(posterior), half)


def _logarithms(values: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(values, values[values > 0].min() / 2))


@dataclass(frozen=True)
class Evidence:
    """How well the experts that a plan cuts were covered, and what the others keep.

    Attributes:
        experts: Experts of the FFNs that could be cut.
        unseen: Experts that no token reached.
        few: Experts that fewer tokens than `Believed.half` reached, those without tokens among them.
        half: The smallest and the largest `Believed.half` of the layers; inf if the scores of a layer show nothing.
        kept: Smallest and largest share of their channels that the ``few`` experts keep; None if there are none.
    """

    experts: int
    unseen: int
    few: int
    half: tuple[float, float]
    kept: tuple[float, float] | None

    def __str__(self) -> str:
        need = span(*(f"{math.ceil(number):,}" if math.isfinite(number) else "more than there are" for number in self.half))
        text = f"{self.few:,} of {self.experts:,} got fewer tokens than their scores need ({need})"
        if self.kept is None:
            return text
        none = f", {self.unseen:,} of them none" if self.unseen else ""
        share = span(*(f"{share:.4g}" for share in self.kept))
        return f"{text}{none}: the norms of their weights rank them more; they keep {share} of their channels, as their layers do"

    def to_json(self) -> dict[str, Any]:
        """The numbers, with null for inf."""
        half = [number if math.isfinite(number) else None for number in self.half]
        return {"experts": self.experts, "unseen": self.unseen, "few": self.few, "tokens_needed": half, "kept": self.kept}


def evidence(experts: Sequence[tuple[np.ndarray, float, float]]) -> Evidence | None:
    """The `Evidence` of layers with experts; None if there are none.

    Args:
        experts: For each layer, the tokens of its experts, int (expert,), its `Believed.half`, and the share that it keeps.
    """
    if not experts:
        return None
    few = [(int((tokens < half).sum()), share) for tokens, half, share in experts]
    halves = [half for _, half, _ in experts]
    shares = [share for count, share in few if count]
    return Evidence(
        sum(len(tokens) for tokens, _, _ in experts),
        sum(int((tokens == 0).sum()) for tokens, _, _ in experts),
        sum(count for count, _ in few),
        (min(halves), max(halves)),
        (min(shares), max(shares)) if shares else None,
    )
