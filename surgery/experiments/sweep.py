"""Perplexity of every combination of method, protection, sparsity and recovery, on one loaded model."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.errors import UsageError
from chanfmt.base.narrate import progress_bar, say
from surgery.evaluation.perplexity import perplexity_text
from surgery.experiments.results import Results, channels_sha256, finite
from surgery.planning.grids import parse_names, parse_seeds, parse_shares
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from surgery.planning.selectors import file_name
from surgery.recovery.options import RECOVERIES, BiasRecovery, RecoveryOptions, Refit, plan_recovery

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from chanfmt.format.reader import Atlas
    from surgery.experiments.subject import Subject
    from surgery.planning.plan import PruningPlan

SWEEP_FORMAT = "sweep/1"
DENSE = "dense"
SEEDED = "random"
"""The method that seeds mean something to."""
KEY = ("method", "protect", "sparsity_asked", "recover", "seed")
COLUMNS = (
    "method",
    "protect",
    "sparsity_asked",
    "sparsity_reached",
    "recover",
    "seed",
    "perplexity",
    "nll",
    "standard_error",
    "supernodes_removed",
    "hit_rate",
    "lp_kept",
    "tokens",
    "seconds",
)
_PLAN = {item.name: item.metadata for item in dataclasses.fields(PlanOptions)}
_SHARED = ("allocation", "max_layer_sparsity", "layers", "stack", "multiple_of")
"""Options of a plan that all runs of a sweep have in common."""


@dataclass(frozen=True)
class SweepOptions:
    """Which cuts to compare."""

    methods: str = field(
        default="scar-prot,wanda,activation,magnitude,random",
        metadata={
            "help": "scores to compare, between commas",
            "metavar": "METHODS",
        },
    )
    sparsity: str = field(
        default="0.1:0.7:0.1",
        metadata={
            "help": "shares to remove: FIRST:LAST:STEP, or numbers between commas",
            "metavar": "GRID",
        },
    )
    protect: tuple[str, ...] = field(
        default=("none",),
        metadata={
            "help": "protection to run every method under, as in surgery plan; repeat for alternatives",
            "metavar": "WHAT",
            "repeat": True,
        },
    )
    recover: str = field(
        default="none",
        metadata={
            "help": f"how to make up for each cut, between commas: {', '.join(RECOVERIES)}",
            "metavar": "HOW",
        },
    )
    seeds: str = field(default="0", metadata={"help": "seeds of the method random, such as 0,1,2 or 0-4", "metavar": "SEEDS"})
    allocation: str = field(default="uniform", metadata=_PLAN["allocation"])
    max_layer_sparsity: float | None = field(default=None, metadata=_PLAN["max_layer_sparsity"])
    layers: str | None = field(default=None, metadata=_PLAN["layers"])
    stack: tuple[str, ...] = field(default=(), metadata=_PLAN["stack"])
    multiple_of: int | None = field(default=None, metadata=_PLAN["multiple_of"])

    def shared(self) -> dict[str, Any]:
        """What all plans have in common, by the names of `PlanOptions`."""
        return {name: getattr(self, name) for name in _SHARED}


@dataclass(frozen=True)
class Run:
    """One cut of a sweep.

    Attributes:
        key: What identifies its row.
        options: Its plan's; None is the dense model.
        recovery: How it is made up for.
        channels_sha256: Of what it removes, see `surgery.experiments.results.channels_sha256`; empty until it is planned.
    """

    key: dict[str, Any]
    options: PlanOptions | None
    recovery: RecoveryOptions = field(default_factory=RecoveryOptions)
    channels_sha256: str = ""


def runs_of(options: SweepOptions) -> tuple[Run, ...]:
    """The cuts of a sweep, in their order, none of them planned.

    Raises:
        UsageError: An option cannot mean anything.
    """
    methods, seeds = parse_names(options.methods), parse_seeds(options.seeds)
    recoveries = [RecoveryOptions(name) for name in parse_names(options.recover)]
    for recovery in recoveries:
        recovery.check()
    shares = parse_shares(options.sparsity, "--sparsity")
    if not methods:
        raise UsageError("--methods names none", hint="write them as in scar-prot,wanda")
    if not recoveries:
        raise UsageError("--recover names none", hint="write them as in none,lstsq")
    runs = []
    for method in methods:
        for protect in dict.fromkeys(options.protect):
            for sparsity in shares:
                for seed in seeds if method == SEEDED else (None,):
                    plan = PlanOptions(sparsity, method, protect=(protect,), seed=seed or 0, **options.shared())
                    plan.check()
                    for recovery in recoveries:
                        # A path of this machine is no name for what was protected.
                        values = (method, file_name(protect), sparsity, recovery.recover, seed)
                        runs.append(Run(dict(zip(KEY, values, strict=True)), plan, recovery))
    if len({tuple(run.key.values()) for run in runs}) < len(runs):
        raise UsageError("two files of --protect have the same name, so their rows could not be told apart")
    return tuple(runs)


def plan_runs(atlas: Atlas, options: SweepOptions) -> tuple[tuple[Run, ...], tuple[str, ...]]:
    """The runs of a sweep, the dense model first; each is planned once, so that none fails after hours. And warnings.

    Raises:
        UsageError: An option cannot mean anything, or a plan is not possible; the message names the cut.
        AtlasError: The atlas lacks what a method needs.
    """
    planned = [Run(dict(zip(KEY, (DENSE, "none", 0.0, "none", None), strict=True)), None, channels_sha256=channels_sha256({}))]
    warnings: dict[str, None] = {}
    for run in runs_of(options):
        assert run.options is not None
        try:
            plan = make_plan(atlas, run.options)
            recovery = plan_recovery(run.recovery, atlas, plan)
        except UsageError as error:
            what = f"{run.key['method']} at {run.key['sparsity_asked']:g} with {run.key['protect']} protected"
            raise UsageError(f"{what}: {error.message}", hint=error.hint) from None
        warnings |= dict.fromkeys(f"{run.key['method']}: {warning}" for warning in plan.warnings)
        # What a name such as top:lp=1% or a file stands for may have changed since a row was made.
        refit = run.recovery.recover if isinstance(recovery, Refit) else ""
        digest = channels_sha256(removed_of(atlas, plan), _means(atlas, plan, recovery), refit)
        planned.append(dataclasses.replace(run, channels_sha256=digest))
    return tuple(planned), tuple(warnings)


def sweep(
    atlas: Atlas, subject: Subject, runs: Sequence[Run], shared: dict[str, Any], directory: Path, *, overwrite: bool = False
) -> Results:
    """Measure every one of ``runs`` that ``directory`` has no row for.

    Args:
        runs: From `plan_runs`.
        shared: What the plans have in common, from `SweepOptions.shared`.

    Raises:
        UsageError: The rows in ``directory`` are of something else.
        KeyboardInterrupt: Ctrl-C; its text says that finished rows stay.
    """
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in shared.items()}
    results = Results(directory, SWEEP_FORMAT, subject.identity | options, COLUMNS, KEY, overwrite=overwrite)
    pending = [run for run in runs if results.find(run.key, run.channels_sha256) is None]
    if len(pending) < len(runs):
        say(f"{len(runs) - len(pending)} of {len(runs)} rows are in {directory} already")
    try:
        with progress_bar(len(subject.token_ids) * len(pending), "tok", DENSE) as bar:
            for run in pending:
                bar.set_description(_describe(run.key))
                plan = None if run.options is None else make_plan(atlas, run.options)
                # Protection often changes nothing, and then another row's cut is this one.
                losses = results.losses(run.channels_sha256)
                if losses is None:
                    losses = _measure(atlas, subject, plan, run.recovery, directory, bar.update)
                else:
                    bar.update(len(subject.token_ids))
                results.add(run.key | _plan_columns(plan) | losses | {"channels_sha256": run.channels_sha256})
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(results.rows)} finished rows are in {directory}; the same command continues") from None
    return results


def _measure(
    atlas: Atlas,
    subject: Subject,
    plan: PruningPlan | None,
    options: RecoveryOptions,
    directory: Path,
    progress: Callable[[int], object],
) -> dict[str, Any]:
    """What a cut costs, made up for as ``options`` say."""
    if plan is None:
        return subject.measure({}, progress=progress)
    removed, recovery = removed_of(atlas, plan), plan_recovery(options, atlas, plan)
    if not isinstance(recovery, Refit):
        return subject.measure(removed, _means(atlas, plan, recovery), progress)
    from surgery.recovery.refit import refitted

    with refitted(plan, subject.source, recovery, spool_directory=directory) as fitted:
        weights = {
            block.index: (planned.kept, fitted.fitted(planned.name))
            for block, planned in zip(atlas.blocks, plan.blocks, strict=True)
            if planned.is_cut
        }
    return subject.measure(removed, progress=progress, weights=weights)


def _means(atlas: Atlas, plan: PruningPlan, recovery: Refit | BiasRecovery | None) -> dict[int, np.ndarray] | None:
    """Block index to what stands in for removed channels: a bias of what they write on average is their mean in their place."""
    if not isinstance(recovery, BiasRecovery):
        return None
    return {
        block.index: recovery.means[planned.name]
        for block, planned in zip(atlas.blocks, plan.blocks, strict=True)
        if planned.is_cut
    }


def removed_of(atlas: Atlas, plan: PruningPlan) -> dict[int, np.ndarray]:
    """Block index to a mask of what ``plan`` removes, bool of `Block.shape`, for the FFNs that it cuts."""
    removed = {}
    for block, planned in zip(atlas.blocks, plan.blocks, strict=True):
        if planned.is_cut:
            mask = np.ones(block.shape, dtype=bool)
            np.put_along_axis(mask, planned.kept.astype(np.int64), False, axis=-1)
            removed[block.index] = mask
    return removed


def _plan_columns(plan: PruningPlan | None) -> dict[str, Any]:
    if plan is None:
        return {"sparsity_reached": 0.0, "supernodes_removed": 0, "hit_rate": 0.0, "lp_kept": 1.0}
    supernodes = sum(block.supernodes for block in plan.blocks)
    removed = supernodes - sum(block.supernodes_kept for block in plan.blocks)
    shares = [block.lp_kept for block in plan.blocks if block.lp_kept is not None]
    return {
        "sparsity_reached": plan.sparsity_reached,
        "supernodes_removed": removed,
        "hit_rate": removed / supernodes if supernodes else None,
        "lp_kept": finite(statistics.median(shares)) if shares else None,
    }


def _describe(key: dict[str, Any]) -> str:
    parts = [key["method"], f"{key['sparsity_asked']:g}", *(key[name] for name in ("protect", "recover") if key[name] != "none")]
    return " ".join([*parts, *([] if key["seed"] is None else [f"seed {key['seed']}"])])


def table(rows: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Headings and rows for people."""
    headings = [
        "method",
        "protect",
        "sparsity",
        "recover",
        "seed",
        "perplexity",
        "nats/token",
        "+-",
        "supernodes removed",
        "LP kept",
    ]
    return headings, [
        [
            row["method"],
            row["protect"],
            f"{row['sparsity_reached']:.4g}",
            row["recover"],
            "-" if row["seed"] is None else str(row["seed"]),
            perplexity_text(row["perplexity"]),
            f"{row['nll']:.4f}",
            "-" if row["standard_error"] is None else f"{row['standard_error']:.4f}",
            "-" if row["hit_rate"] is None else f"{row['supernodes_removed']:,} ({row['hit_rate']:.1%})",
            "-" if row["lp_kept"] is None else f"{row['lp_kept']:.1%}",
        ]
        for row in rows
    ]
