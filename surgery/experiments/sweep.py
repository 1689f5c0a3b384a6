"""Perplexity of every combination of method, protection, sparsity and recovery, on one loaded model."""

from __future__ import annotations

import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base import html
from chanfmt.base.errors import MissingPackageError, UsageError
from chanfmt.base.files import output_path
from chanfmt.base.narrate import progress_bar, say, warn
from chanfmt.base.text import perplexity_text
from surgery.experiments.columns import finite
from surgery.experiments.results import Results, check_directory, claim
from surgery.experiments.spelled import spelled
from surgery.experiments.subject import Subject, check_atlas, check_subject, open_subject
from surgery.experiments.sweep_plan import DENSE, KEY, SweepOptions, means_of, plan_runs, removed_of
from surgery.planning.layouts import AUTO
from surgery.planning.plan import make_plan
from surgery.recovery.options import REFITS, Refit, plan_recovery

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from chanfmt.data.text import Text
    from chanfmt.format.reader import Atlas
    from surgery.evaluation.given import GivenModel
    from surgery.experiments.sweep_plan import Run
    from surgery.planning.plan import PruningPlan
    from surgery.recovery.options import RecoveryOptions

SWEEP_FORMAT = "sweep/1"
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


class SweepResults(Results):
    """The rows of a sweep, and their figure."""

    def _repr_html_(self) -> str:
        return html.table(*table(self.rows))

    def plot(self, axes: Any = None, title: str = "") -> Any:
        """Draw log perplexity against sparsity: one line per method, protection and recovery.

        The numbers beside the points are shares of supernodes that were removed. All seeds of a method are one point, with
        their range shaded.

        Args:
            axes: Matplotlib axes; None for a new figure.
            title: Title of the axes; empty for none.

        Returns:
            The axes.

        Raises:
            MissingPackageError: matplotlib is not installed (extra ``plot``).
        """
        from surgery.experiments.sweep_plot import draw

        if axes is None:
            try:
                from matplotlib import pyplot
            except ImportError:
                raise MissingPackageError("matplotlib", "plot", "the figure of a sweep") from None
            axes = pyplot.subplots(layout="constrained")[1]
        draw(axes, self.rows, title)
        return axes


def sweep(
    atlas: Atlas,
    model: Subject | GivenModel | None = None,
    text: str | os.PathLike[str] | Text = "wikitext2",
    *,
    methods: str | Sequence[str] = "scar-prot,wanda,activation,magnitude,random",
    sparsity: str | float | Sequence[float] | None = None,
    to: str | Sequence[str] | None = None,
    protect: str | Sequence[str] = ("none",),
    recover: str | Sequence[str] = "none",
    recover_text: str | Sequence[str] = (),
    recover_tokens: str | int = "128k",
    recover_steps: int | None = None,
    seeds: str | int | Sequence[int] = "0",
    allocation: str = "uniform",
    max_layer_sparsity: float | None = None,
    layers: str | Sequence[int] | None = None,
    stack: str | Sequence[str] = (),
    multiple_of: int | None = None,
    layout: str = AUTO,
    seq_len: int = 2048,
    max_tokens: int = 0,
    device: str = "auto",
    device_map: str | None = None,
    dtype: str = "auto",
    output: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> SweepResults:
    """Measure the perplexity of every combination of method, protection, sparsity and recovery. No cut is written.

    The channels are masked in one loaded model, which has its own weights, device and mode afterwards. Every cut is
    planned before the model is loaded.

    Args:
        atlas: Atlas of the model, open.
        model: The model of the atlas: a Hub id, a directory, a ``.gguf`` file, a `ModelSource`, a pair of a loaded
            transformers model and its tokenizer, or a `LoadedModel`; None for the model that the atlas names, from the
            Hub. A `Subject` from `open_subject` saves the loading if there are several experiments; its text, ``seq_len``
            and ``max_tokens`` then count.
        text: Name of a source as ``--data`` takes it; a string with a line break, which is the text itself; or a
            `chanfmt.data.text.Text`.
        methods: Names of the scores, as a sequence, or as text separated by commas.
        sparsity: Shares of channels to remove: numbers, or text such as ``0.1:0.7:0.1``, the default.
        to: Sizes of the cut model in place of ``sparsity``, as ``surgery plan --to`` takes them.
        protect: Protections to run every method under, as in ``surgery plan``.
        recover: How to make up for each cut: ``none``, ``bias``, ``lstsq``, ``block``, ``distill``. The last three need the
            files of the model.
        recover_text: Text to refit on, as ``--calib`` of ``atlas build`` takes it; empty for the atlas's own tokens.
        recover_tokens: Tokens to draw from ``recover_text``.
        recover_steps: Steps of ``distill``; None for a number that follows from the tokens.
        seeds: Seeds of the method ``random``.
        allocation, max_layer_sparsity, layers, stack, multiple_of, layout: As for `surgery.planning.options.PlanOptions`.
        seq_len: Tokens in a block, at least 2.
        max_tokens: Tokens of the text to use at most; 0 means all.
        device, device_map, dtype: For a model that is loaded here.
        output: Directory for ``results.csv`` and ``results.json``; rows that it holds are not measured again. None keeps
            the rows in memory.
        overwrite: Drop the rows that ``output`` holds.

    Returns:
        One row per cut, the dense model first. ``pandas.DataFrame(results.rows)`` makes a table of them.

    Raises:
        UsageError: An option or a plan is not possible, or the rows in ``output`` were measured differently.
        AtlasError: The atlas is unfinished, or lacks what a method needs.
        ModelError: The model cannot be loaded, or it is not the model of the atlas.
        KeyboardInterrupt: Ctrl-C. Finished rows stay in ``output``.
    """
    options = spelled(
        SweepOptions,
        {
            "methods": methods,
            "sparsity": sparsity,
            "to": to,
            "protect": protect,
            "recover": recover,
            "recover_text": recover_text,
            "recover_tokens": str(recover_tokens),
            "recover_steps": recover_steps,
            "seeds": seeds,
            "allocation": allocation,
            "max_layer_sparsity": max_layer_sparsity,
            "layers": layers,
            "stack": stack,
            "multiple_of": multiple_of,
            "layout": layout,
        },
    )
    directory = None if output is None else output_path(output)
    if directory is not None:
        # The model may be downloaded below. A fault in the output directory should show before that.
        check_directory(directory, SWEEP_FORMAT, overwrite=overwrite)
    check_subject(model, text, seq_len=seq_len, max_tokens=max_tokens, device=device, device_map=device_map, dtype=dtype)
    check_atlas(atlas)
    runs, warnings = plan_runs(atlas, options)
    for warning in warnings:
        warn(warning)
    with claim(directory):
        subject = open_subject(
            atlas, model, text, seq_len=seq_len, max_tokens=max_tokens, device=device, device_map=device_map, dtype=dtype
        )
        return measure_runs(atlas, subject, runs, options.shared(), directory, overwrite=overwrite)


def measure_runs(
    atlas: Atlas,
    subject: Subject,
    runs: Sequence[Run],
    shared: dict[str, Any],
    directory: Path | None = None,
    *,
    overwrite: bool = False,
) -> SweepResults:
    """Measure every one of ``runs`` that ``directory`` has no row for.

    Args:
        runs: From `surgery.experiments.sweep_plan.plan_runs`.
        shared: The options that all plans have in common, from `SweepOptions.shared`.
        directory: Directory of the results; None to keep them in memory.
        overwrite: Drop the rows that ``directory`` holds.

    Raises:
        UsageError: The rows in ``directory`` were measured differently, or a refit lacks the files of the model.
        KeyboardInterrupt: Ctrl-C; the text says which rows stay.
    """
    if subject.source is None and any(run.recovery.recover in REFITS for run in runs):
        raise UsageError(
            "a refit reads the model's files, and a loaded model has none",
            hint="pass the Hub id or the directory of the model",
        )
    options = {name: list(value) if isinstance(value, tuple) else value for name, value in shared.items()}
    results = SweepResults(directory, SWEEP_FORMAT, subject.identity | options, COLUMNS, KEY, overwrite=overwrite)
    pending = [run for run in runs if results.find(run.key, run.channels_sha256) is None]
    if len(pending) < len(runs):
        say(f"{directory} already has {len(runs) - len(pending)} of {len(runs)} rows")
    try:
        with progress_bar(len(subject.token_ids) * len(pending), "tok", DENSE) as bar:
            for run in pending:
                bar.set_description(_describe(run.key))
                plan = None if run.options is None else make_plan(atlas, run.options)
                # Protection often changes nothing. Then the cut of another row is the same cut.
                losses = results.losses(run.channels_sha256)
                if losses is None:
                    losses = _measure(atlas, subject, plan, run.recovery, directory, bar.update)
                else:
                    bar.update(len(subject.token_ids))
                results.add(run.key | _plan_columns(plan) | losses | {"channels_sha256": run.channels_sha256})
    except KeyboardInterrupt:
        raise results.interrupted() from None
    return results


def _measure(
    atlas: Atlas,
    subject: Subject,
    plan: PruningPlan | None,
    options: RecoveryOptions,
    directory: Path | None,
    progress: Callable[[int], object],
) -> dict[str, Any]:
    """Measure the loss of a cut, with the recovery that ``options`` ask for."""
    if plan is None:
        return subject.measure({}, progress=progress)
    removed, recovery = removed_of(atlas, plan), plan_recovery(options, atlas, plan)
    if not isinstance(recovery, Refit):
        return subject.measure(removed, means_of(atlas, plan, recovery), progress)
    from surgery.recovery.run import refit_of
    from surgery.recovery.tokens import with_tokens
    from surgery.recovery.workplace import Workplace

    assert subject.source is not None
    recovery = with_tokens(recovery, subject.source)
    with contextlib.ExitStack() as stack:
        spool = directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        fitted = stack.enter_context(refit_of(recovery)(plan, subject.source, recovery, Workplace(spool)))
        weights = {
            block.index: (planned.kept, fitted.fitted(planned.name))
            for block, planned in zip(atlas.blocks, plan.blocks, strict=True)
            if planned.is_cut
        }
        # A saved state of the refit goes when its context ends, and should stay until there is a row.
        return subject.measure(removed, progress=progress, weights=weights)


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
    """Headings and rows for people, from the rows of a sweep."""
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
