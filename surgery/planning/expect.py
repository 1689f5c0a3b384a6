"""What a cut like this one cost where somebody measured it, and what about it nobody measured. Nothing is extrapolated."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from surgery.planning.measured import measured_cuts
from surgery.planning.options import PlanOptions
from surgery.planning.sizes import count_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from surgery.planning.measured import Loss, MeasuredCut
    from surgery.planning.plan import PruningPlan

SIZE_FACTOR = 3.0
"""A model with so many times more or fewer parameters than the nearest measured one is of another size class."""
CHANNELS, PARAMETERS = "FFN channels", "parameters"
"""What the share of a cut can be a share of."""
_ROUNDING = 0.011
"""A share may be so much larger than the largest measured one: widths are rounded to multiples."""
_NO_RECOVERY = "none"


@dataclass(frozen=True)
class CutAsked:
    """A cut that somebody asks about.

    Attributes:
        parameters: Parameters of the dense model; 0 if they are not known.
        share: Share that the cut removes.
        share_of: `CHANNELS` or `PARAMETERS`.
        method, allocation: As in `surgery.planning.options.PlanOptions`.
        recovery: Name of the recovery; None if it is not chosen yet.
        unusual: What else about the cut no measured row has, as nouns: ``an inverted plan``.
    """

    parameters: int
    share: float
    share_of: str
    method: str
    allocation: str = "uniform"
    recovery: str | None = None
    unusual: tuple[str, ...] = ()


@dataclass(frozen=True)
class Expectation:
    """What is known about a cut from cuts that were measured.

    Attributes:
        nearest: The nearest measured cut for each recovery that the cut may have.
        outside: What about the cut nobody measured, each in a phrase; empty if a measured cut is like it.
    """

    nearest: tuple[MeasuredCut, ...]
    outside: tuple[str, ...]

    @property
    def rows(self) -> list[list[str]]:
        """Pairs of a name and a line for each of `nearest`. The name is empty but in the first pair."""
        return [["nearest measured" if not number else "", measured_text(cut)] for number, cut in enumerate(self.nearest)]

    @property
    def warning(self) -> str:
        """A warning about `outside`; empty if there is nothing to warn of."""
        if not self.outside:
            return ""
        return f"this cut lies outside of what was measured, so its loss may be much larger: {'; '.join(self.outside)}"

    def to_json(self) -> dict[str, Any]:
        """The object ``expected`` of ``--json``."""
        return {"nearest": [asdict(cut) for cut in self.nearest], "outside": list(self.outside)}


def asked_of(plan: PruningPlan, recovery: str | None = None) -> CutAsked:
    """The cut that ``plan`` makes, with the recovery ``recovery`` (None: not chosen yet)."""
    unusual = {
        "an inverted plan": plan.invert,
        "a cut of some FFNs only": plan.layers is not None or bool(plan.stack),
        "routed experts": any(block.n_experts for block in plan.blocks),
        "FFNs outside a decoder": any(block.place != "decoder" for block in plan.blocks),
        "protection that changes the cut": any(effect.cost for effect in plan.protection),
    }
    return CutAsked(
        plan.parameters,
        plan.scope_sparsity_reached,
        CHANNELS,
        plan.method,
        plan.allocation,
        recovery,
        tuple(name for name, holds in unusual.items() if holds),
    )


def expect(asked: CutAsked, cuts: Sequence[MeasuredCut] | None = None) -> Expectation:
    """Find the measured cuts that are nearest to ``asked``.

    The rows of the method and allocation come first, then those of the model with the nearest number of parameters, then for
    each recovery the row with the nearest share. Of two shares equally near, the larger one counts, because it loses more.

    Args:
        cuts: The measured cuts; None for those of the package.
    """
    pool = tuple(measured_cuts() if cuts is None else cuts)
    if not pool:
        return Expectation((), ())
    outside = []
    for name, wanted, fallback in (
        ("method", asked.method, PlanOptions.method),
        ("allocation", asked.allocation, PlanOptions.allocation),
    ):
        found = _with(pool, name, wanted)
        if not found:
            outside.append(f"the {name} {wanted} was not measured ({', '.join(_names(pool, name))} {_were(pool, name)})")
        pool = found or _with(pool, name, fallback) or pool
    outside += [f"{name} {'were' if name.endswith('s') else 'was'} not measured" for name in asked.unusual]
    pool, far = _nearest_model(pool, asked.parameters)
    outside += far
    if asked.recovery is not None:
        found = _with(pool, "recovery", asked.recovery)
        if not found:
            outside.append(
                f"the recovery {asked.recovery} was not measured for it ({', '.join(_names(pool, 'recovery'))} {_were(pool, 'recovery')})"
            )
        pool = found or pool
    nearest = tuple(_nearest_share(_with(pool, "recovery", recovery), asked) for recovery in _shown_recoveries(pool))
    most = max(_share(cut, asked.share_of) for cut in pool)
    if asked.share > most + _ROUNDING:
        outside.append(f"it removes {asked.share:.0%} of the {asked.share_of}, and at most {most:.0%} were measured")
    return Expectation(nearest, tuple(outside))


def measured_text(cut: MeasuredCut) -> str:
    """A measured cut in a line, with its loss on every text."""
    how = cut.method if cut.recovery == _NO_RECOVERY else f"{cut.method} + {cut.recovery}"
    allocation = "" if cut.allocation == PlanOptions.allocation else f", {cut.allocation} allocation"
    losses = ", ".join(_loss_text(loss, unit=not number) for number, loss in enumerate(cut.losses))
    return f"{cut.model}, {cut.channels_removed:.0%} of FFN channels, {how}{allocation}: {losses}"


def _loss_text(loss: Loss, *, unit: bool) -> str:
    interval = "" if loss.low is None or loss.high is None else f" ({loss.low:.2f} to {loss.high:.2f})"
    return f"{loss.above:+.2f}{' nats per token' if unit else ''} on {loss.text}{interval}"


def _nearest_model(cuts: Sequence[MeasuredCut], parameters: int) -> tuple[tuple[MeasuredCut, ...], list[str]]:
    """The cuts of the model whose number of parameters is nearest, and a phrase if that is not near."""
    if not parameters:
        return tuple(cuts), ["the atlas does not say how large the model is"]
    size = min((cut.parameters for cut in cuts), key=lambda other: abs(math.log(other / parameters)))
    found = tuple(cut for cut in cuts if cut.parameters == size)
    if 1 / SIZE_FACTOR <= parameters / size <= SIZE_FACTOR:
        return found, []
    return found, [f"the model has {count_text(parameters)} parameters, and the nearest measured one has {count_text(size)}"]


def _shown_recoveries(cuts: Sequence[MeasuredCut]) -> list[str]:
    """No recovery, and the recovery whose measured losses are smallest; those of the two that ``cuts`` have."""
    others = [name for name in _names(cuts, "recovery") if name != _NO_RECOVERY]
    best = min(others, key=lambda name: _mean_loss(_with(cuts, "recovery", name)), default=None)
    names = [] if best is None else [best]
    return [_NO_RECOVERY, *names] if _with(cuts, "recovery", _NO_RECOVERY) else names


def _mean_loss(cuts: Sequence[MeasuredCut]) -> float:
    """Mean loss for each share removed, so that a recovery measured at smaller shares only does not look better for it."""
    return sum(loss.above / cut.channels_removed for cut in cuts for loss in cut.losses) / sum(len(cut.losses) for cut in cuts)


def _nearest_share(cuts: Iterable[MeasuredCut], asked: CutAsked) -> MeasuredCut:
    def distance(cut: MeasuredCut) -> tuple[float, float]:
        share = _share(cut, asked.share_of)
        return round(abs(share - asked.share), 6), -share

    return min(cuts, key=distance)


def _share(cut: MeasuredCut, of: str) -> float:
    return cut.parameters_removed if of == PARAMETERS else cut.channels_removed


def _with(cuts: Iterable[MeasuredCut], name: str, value: str) -> tuple[MeasuredCut, ...]:
    return tuple(cut for cut in cuts if getattr(cut, name) == value)


def _names(cuts: Iterable[MeasuredCut], name: str) -> list[str]:
    return list(dict.fromkeys(getattr(cut, name) for cut in cuts))


def _were(cuts: Iterable[MeasuredCut], name: str) -> str:
    return "was" if len(_names(cuts, name)) == 1 else "were"
