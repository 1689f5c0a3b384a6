"""What docs/paper.md says about each model, from the results of bench/evidence.py. The rest of that page is written by hand. No torch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.evidence_page import Measured, nats, percent, rank_interval, refitted, seconds_of, spread
from chanfmt.analysis.resample import middle
from chanfmt.base.errors import UsageError
from chanfmt.base.markdown import table
from chanfmt.reporting.section import AGREES, DIFFERS, UNDECIDED, above, below
from surgery.evaluation.perplexity import Comparison, paired_bootstrap
from surgery.experiments.columns import losses_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

GPU = 2e14
"""Arithmetic per second that the computed times assume: a fifth of what recent data-centre GPUs reach in bfloat16."""
PAPER_PARAMETERS = 8.03e9
PLACE = re.compile(r"(<!-- evidence: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)

Answer = tuple[str, str]
"""A number with its interval, and the verdict on the paper's claim; empty without a claim."""


def filled(page: str, state: Sequence[Measured]) -> str:
    """``page`` with the answers of ``state`` in its places. Raises `UsageError` for the name of a place that is not known."""

    def fill(match: re.Match[str]) -> str:
        if match[2] not in PLACES:
            raise UsageError(f"no question is called {match[2]!r}", hint=f"write one of {', '.join(PLACES)} in the page")
        return f"{match[1]}{PLACES[match[2]](state)}\n{match[3]}"

    return PLACE.sub(fill, page)


def answers(question: Callable[[Measured], Answer | None]) -> Callable[[Sequence[Measured]], str]:
    """A table with a row for each model that answers ``question``."""

    def text(state: Sequence[Measured]) -> str:
        found = [(model.name, *answer) for model in state if (answer := question(model))]
        missing = [model.name for model in state if not question(model)]
        rows = [*found, *((name, "not measured", "") for name in missing)]
        return table(("model", "what it gave", "verdict on the claim"), rows)

    return text


def claimed(*statements: str) -> Callable[[Measured], Answer | None]:
    """The answer that `atlas report` gives to claims of the paper."""

    def answer(model: Measured) -> Answer | None:
        result = model.result(f"statistics/{model.main}")
        if result is None:
            return None
        found = [claim for claim in result["claims"] if claim["statement"] in statements]
        said = "; ".join(claim["measured"].replace("interval ", "") for claim in found)
        return (said, ", ".join(claim["verdict"] for claim in found)) if found else None

    return answer


def reading(model: Measured) -> Answer | None:
    values = model.column("reading", "supernodes_in_read_halo")
    if not len(values):
        return None
    found, chance = middle(values), float(np.median(model.column("reading", "chance")))
    return f"the read halo holds {spread(found, percent)} of the supernodes; chance {percent(chance)}", above(found, chance)


def removed(model: Measured) -> Answer | None:
    """The cost of the supernodes, and of as many random channels."""
    rows = (model.result("removal") or {"rows": []})["rows"]
    if not rows:
        return None
    core, control = compared(rows, ("supernodes", None)), compared(rows, ("supernodes", "random"))
    gap = between(rows, ("supernodes", "random"), ("supernodes", None))
    return f"supernodes {nats(core)}, as many random channels {nats(control)}, difference {nats(gap)}", verdict_above(gap)


def halo_removed(model: Measured) -> Answer | None:
    rows = (model.result("removal") or {"rows": []})["rows"]
    if not rows:
        return None
    halo, matched = compared(rows, ("halo", None)), compared(rows, ("halo", "lp-matched"))
    gap = between(rows, ("halo", "lp-matched"), ("halo", None))
    return f"halo {nats(halo)}, channels of the same LP {nats(matched)}, difference {nats(gap)}", verdict_above(gap)


def replaced(model: Measured) -> Answer | None:
    rows = (model.result("mean") or {"rows": []})["rows"]
    if not rows:
        return None
    core, control = compared(rows, ("supernodes", None)), compared(rows, ("supernodes", "random"))
    gap = between(rows, ("supernodes", "random"), ("supernodes", None))
    return f"supernodes by their means {nats(core)}, random channels by theirs {nats(control)}", verdict_above(gap)


def protected(model: Measured) -> Answer | None:
    rows = (model.result("protection") or {"rows": []})["rows"]
    pair = {row["protect"]: row for row in rows if row["method"] == "magnitude"}
    if set(pair) != {"none", "supernodes"}:
        return None
    gain = paired_bootstrap(losses_of(pair["none"]), losses_of(pair["supernodes"]))
    return f"magnitude, supernodes protected against not: {nats(gain)}", verdict_above(gain, sign=-1)


def scores(model: Measured) -> Answer | None:
    """Whether LP beats wanda."""
    rows = (model.result("protection") or {"rows": []})["rows"]
    free = {row["method"]: row for row in rows if row["protect"] == "none"}
    if not {"scar-lp", "wanda", "activation"} <= set(free):
        return None
    said = []
    for other in ("wanda", "activation"):
        said.append(f"{other} above scar-lp {nats(paired_bootstrap(losses_of(free['scar-lp']), losses_of(free[other])))}")
    gap = paired_bootstrap(losses_of(free["scar-lp"]), losses_of(free["wanda"]))
    return "; ".join(said), verdict_above(gap)


def single(model: Measured) -> Answer | None:
    result = model.result("channels")
    if result is None:
        return None
    rows = [row for row in result["rows"] if row["module"] is not None]
    lp, cost = (np.array([row[name] for row in rows], dtype=np.float64) for name in ("lp", "delta_nll"))
    value, low, high = rank_interval(lp, np.abs(cost), np.unique([row["layers"] for row in rows], return_inverse=True)[1])
    verdict = AGREES if low > 0 else DIFFERS if high < 0 else UNDECIDED
    return f"Spearman of LP with the size of the change, {len(rows)} channels: {value:.2f} ({low:.2f} to {high:.2f})", verdict


def other_texts(model: Measured) -> Answer | None:
    result = model.result("texts")
    if result is None:
        return None
    pairs = [pair for pair in result["pairs"] if pair["first"] == result["same"]["text"]]
    found = [(pair["second"], middle(np.array(pair["jaccard"], dtype=np.float64))) for pair in pairs]
    same = middle(np.array(result["same"]["jaccard"], dtype=np.float64))
    said = f"more of the same text {spread(same, percent)}" + "".join(f", {name} {spread(item, percent)}" for name, item in found)
    # The paper says that hardly any supernode of one domain is a supernode of another.
    verdicts = {below(item, 0.12) for _, item in found}
    return said, verdicts.pop() if len(verdicts) == 1 else UNDECIDED


def sizes(model: Measured) -> Answer | None:
    tokens, median, low, high = (
        model.column("stability-by-tokens", name) for name in ("tokens", "jaccard_median", "jaccard_low", "jaccard_high")
    )
    if not len(tokens):
        return None
    steps = zip(tokens, median, low, high, strict=True)
    return "; ".join(f"{int(one):,} tokens {two:.1%} ({three:.1%} to {four:.1%})" for one, two, three, four in steps), ""


def refit(model: Measured) -> Answer | None:
    found = refitted(model)
    if found is None:
        return None
    share, item = found
    return f"at {percent(share)}: {nats(item['none'][0])} without, {nats(item['lstsq'][0])} with least squares", ""


def compared(rows: Sequence[dict[str, Any]], key: tuple[str, str | None]) -> Comparison:
    return between(rows, (None, None), key)


def between(
    rows: Sequence[dict[str, Any]], first: tuple[str | None, str | None], second: tuple[str | None, str | None]
) -> Comparison:
    """The loss of the second removal above that of the first; (None, None) is the dense model."""
    one, two = (next(row for row in rows if (row["select"], row["control"]) == key) for key in (first, second))
    return paired_bootstrap(losses_of(one), losses_of(two))


def verdict_above(gap: Comparison, *, sign: int = 1) -> str:
    low, high = sorted((sign * gap.low, sign * gap.high))
    return AGREES if low > 0 else DIFFERS if high < 0 else UNDECIDED


def costs(state: Sequence[Measured]) -> str:
    """Seconds of every measurement: measured on a CPU, and computed for a GPU."""
    kinds = list(
        dict.fromkeys(
            stored["name"]
            for model in state
            for stored in model.results.values()
            if stored["tokens"] or "atlas/" in stored["name"]
        )
    )
    rows = []
    for kind in sorted(kinds):
        cells = []
        for model in state:
            stored = model.results.get(kind)
            if stored is None:
                cells.append("-")
                continue
            seconds, cpu, tokens = seconds_of(stored)
            passes = 2.0 if "widths" in stored["result"] else 1.0
            gpu = 2 * model.parameters * tokens * passes / GPU
            own = "" if cpu is None else f", {cpu:,.0f} of the CPU"
            cells.append(f"{tokens:,} tokens: {seconds:,.0f} s{own}; {gpu:.2g} s")
        rows.append((kind, *cells))
    return table(("measurement", *(model.name for model in state)), rows)


PLACES: dict[str, Callable[[Sequence[Measured]], str]] = {
    "concentration": answers(
        claimed("The top 1% of the channels carry most of a layer's LP", "The largest channel is far above the mean")
    ),
    "factors": answers(claimed("Concentration falls from LP to its factored form, to activation power, to curvature")),
    "overlap": answers(claimed("LP and activation power choose different channels")),
    "spearman": answers(
        claimed("LP and activation power rank the channels differently", "LP measures something else than the norms of weights")
    ),
    "halo": answers(
        claimed(
            "The halo is more redundant with the supernodes than other channels",
            "The halo is more redundant than other channels of like importance",
        )
    ),
    "reading": answers(reading),
    "channels": answers(single),
    "removal": answers(removed),
    "halo-removal": answers(halo_removed),
    "mean": answers(replaced),
    "scores": answers(scores),
    "protection": answers(protected),
    "refit": answers(refit),
    "texts": answers(other_texts),
    "sizes": answers(sizes),
    "costs": costs,
}
"""Name of a place in docs/paper.md to what is written there."""
