"""Run the pass of a plan, in memory or streamed, and save partial atlases on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chanfmt.base.narrate import progress_bar
from chanfmt.building.gradients import gradient_path
from chanfmt.building.measure import Measurement, measure
from chanfmt.building.signals import stop_requests
from chanfmt.building.stream import measure_streamed, steps
from chanfmt.data.tokens import CalibrationTokens

if TYPE_CHECKING:
    from collections.abc import Callable

    from chanfmt.building.keeper import Keeper
    from chanfmt.building.plan import BuildPlan
    from chanfmt.building.state import PassState
    from chanfmt.models.distributed import Group
    from chanfmt.models.streaming.spool import Spool


def run_pass(
    plan: BuildPlan, start: PassState | None, keeper: Keeper, group: Group, spool: Spool, *, first_size: int | None = None
) -> Measurement:
    """Measure what ``plan`` says, from where ``start`` stands if that is given.

    Args:
        keeper: Saves partial atlases in the first process, whenever one is due and before an interrupt.
        spool: As for `chanfmt.building.stream.measure_streamed`.
        first_size: As for `chanfmt.building.measure.measure`.

    Raises:
        ChanfmtError: As `chanfmt.building.measure.measure` and `chanfmt.building.stream.measure_streamed`.
        KeyboardInterrupt: Ctrl-C or SIGTERM; what was measured is saved first.
    """
    # torchrun passes signals on itself, and ends the other processes with one when one is lost.
    with stop_requests(quiet=group.size > 1) as stop:

        def after_batch(measurement: Measurement) -> None:
            wishes = group.exchange((stop(), group.rank == 0 and measurement.fresh and keeper.due(measurement)))
            stopping = any(wish for wish, _ in wishes)
            if (stopping and measurement.fresh) or wishes[0][1]:
                measurement.collect(group)
                if group.rank == 0:
                    keeper.save(measurement)
            if stopping:
                # torchrun ends all processes when the first one leaves, which must wait until the partial atlas is written.
                group.exchange(None)
                raise KeyboardInterrupt

        return _measured(plan, start, after_batch, group, spool, first_size)


def _measured(
    plan: BuildPlan,
    start: PassState | None,
    after_batch: Callable[[Measurement], object],
    group: Group,
    spool: Spool,
    first_size: int | None,
) -> Measurement:
    options = plan.options
    if plan.streamed is not None:
        assert isinstance(plan.tokens, CalibrationTokens)
        with progress_bar(steps(plan.streamed, len(plan.tokens)), "seq", "measuring") as bar:
            return measure_streamed(
                plan.streamed,
                plan.tokens,
                spool,
                settings=plan.settings,
                loss=plan.loss,
                batch_size=options.batch,
                first_size=first_size,
                progress=bar.update,
                start=start,
                after_batch=after_batch,
                columns=plan.columns,
                gradient=gradient_path(options.partial, start.stream.block) if start and start.stream else None,
            )
    with progress_bar(len(plan.tokens) * plan.tokens.seq_len, "tok", "measuring") as bar:
        return measure(
            plan.model,
            plan.ffns,
            plan.tokens,
            rho=plan.settings.rho,
            loss=plan.loss,
            batch_size=options.batch,
            first_size=first_size,
            progress=bar.update,
            start=start,
            after_batch=after_batch,
            group=group,
            columns=plan.columns,
        )
