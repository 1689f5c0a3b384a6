"""The page of bench/evidence.py, as a function of its results: docs/evidence.md and the figures beside it. No torch."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.algebra.compare import rank_correlation
from chanfmt.analysis.resample import Middle, middle
from chanfmt.base.errors import UsageError
from chanfmt.base.markdown import table
from chanfmt.reporting import paper
from chanfmt.reporting.words import percent, times
from surgery.evaluation.perplexity import CONFIDENCE, RESAMPLES, Comparison, paired_bootstrap
from surgery.experiments.columns import losses_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

FORMAT = "evidence/1"
COMMAND = "python bench/evidence.py"
IMAGES = "images"
"""Directory of the figures, beside the page."""
DEPENDENT = ("texts",)
"""Measurements that use the atlases that are there, and are made again when there are more."""
KINDS = ("statistics", "texts", "protection", "removal", "mean", "channels", "cuts")
REPLICATES = 1000
"""Bootstrap samples of a rank correlation."""


@dataclass(frozen=True)
class Measured:
    """What is known of one model.

    Attributes:
        about: Its name, its weights, and the texts that it was measured on.
        results: Name of a measurement to what it stored.
    """

    about: dict[str, Any]
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.about["name"])

    @property
    def main(self) -> str:
        """The main text."""
        return next(iter(self.about["texts"]))

    def result(self, name: str) -> dict[str, Any] | None:
        return self.results[name]["result"] if name in self.results else None

    @property
    def atlas(self) -> dict[str, Any] | None:
        return self.result(f"atlas/{self.main}")

    @property
    def parameters(self) -> int:
        """Parameters of the model; 0 if no atlas of it was measured."""
        return next((stored["result"]["parameters"] for stored in self.results.values() if "parameters" in stored["result"]), 0)

    def column(self, table_name: str, column: str, text: str = "") -> np.ndarray:
        """A column of a table of the report, float64 (ffn,); empty if it was not measured."""
        result = self.result(f"statistics/{text or self.main}")
        values = (result or {"tables": {}})["tables"].get(table_name, {}).get(column, [])
        return np.array(values, dtype=np.float64)

    def middle(self, table_name: str, column: str, text: str = "") -> Middle:
        return middle(self.column(table_name, column, text))


def read_state(directory: Path) -> list[Measured]:
    """Read what a state directory holds, the smallest model first. Raises `UsageError` if it holds no model."""
    found = []
    for path in sorted(directory.glob("*/model.json")):
        about = _read(path)
        results = [_read(file) for file in sorted(path.parent.glob("*.json")) if file != path]
        found.append(Measured(about, {stored["name"]: stored for stored in results}))
    if not found:
        raise UsageError(f"{directory} holds no results", hint="measure a model first")
    return sorted(found, key=lambda model: (model.parameters or np.inf, model.name))


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format") != FORMAT:
        raise UsageError(f"{path} is not a result of bench/evidence.py", hint=f"name another directory than {path.parent.parent}")
    return content


# Numbers as text.


def spread(found: Middle, show: Callable[[float], str]) -> str:
    """A median with its interval; ``-`` if it is not known."""
    if not found.count:
        return "-"
    return show(found.median) + (f" ({show(found.low)} to {show(found.high)})" if np.isfinite(found.low) else "")


def points(value: float) -> str:
    return f"{100 * value:+.1f}"


def nats(found: Comparison) -> str:
    interval = f" ({found.low:+.3f} to {found.high:+.3f})" if np.isfinite(found.low) else ""
    return f"{found.difference:+.3f}{interval}"


def count(value: int) -> str:
    """A number of parameters as people say it."""
    return f"{value / 1e9:.2f}B" if value >= 1e9 else f"{value / 1e6:.0f}M"


def names(models: Iterable[Measured]) -> str:
    found = [model.name for model in models]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} and {found[-1]}"


def by_size(what: str, found: Sequence[tuple[Measured, Middle]], show: Callable[[float], str]) -> str:
    """A sentence on whether a median changes with the number of parameters, by the intervals of neighbours in size."""
    known = [(model, item) for model, item in found if item.count]
    if len(known) < 2:
        return f"{what}: one model says nothing about size."
    medians = [item.median for _, item in known]
    listed = ", ".join(f"{show(item.median)} at {count(model.parameters)}" for model, item in known)
    if not all(np.isfinite([item.low for _, item in known])):
        return f"{what}: {listed}, without intervals."
    pairs = list(itertools.pairwise(item for _, item in known))
    rising, falling = (all(sign * (b - a) > 0 for a, b in itertools.pairwise(medians)) for sign in (1, -1))
    apart = all(b.low > a.high if rising else b.high < a.low for a, b in pairs)
    if len(known) == 2:
        larger = "has more" if rising else "has less"
        return f"{what}: {listed}. The larger model {larger}, " + (
            "and the intervals do not overlap." if apart else "but the intervals overlap."
        )
    if rising or falling:
        verb = "rises" if rising else "falls"
        verdict = (
            f"it {verb} with size, and the intervals of neighbours do not overlap"
            if apart
            else f"the median {verb} with size, but intervals of neighbours overlap"
        )
    else:
        verdict = "it does not follow size"
    return f"{what}: {listed}. Here {verdict}."


# The page.


def rendered(state: Sequence[Measured], images: Iterable[str] = ()) -> str:
    """The page in Markdown. It has a section for every question that at least one model answers."""
    sections = [
        claims,
        with_size,
        concentration,
        factors,
        controls,
        halo,
        protection,
        removal,
        texts,
        sample_sizes,
        channels,
        cuts,
    ]
    drawn = set(images)
    parts = ["\n".join(head(state))]
    parts += ["\n".join(lines) for section in sections if (lines := section(state, drawn))]
    parts.append("\n".join(commands(state)))
    return "\n\n".join(parts) + "\n"


def head(state: Sequence[Measured]) -> list[str]:
    first = state[0]
    rows = []
    for model in state:
        atlas = model.atlas
        widths = (atlas or {}).get("widths", [])
        rows.append(
            (
                model.name,
                count(model.parameters) if model.parameters else "-",
                (atlas or {}).get("model_type", "-"),
                model.about["weights"] or "its own",
                f"{len(widths)} of {', '.join(f'{width}' for width in sorted(set(widths)))} channels" if widths else "-",
                f"{atlas['sequences']} x {atlas['seq_len']}" if atlas else "-",
                "BOS" if bos_of(model) else "no",
            )
        )
    described = first.about.get("described", {})
    kinds = "; ".join(f"*{name}* is {described.get(name, source)}" for name, source in first.about["texts"].items())
    return [
        "# Evidence from real models",
        "",
        'What do the questions of "Supernodes and Halos" (arXiv 2604.23475) give on models that we could measure? '
        "`bench/evidence.py` measured every number on this page and wrote the page. [The paper, command by command](paper.md) says "
        "how to ask one of the questions of your own model.",
        "",
        table(
            ("model", "parameters", "family", "weights", "FFNs", f"{first.main}: sequences x tokens", "in front of a block"), rows
        ),
        "",
        f"Of the texts, {kinds}. Cuts and removals are judged on {first.about['evaluate']}. Statistics describe the text *{first.main}* "
        "unless a table says something else. Weights of few bits were dequantised to float32. Parameters are those of the model as it is loaded.",
        "",
        "Numbers in brackets are 95% intervals. An interval of a median resamples the FFNs of the model. An interval of a loss "
        "resamples the blocks of text, in pairs with the model that it is compared with; with fewer than twenty blocks, it is too "
        "narrow. All seeds are 0.",
        "",
        *caution(state),
    ]


def caution(state: Sequence[Measured]) -> list[str]:
    """A paragraph that says what these models cannot show."""
    if len(state) < 2:
        return ["**One model says nothing about size.**"]
    families = {(model.atlas or {}).get("model_type", model.name) for model in state}
    return [
        f"**{NUMBERS.get(len(state), str(len(state)))} models are not a law of size.** They have {len(state)} sizes and {len(families)} "
        "families. They differ in training, in text and in weights too, and nothing here tells these differences from size. A "
        f"sentence about size says what these models show, and no more. The paper's numbers come from {paper.MODEL}, which is "
        f"{8.03e9 / max(model.parameters or 1 for model in state):.0f} times as large as the largest model here."
    ]


NUMBERS = {2: "Two", 3: "Three", 4: "Four", 5: "Five"}


def bos_of(model: Measured) -> bool:
    return bool((model.atlas or {}).get("ends")) or any(
        stored["result"].get("identity", {}).get("before") for stored in model.results.values()
    )


def having(state: Sequence[Measured], name: str) -> list[Measured]:
    """Models with the result ``name``; with ``statistics``, that of the main text."""
    return [model for model in state if (f"statistics/{model.main}" if name == "statistics" else name) in model.results]


def missing(state: Sequence[Measured], found: Sequence[Measured]) -> list[str]:
    without = [model for model in state if model not in found]
    return ["", f"Not measured: {names(without)}."] if without else []


def image(drawn: set[str], name: str, words: str) -> list[str]:
    return [f"![{words}]({IMAGES}/{name})", ""] if name in drawn else []


def per_model(state: Sequence[Measured], heading: str, rows: Sequence[tuple[str, Callable[[Measured], str]]]) -> str:
    """A table with a column for each model."""
    return table(
        (heading, *(model.name for model in state)), [(name, *(value(model) for model in state)) for name, value in rows]
    )


def claims(state: Sequence[Measured], drawn: set[str]) -> list[str]:
    """The paper's claims with a verdict for each model."""
    found = having(state, "statistics")
    if not found:
        return []
    by_model = [
        {claim["statement"]: claim for claim in (model.result(f"statistics/{model.main}") or {})["claims"]} for model in found
    ]
    statements = list(dict.fromkeys(itertools.chain.from_iterable(by_model)))
    rows = []
    for statement in statements:
        said = next(claim for model in by_model if (claim := model.get(statement)))
        verdicts = [model[statement]["verdict"] if statement in model else "-" for model in by_model]
        rows.append((statement, said["paper"], *verdicts, said["criterion"]))
    agreeing = [row[0] for row in rows if set(row[2:-1]) == {"agrees"}]
    differing = [row[0] for row in rows if set(row[2:-1]) == {"differs"}]
    lines = [
        "## The paper's claims",
        "",
        "These are the verdicts of `atlas report`. *Undecided* means that the interval includes both answers.",
        "",
        table(("the paper says", "its numbers", *(model.name for model in found), "a model agrees if"), rows),
        "",
    ]
    if len(found) > 1:
        lines += [f"These hold on every model here: {'; '.join(agreeing)}.", ""] if agreeing else []
        lines.append(
            f"Of {len(rows)} claims, {len(agreeing)} agree on every model here and {len(differing)} differ on every model here"
            + (
                f": {'; '.join(text[0].lower() + text[1:] if not text.startswith('LP') else text for text in differing)}"
                if differing
                else ""
            )
            + "."
        )
    return lines + missing(state, found)


def common_share(state: Sequence[Measured]) -> tuple[int, list[tuple[Measured, Middle]]]:
    """The largest number of tokens that the share of the top 1% is known at for every model, and the shares; 0 if there is none."""
    by_model = [
        {
            int(item["tokens"]): item["top_share"]
            for item in (model.result(f"statistics/{model.main}") or {}).get("shares_by_tokens", [])
        }
        for model in state
    ]
    shared = set.intersection(*(set(found) for found in by_model)) if by_model else set()
    if not shared:
        return 0, []
    tokens = max(shared)
    return tokens, [
        (model, middle(np.array(found[tokens], dtype=np.float64))) for model, found in zip(state, by_model, strict=True)
    ]


def with_size(state: Sequence[Measured], drawn: set[str]) -> list[str]:
    """What changes with the number of parameters, and what does not."""
    found = having(state, "statistics")
    if len(found) < 2:
        return []

    def of(table_name: str, column: str) -> list[tuple[Measured, Middle]]:
        return [(model, model.middle(table_name, column)) for model in found]

    tokens, shares = common_share(found)
    gaps = [
        (model, middle(model.column("factors", "lp_top_share") - model.column("factors", "lp_factored_top_share")))
        for model in found
    ]
    questions: list[tuple[str, list[tuple[Measured, Middle]], Callable[[float], str]]] = [
        ("The share of LP in the top 1%", of("concentration", "top_share"), percent),
        *([(f"The same share from {tokens:,} tokens of each", shares, percent)] if shares else []),
        ("The largest channel over the mean", of("concentration", "max_over_mean"), times),
        ("The share of activation power in its top 1%", of("factors", "activation_power_top_share"), percent),
        ("What LP has over its factored form, in points", gaps, points),
        ("Spearman's correlation of LP with activation power", of("spearman", "activation_power"), times),
        ("The redundancy of the halo over that of channels matched in LP", of("halo", "over_matched"), times),
        ("The redundancy of the halo over its null", of("halo", "over_null"), times),
    ]
    sentences = [(what, by_size(what, items, show)) for what, items, show in questions]
    following = [what for what, sentence in sentences if "not overlap" in sentence]
    return [
        "## What changes with size",
        "",
        *(f"- {sentence}" for _, sentence in sentences),
        "",
        (
            f"So {len(following)} of these {len(sentences)} numbers {'differs' if len(following) == 1 else 'differ'} in the order of size "
            f"by more than the intervals: {'; '.join(following)}."
            if following
            else f"So none of these {len(sentences)} numbers follows size by more than its intervals on these models."
        ),
        "The paper sees the share grow from 40.2% at 8B to 61.4% at 70B, and what LP has over its factored form from 1.9 to 29.3 points.",
    ]


def concentration(state: Sequence[Measured], drawn: set[str]) -> list[str]:
    found = having(state, "statistics")
    if not found:
        return []

    def number(name: str, show: Callable[[float], str]) -> Callable[[Measured], str]:
        return lambda model: spread(model.middle("concentration", name), show)

    return [
        "## Concentration by depth",
        "",
        *image(drawn, "evidence-concentration.svg", "Share of LP in the top 1% of the channels, by depth and against parameters"),
        per_model(
            found,
            "median FFN",
            [
                ("top 1% hold of LP", number("top_share", percent)),
                ("smallest and largest FFN", lambda model: _range(model.middle("concentration", "top_share"))),
                ("times their share", number("top_over_even", times)),
                ("largest channel over the mean", number("max_over_mean", times)),
                ("channels that carry the mass (n_eff)", number("effective_channels", times)),
                ("first third of the FFNs", lambda model: _third(model, 0)),
                ("middle third", lambda model: _third(model, 1)),
                ("last third", lambda model: _third(model, 2)),
            ],
        ),
        "",
        f"The paper has {paper.TOP_SHARE:.1%} ({paper.TOP_SHARE_RANGE[0]:.1%} to {paper.TOP_SHARE_RANGE[1]:.1%} over layers) on "
        f"{paper.MODEL}, and {paper.MAX_OVER_MEAN:,.0f} times.",
        *by_text(found),
        *missing(state, found),
    ]


def _range(found: Middle) -> str:
    return f"{percent(found.smallest)} to {percent(found.largest)}" if found.count else "-"


def _third(model: Measured, number: int) -> str:
    values = model.column("concentration", "top_share")
    return spread(middle(np.array_split(values, 3)[number]), percent)


FACTORS = {"lp": "LP", "lp_factored": "factored LP", "activation_power": "activation power", "curvature": "curvature"}


def by_text(state: Sequence[Measured]) -> list[str]:
    """The share of the top 1% on every text, as a table; nothing if there is one text."""
    texts_of = [text for text in state[0].about["texts"] if any(f"statistics/{text}" in model.results for model in state)]
    if len(texts_of) < 2:
        return []

    def share(text: str) -> Callable[[Measured], str]:
        def cell(model: Measured) -> str:
            tokens = (model.result(f"atlas/{text}") or {}).get("tokens")
            return spread(model.middle("concentration", "top_share", text), percent) + (f", {tokens:,} tokens" if tokens else "")

        return cell

    rows = [(text, share(text)) for text in texts_of]
    return ["", "The share that the top 1% hold, on each text:", "", per_model(state, "text", rows)]


def factors(state: Sequence[Measured], drawn: set[str]) -> list[str]:
    found = having(state, "statistics")
    if not found:
        return []

    def share(name: str) -> Callable[[Measured], str]:
        return lambda model: spread(model.middle("factors", f"{name}_top_share"), percent)

    def step(first: str, second: str) -> Callable[[Measured], str]:
        return lambda model: spread(
            middle(model.column("factors", f"{first}_top_share") - model.column("factors", f"{second}_top_share")), points
        )

    rows = [(f"top 1% hold of {words} (the paper: {paper.FACTORS[name]:.1%})", share(name)) for name, words in FACTORS.items()]
    rows += [
        (f"{FACTORS[one]} over {FACTORS[two]}, points within an FFN", step(one, two)) for one, two in itertools.pairwise(FACTORS)
    ]
    return [
        "## Where the concentration comes from",
        "",
        *image(drawn, "evidence-factors.svg", "Share of the top 1% by LP, its factored form, activation power and curvature"),
        "LP is the mean of a product, and the factored form is the product of the means. Their difference comes from tokens on which "
        "a large activation meets a large gradient.",
        "",
        per_model(found, "median FFN", rows),
        *missing(state, found),
    ]


def controls(state: Sequence[Measured], drawn: set[str]) -> list[str]:
    found = having(state, "statistics")
    if not found:
        return []

    def at_one(name: str) -> Callable[[Measured], str]:
        return lambda model: _overlap(model, name, 0.01)

    def correlation(name: str) -> Callable[[Measured], str]:
        return lambda model: spread(model.middle("spearman", name), times)

    def spans(name: str) -> Callable[[Measured], str]:
        def text(model: Measured) -> str:
            item = model.middle("spearman", name)
            return f"{times(item.smallest)} to {times(item.largest)}" if item.count else "-"

        return text

    return [
        "## LP against activation power and the norms of weights",
        "",
        *image(
            drawn,
            "evidence-controls.svg",
            "Spearman's correlation of LP with activation power and with the norms of weights, by depth",
        ),
        per_model(
            found,
            "median FFN",
            [
                (
                    f"Jaccard of the top 1% by LP and by activation power (the paper: {paper.ACTIVATION_JACCARD:.1%})",
                    at_one("activation_power"),
                ),
                ("Jaccard by LP and by Taylor", at_one("taylor")),
                ("Jaccard by LP and by the norm of the write vector", at_one("write_norm")),
                (
                    f"Spearman, LP and activation power (the paper: {paper.SPEARMAN['activation_power']:g})",
                    correlation("activation_power"),
                ),
                *(
                    (f"Spearman, LP and {name} (the paper: {paper.SPEARMAN[name]:g})", correlation(name))
                    for name in ("write_norm", "up_norm", "gate_norm")
                ),
                *((f"range of {name} over the FFNs", spans(name)) for name in ("write_norm", "up_norm", "gate_norm")),
            ],
        ),
        *missing(state, found),
    ]


def _overlap(model: Measured, name: str, rho: float) -> str:
    tables = (model.result(f"statistics/{model.main}") or {"tables": {}})["tables"]
    columns = tables.get("overlap")
    if not columns:
        return "-"
    for place, (metric, at) in enumerate(zip(columns["metric"], columns["rho"], strict=True)):
        if metric == name and at == rho:
            median, low, high = (columns[f"jaccard_{part}"][place] for part in ("median", "low", "high"))
            return f"{median:.1%} ({low:.1%} to {high:.1%})" if low is not None else f"{median:.1%}"
    return "-"


def halo(state: Sequence[Measured], drawn: set[str]) -> list[str]:
    found = [model for model in having(state, "statistics") if len(model.column("halo", "halo"))]
    if not found:
        return []

    def ratio(name: str) -> Callable[[Measured], str]:
        return lambda model: spread(model.middle("halo", name), times)

    return [
        "## The halo against matched channels and the null",
        "",
        *image(drawn, "evidence-halo.svg", "Redundancy of the halo over matched channels and over its null, by depth"),
        per_model(
            found,
            "median FFN",
            [
                ("the halo's redundancy over that of all other channels (the paper: about 2)", ratio("over_others")),
                ("over channels matched in LP", ratio("over_matched")),
                ("over its own null", ratio("over_null")),
                ("excess over the null, halo over matched", ratio("excess_over_matched")),
                (
                    "FFNs in which the halo is above the matched channels",
                    lambda model: _above_one(model.column("halo", "over_matched")),
                ),
            ],
        ),
        "",
        "The null pairs the same channels with what the supernodes did one sequence earlier. It holds what chance gives, and what "
        "comes from the position in the sequence.",
        *missing(state, found),
    ]


def _above_one(values: np.ndarray) -> str:
    known = values[np.isfinite(values)]
    return f"{int((known > 1).sum())} of {len(known)}"


def protection(state: Sequence[Measured], drawn: set[str]) -> list[str]:
    found = having(state, "protection")
    if not found:
        return []
    lines = [
        "## Protecting the supernodes",
        "",
        "Half of every FFN was removed by each score, without recovery. The columns give the loss above the dense model's in nats per "
        "token, and what protection changes.",
    ]
    for model in found:
        rows = (model.result("protection") or {})["rows"]
        dense = losses_of(next(row for row in rows if row["method"] == "dense"))
        body, helped = [], []
        for method in dict.fromkeys(row["method"] for row in rows if row["method"] != "dense"):
            pair = {row["protect"]: row for row in rows if row["method"] == method}
            if set(pair) != {"none", "supernodes"}:
                continue
            free, kept = losses_of(pair["none"]), losses_of(pair["supernodes"])
            change = paired_bootstrap(free, kept)
            same = pair["none"]["channels_sha256"] == pair["supernodes"]["channels_sha256"]
            helped += [] if same or not change.high < 0 else [method]
            body.append(
                (
                    method,
                    f"{pair['none']['supernodes_removed']} ({pair['none']['hit_rate']:.1%})",
                    nats(paired_bootstrap(dense, free)),
                    nats(paired_bootstrap(dense, kept)),
                    "the same cut" if same else nats(change),
                )
            )
        lines += [
            "",
            f"**{model.name}**, {_amount(model, 'protection')}, dense {dense.mean:.3f} nats per token (perplexity {dense.perplexity:.1f}).",
            "",
            table(("score", "supernodes removed without protection", "not protected", "protected", "change"), body),
            "",
            f"Protection lowers the loss, with an interval below zero, for {', '.join(helped) if helped else 'none of the scores'}.",
        ]
    return lines + missing(state, found)


def _amount(model: Measured, name: str) -> str:
    identity = (model.result(name) or {})["identity"]
    before = ", BOS in front of each block" if identity.get("before") else ""
    return f"{identity['tokens']:,} tokens in blocks of {identity['seq_len']}{before}"


REMOVED = {
    ("supernodes", None): "supernodes",
    ("supernodes", "random"): "as many random channels",
    ("supernodes", "lp-matched"): "as many of the nearest LP",
    ("halo", None): "halo",
    ("halo", "random"): "as many random channels (10%)",
    ("halo", "lp-matched"): "as many of the same LP (10%)",
}


def removal(state: Sequence[Measured], drawn: set[str]) -> list[str]:
    found = having(state, "removal")
    if not found:
        return []

    def cell(name: str, select: str, control: str | None) -> Callable[[Measured], str]:
        def text(model: Measured) -> str:
            result = model.result(name)
            if result is None:
                return "-"
            dense = losses_of(next(row for row in result["rows"] if row["select"] is None))
            row = next((row for row in result["rows"] if (row["select"], row["control"]) == (select, control)), None)
            if row is None:
                return "-"
            cost = nats(paired_bootstrap(dense, losses_of(row)))
            whole = next(item["lp_removed"] for item in result["rows"] if (item["select"], item["control"]) == (select, None))
            # The best control of the supernodes is less important than they are, because no other channel is as important.
            return f"{cost}, {row['lp_removed'] / whole:.2f} of its LP" if control == "lp-matched" and whole else cost

        return text

    rows = [(words, cell("removal", *key)) for key, words in REMOVED.items()]
    rows += [
        ("supernodes replaced by their means", cell("mean", "supernodes", None)),
        ("random channels replaced by their means", cell("mean", "supernodes", "random")),
    ]
    amounts = "; ".join(f"{model.name}: {_amount(model, 'removal')}" for model in found)
    return [
        "## What supernodes and halo cost",
        "",
        "The channels were removed from all FFNs at once. The numbers are the loss above the dense model's in nats per token. A control of "
        "the nearest LP may have less LP than the selection, because nothing is as important as the supernodes: the table says how much.",
        "",
        per_model(found, "removed from every FFN", rows),
        "",
        f"{amounts}. Supernodes are 1% of the channels and the halo is 10%. The paper removes them from one layer at a time: "
        "0.0128 nats for the supernodes, 0.0008 for as many halo channels, 0.0006 for as many matched ones.",
        *missing(state, found),
    ]


def texts(state: Sequence[Measured], drawn: set[str]) -> list[str]:
    found = having(state, "texts")
    if not found:
        return []
    lines = [
        "## Supernodes on other texts",
        "",
        *image(drawn, "evidence-texts.svg", "Jaccard index of the supernodes of pairs of texts"),
    ]
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for model in found:
        result = model.result("texts") or {}
        same = result["same"]
        rows.setdefault((same["text"], same["text"]), {})[model.name] = spread(
            middle(np.array(same["jaccard"], dtype=np.float64)), percent
        )
        for pair in result["pairs"]:
            key = (pair["first"], pair["second"])
            rows.setdefault(key, {})[model.name] = spread(middle(np.array(pair["jaccard"], dtype=np.float64)), percent)
    lines += [
        "Jaccard index of the supernodes of two samples of about the same size, median FFN "
        f"({'; '.join(_sizes(model) for model in found)}). Two samples of one text bound what two texts could reach:",
        "",
        table(
            ("texts", *(model.name for model in found)),
            [
                (f"{one} and {other if other != one else 'more of it'}", *(values.get(model.name, "-") for model in found))
                for (one, other), values in rows.items()
            ],
        ),
        "",
        "By activation power, over the whole atlases. *Captured* is the share of the first text's LP in its own supernodes that the "
        "supernodes of the second text hold:",
        "",
    ]
    whole = []
    for model in found:
        for pair in (model.result("texts") or {})["whole"]:
            by_lp, by_power, captured = (
                middle(np.array(pair[name], dtype=np.float64)) for name in ("lp", "activation_power", "captured")
            )
            whole.append(
                (
                    model.name,
                    f"{pair['first']} and {pair['second']}",
                    spread(by_lp, percent),
                    spread(by_power, percent),
                    f"{by_power.median / by_lp.median:.2g}" if by_lp.median else "-",
                    spread(captured, percent),
                )
            )
    lines += [
        table(("model", "texts", "Jaccard by LP", "by activation power", "ratio", "captured"), whole),
        "",
        "The paper reports a Jaccard index of about 6% over domains by LP, and sets by activation that are 3.7 times as stable.",
    ]
    return lines + missing(state, found)


def _sizes(model: Measured) -> str:
    size = (model.result("texts") or {})["sample_tokens"]
    return f"{model.name}: {size['main']:,} tokens of {model.main}, {size['others']:,} of each other text"


def sample_sizes(state: Sequence[Measured], drawn: set[str]) -> list[str]:
    found = [model for model in having(state, "statistics") if len(model.column("stability-by-tokens", "tokens"))]
    if not found:
        return []
    rows: dict[int, dict[str, str]] = {}
    shares: dict[int, dict[str, str]] = {}
    for model in found:
        for item in (model.result(f"statistics/{model.main}") or {}).get("shares_by_tokens", []):
            share = spread(middle(np.array(item["top_share"], dtype=np.float64)), percent)
            shares.setdefault(int(item["tokens"]), {})[model.name] = share
        columns = [
            model.column("stability-by-tokens", name) for name in ("tokens", "jaccard_median", "jaccard_low", "jaccard_high")
        ]
        for tokens, median, low, high in zip(*columns, strict=True):
            rows.setdefault(int(tokens), {})[model.name] = f"{median:.1%} ({low:.1%} to {high:.1%})"
    return [
        "## Supernodes of more or less text",
        "",
        "Jaccard index of the supernodes of two disjoint parts of the main text, median FFN:",
        "",
        table(
            ("tokens in each part", *(model.name for model in found)),
            [(f"{tokens:,}", *(values.get(model.name, "-") for model in found)) for tokens, values in sorted(rows.items())],
        ),
        "",
        f"By chance, the index would be {percent(found[0].middle('stability', 'chance').median)}. LP depends on the tokens of the sample: "
        "the sets are not yet settled at these sizes.",
        "",
        "The share of LP that the top 1% hold, as parts of the main text of each size would give it (the mean over the parts, median FFN). "
        "Compare models at the same number of tokens, because the share depends on it:",
        "",
        table(
            ("tokens", *(model.name for model in found)),
            [(f"{tokens:,}", *(values.get(model.name, "-") for model in found)) for tokens, values in sorted(shares.items())],
        ),
        *missing(state, found),
    ]


def channels(state: Sequence[Measured], drawn: set[str]) -> list[str]:
    found = having(state, "channels")
    if not found:
        return []
    rows, verdicts = [], []
    for model in found:
        result = model.result("channels") or {}
        single = [row for row in result["rows"] if row["module"] is not None]
        groups = {f"layer {row['layers']}": row["layers"] for row in single}
        for words, layer in (*groups.items(), ("all three", None)):
            some = [row for row in single if layer is None or row["layers"] == layer]
            lp, cost = (np.array([row[name] for row in some], dtype=np.float64) for name in ("lp", "delta_nll"))
            chance = np.array([row["chance"] for row in some], dtype=np.float64)
            member = np.unique([row["layers"] for row in some], return_inverse=True)[1]
            size, signed = (rank_interval(lp, values, member) for values in (np.abs(cost), cost))
            resolved = lp > chance
            ratio = f"{cost[resolved].sum() / lp[resolved].sum():.2g}" if resolved.any() else "-"
            rows.append((model.name, words, f"{len(some)}", _ranks(size), _ranks(signed), f"{int(resolved.sum())}", ratio))
            if layer is None:
                verdicts.append((model, size))
    agreeing = [model for model, size in verdicts if size[1] > 0]
    amounts = "; ".join(f"{model.name}: {_amount(model, 'channels')}" for model in found)
    return [
        "## Removing single channels",
        "",
        *image(drawn, "evidence-channels.svg", "Change of the loss without one channel, against its LP"),
        "Channels of the first, the middle and the last FFN, evenly spaced by rank, were removed one at a time. To first order, the loss "
        "of a text changes by the mean of q, which is near zero for most channels, with a standard deviation of sqrt(2 LP / tokens). "
        "*Resolved* channels have an LP above that. The interval resamples the channels.",
        "",
        table(
            (
                "model",
                "FFN",
                "channels",
                "Spearman, LP and size of the change",
                "LP and change",
                "resolved",
                "change over LP, resolved",
            ),
            rows,
        ),
        "",
        f"{amounts}. LP ranks the size of the effect of a single channel "
        + (f"on {names(agreeing)}: the interval over all channels lies above zero." if agreeing else "on none of these models."),
        *missing(state, found),
    ]


def rank_interval(first: np.ndarray, second: np.ndarray, member: np.ndarray) -> tuple[float, float, float]:
    """Spearman's correlation of two arrays (n,) and its bootstrap interval, which resamples within the groups ``member`` (n,)."""
    random = np.random.default_rng(0)
    groups = [np.flatnonzero(member == group) for group in np.unique(member)]
    found = []
    for _ in range(REPLICATES):
        chosen = np.concatenate([group[random.integers(0, len(group), len(group))] for group in groups])
        found.append(rank_correlation(first[chosen], second[chosen]))
    known = np.array(found)[np.isfinite(found)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
    return rank_correlation(first, second), float(low), float(high)


def _ranks(found: tuple[float, float, float]) -> str:
    return f"{found[0]:.2f} ({found[1]:.2f} to {found[2]:.2f})"


Cuts = dict[tuple[str, float], dict[str, list[Comparison]]]
"""Score and share of channels to recovery to the loss above the dense model's on every text."""


def cuts_of(model: Measured) -> Cuts:
    """The measured cuts of a model, the smallest first."""
    found: Cuts = {}
    for cut in sorted((model.result("cuts") or {"cuts": []})["cuts"], key=lambda item: item["share"]):
        losses = [
            Comparison(above, np.nan if low is None else low, np.nan if high is None else high, blocks, RESAMPLES, CONFIDENCE)
            for (above, low, high), blocks in zip(cut["above"], cut["blocks"], strict=True)
        ]
        found.setdefault((cut["method"], round(cut["share"], 4)), {})[cut["recover"]] = losses
    return found


def cuts(state: Sequence[Measured], drawn: set[str]) -> list[str]:
    found = [model for model in having(state, "cuts") if cuts_of(model)]
    if not found:
        return []
    lines = [
        "## Cuts, with and without a refit",
        "",
        *image(drawn, "evidence-cuts.svg", "Loss above the dense model's against the share of channels removed"),
        "The numbers are the loss above the dense model's in nats per token. Scores and refits come from the main text. "
        "[What to expect](expect.md) has these rows with their commands, and the shares of parameters.",
    ]
    for model in found:
        rows, names_of = cuts_of(model), (model.result("cuts") or {})["texts"]
        recoveries = list(dict.fromkeys(itertools.chain.from_iterable(rows.values())))
        headings = [f"{text}, {name}" for text in names_of for name in recoveries]
        body = [
            (
                method,
                percent(share),
                *(nats(cells[name][place]) if name in cells else "-" for place in range(len(names_of)) for name in recoveries),
            )
            for (method, share), cells in rows.items()
        ]
        lines += ["", f"**{model.name}**", "", table(("score", "channels removed", *headings), body)]
    lines += ["", *refit_statements(found)]
    return lines + missing(state, found)


def refitted(model: Measured) -> tuple[float, dict[str, list[Comparison]]] | None:
    """The largest share that was cut with and without least squares, and its losses."""
    both = [(share, item) for (_, share), item in cuts_of(model).items() if {"none", "lstsq"} <= set(item)]
    return max(both, key=lambda entry: entry[0]) if both else None


def refit_statements(state: Sequence[Measured]) -> list[str]:
    """Sentences on what the refit gains on each text."""
    lines = []
    for model in state:
        found = refitted(model)
        if found is None:
            continue
        share, item = found
        gains = [
            f"{1 - fitted.difference / plain.difference:.0%}" if plain.difference > 0 else "-"
            for plain, fitted in zip(item["none"], item["lstsq"], strict=True)
        ]
        said = " and ".join(f"{gain} on {text}" for gain, text in zip(gains, (model.result("cuts") or {})["texts"], strict=True))
        lines.append(
            f"- {model.name}: with {percent(share)} of the channels removed, the refit takes back {said} of the added loss."
        )
    return lines


def seconds_of(stored: dict[str, Any]) -> tuple[float, float | None, int]:
    """Wall-clock seconds of a measurement, seconds of the CPU if they are known, and the tokens that the model read."""
    result = stored["result"]
    if "widths" not in result:
        return stored["seconds"], stored["cpu_seconds"], stored["tokens"]
    # An atlas that was built before says how long that took, but not on how much of a core.
    here = stored["seconds"] >= result["seconds"]
    return result["seconds"], stored["cpu_seconds"] if here else None, result["tokens"]


def commands(state: Sequence[Measured]) -> list[str]:
    """Every measurement with its command, its tokens, its time, its day and its machine."""
    lines = [
        "## Commands",
        "",
        f"`{COMMAND}` runs these in one process and stores every raw result. Names of files stand for their paths. The script "
        "puts the tokenizer's BOS in front of every evaluated block if the tokenizer has one, as the column `with BOS` of `surgery eval` does; `surgery "
        "sweep` and `surgery ablate` do not, so their numbers differ for such a model. Seconds are wall-clock on a machine with other work.",
    ]
    for model in state:
        rows = [model.about.get("command", COMMAND), ""]
        for stored in sorted(model.results.values(), key=lambda item: item["kind"] if "kind" in item else item["name"]):
            seconds, _, tokens = seconds_of(stored)
            rows.append(
                f"{stored['name']:20} {tokens:>8,} tokens {seconds:>7,.0f} s  {stored['date']}  chanfmt {stored['version']}  {stored['command']}"
            )
        machines = ", ".join(sorted({stored["machine"] for stored in model.results.values()}))
        lines += ["", f"**{model.name}** ({machines})", "", "```", *rows, "```"]
    return lines
