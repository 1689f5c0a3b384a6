"""Take up an unfinished build: what is left of earlier ones, and what must be the same to continue."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.errors import AtlasError, ChanfmtError, UsageError
from chanfmt.base.files import check_target, remove_stale
from chanfmt.base.narrate import say
from chanfmt.building.keeper import remove_partial
from chanfmt.building.requirements import check_requirements
from chanfmt.building.state import ENVIRONMENT, NONE_ADDED, REQUEST, is_partial, read_partial, sequences_digest
from chanfmt.format import columns, schema
from chanfmt.format.reader import Atlas

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from chanfmt.building.options import BuildOptions
    from chanfmt.building.plan import BuildPlan, Locate
    from chanfmt.building.state import PartialAtlas
    from chanfmt.models.distributed import Group


def clear_way(options: BuildOptions, locate: Locate, group: Group) -> None:
    """Remove what earlier builds left. One process of each machine fetches or converts the model for all of them."""
    path, partial = options.path, options.partial
    if group.rank == 0:
        remove_stale(path)
        remove_stale(partial)
    if group.size > 1 and group.leads_machine:
        check_requirements(options)
        check_target(path, overwrite=options.overwrite)
        locate(options.model, revision=options.revision, trust_remote_code=options.trust_remote_code)


def remove_finished(options: BuildOptions) -> None:
    """Remove the partial atlas of a build that was killed between publishing the atlas and removing the partial one."""
    if os.path.lexists(options.partial) and options.path.is_file() and _is_finished(options.partial, options.path):
        remove_partial(options.partial)


def request_of(plan: BuildPlan) -> dict[str, Any]:
    """What was asked for, as far as it decides the numbers: values of `chanfmt.building.state.REQUEST`."""
    model, counts = plan.record, np.bincount(plan.tokens.source_of, minlength=len(plan.sources))
    names = [source.name for source in plan.sources]
    return {
        "fingerprint": model.fingerprint,
        "config_sha256": model.config_sha256,
        "dtype": model.dtype,
        "memory": plan.order,
        "metric_definition": schema.METRIC_DEFINITION,
        "loss_definition": plan.loss.definition,
        "source": names[0] if len(names) == 1 else " + ".join(f"{n} of {name}" for n, name in zip(counts, names, strict=True)),
        "revision": " ".join(source.revision for source in plan.sources),
        "seq_len": plan.tokens.seq_len,
        "sequences": len(plan.tokens),
        "seed": plan.options.seed,
        "sequences_sha256": sequences_digest(plan.tokens.sha256),
        "special_tokens": plan.special.to_json() if plan.special is not None and (plan.special or plan.added) else NONE_ADDED,
        "columns": plan.columns.named if plan.columns is not None else columns.NO_GROUPS,
        **dataclasses.asdict(plan.settings),
    }


def check_alike(request: Mapping[str, Any], group: Group) -> None:
    """Raise `ChanfmtError` if processes have different models or texts, as machines with caches of their own may have."""
    for rank, other in enumerate(group.exchange(request)):
        if other != request:
            names = ", ".join(REQUEST[name] for name in request if other[name] != request[name])
            raise ChanfmtError(
                f"ranks {group.rank} and {rank} of {group.size} differ in: {names}",
                hint="every machine needs the same model, revision and text",
            )


def take_up(plan: BuildPlan, request: Mapping[str, Any], environment: Mapping[str, Any]) -> PartialAtlas | None:
    """Read the partial atlas to continue from, and say so. None if the build starts from the beginning.

    A file that is in the way and cannot be continued is renamed.

    Raises:
        UsageError: The build that left the partial atlas was asked for something else.
        ChanfmtError: A file that is in the way cannot be renamed.
    """
    options = plan.options
    path = options.partial
    if not os.path.lexists(path):
        if options.resume:
            say(f"note: there is no {path} to continue; starting from the beginning")
        return None
    if not options.resume:
        if is_partial(path):
            say(
                f"note: starting over although {path} holds an unfinished build, which --resume would continue",
            )
        else:
            _set_aside(path, f"{path} is in the way and is not an unfinished build")
        return None
    try:
        found = read_partial(path)
    except AtlasError as error:
        _set_aside(path, error.message)
        return None
    _check_same(found, request, options.batch, path)
    if found.modules != tuple((ffn.container, ffn.width) for ffn in plan.ffns)[-len(found.modules) if plan.streamed else 0 :]:
        _set_aside(path, f"{path} holds other FFNs than this chanfmt finds in the model")
        return None
    _note_environment(found, environment)
    done = (
        f"{len(found.modules)} of {len(plan.ffns)} FFNs"
        if plan.streamed
        else f"{found.state.sequences} of {request['sequences']} sequences"
    )
    say(f"continuing after {done}")
    return found


def _is_finished(partial: Path, output: Path) -> bool:
    """Whether the build that left the partial atlas ``partial`` went on to write ``output``."""
    try:
        found = read_partial(partial)
        with Atlas.open(output, verify=True) as atlas:
            return (
                atlas.status == "complete"
                and atlas.model.fingerprint == found.request["fingerprint"]
                and atlas.model.dtype == found.request["dtype"]
                and sequences_digest(atlas.calibration.sequence_sha256) == found.request["sequences_sha256"]
                and all(
                    getattr(atlas.labels, name) == found.request[name]
                    for name in ("rho", "eta", "support_size", "alpha", "gamma")
                )
            )
    except (AtlasError, UsageError):
        return False


def _set_aside(path: Path, why: str) -> None:
    """Rename a file that cannot be continued, and say so. Raises `ChanfmtError` if it cannot be renamed."""
    broken = path.with_name(path.name + ".broken")
    try:
        os.replace(path, broken)
    except OSError as error:
        raise ChanfmtError(f"cannot rename {path}: {error.strerror}", hint="move it away yourself") from None
    say(f"note: {why}; moved to {broken}, starting from the beginning")


def _check_same(partial: PartialAtlas, request: Mapping[str, Any], batch_size: int | None, path: Path) -> None:
    """Raise `UsageError` naming everything that is asked for differently than by the build that left ``partial``."""
    changed = {name for name in REQUEST if partial.request[name] != request[name]}
    if changed & {"source", "revision", "seq_len", "sequences", "seed", "special_tokens"}:
        changed.discard("sequences_sha256")
    sentences = [_difference(REQUEST[name], partial.request[name], request[name]) for name in REQUEST if name in changed]
    if batch_size not in (None, partial.state.batch_size):
        sentences.append(_difference("--batch-size", partial.state.batch_size, batch_size))
    if sentences:
        raise UsageError(
            f"{path} cannot be continued: {'; '.join(sentences)}",
            hint="repeat the command as it was, or leave out --resume to start over",
        )


def _note_environment(partial: PartialAtlas, environment: Mapping[str, Any]) -> None:
    """Say what has changed around the build that may change the last bits of the result."""
    changed = [
        _difference(text, partial.environment[name], environment[name])
        for name, text in ENVIRONMENT.items()
        if partial.environment[name] != environment[name]
    ]
    if changed:
        say(f"note: {'; '.join(changed)}: the last bits may differ from an uninterrupted run's")


def _difference(what: str, before: Any, now: Any) -> str:
    """One sentence on a value that changed. Digests are left out: nobody reads them."""
    if any(isinstance(value, str) and len(value) >= 40 for value in (before, now)):
        return f"{what} changed"
    return f"{what} was {before} and is {now}"
