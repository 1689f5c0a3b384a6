"""Remove the FFN channels of a model that matter least according to its importance atlas, and measure the result.

`plan` and `prune` take an atlas open (from `chanfmt.open` or `chanfmt.build`), as a path, or as an address on the Hub. `sweep`
and `ablate` take an open atlas. A model is a Hub id, a directory or a ``.gguf`` file. `prune_`, `evaluate`, `sweep` and
`ablate` also take a transformers model in memory.

>>> import surgery
>>> plan = surgery.plan("smollm2.h5", sparsity=0.5)  # doctest: +SKIP
>>> result = surgery.prune("HuggingFaceTB/SmolLM2-135M", "smollm2.h5", "half", sparsity=0.5)  # doctest: +SKIP
>>> surgery.evaluate(["HuggingFaceTB/SmolLM2-135M", "half"], "wikitext2")  # doctest: +SKIP

A sparsity is a share of channels between 0 and 1. Losses are in nats per token. Failures that a user can mend are
`chanfmt.ChanfmtError`.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator

    from chanfmt.format.reader import Atlas
    from chanfmt.models.source import ModelSource
    from surgery.cut.in_place import prune_
    from surgery.cut.prune import apply
    from surgery.evaluation.evaluate import evaluate
    from surgery.evaluation.loaded import LoadedModel
    from surgery.experiments.ablation.run import ablate
    from surgery.experiments.sweep import sweep
    from surgery.planning.plan import PruningPlan
    from surgery.result.push import push
    from surgery.result.result import Result

    Given = Atlas | str | os.PathLike[str]

__all__ = ["LoadedModel", "ablate", "apply", "evaluate", "plan", "prune", "prune_", "push", "sweep"]

_HOMES = {
    "LoadedModel": "surgery.evaluation.loaded",
    "ablate": "surgery.experiments.ablation.run",
    "apply": "surgery.cut.prune",
    "evaluate": "surgery.evaluation.evaluate",
    "prune_": "surgery.cut.in_place",
    "push": "surgery.result.push",
    "sweep": "surgery.experiments.sweep",
}
"""Name to the module that defines it. The module is imported when the name is first used."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def plan(
    atlas: Given,
    sparsity: float = 0.5,
    *,
    method: str = "scar-prot",
    protect: str | Iterable[str] = (),
    unprotect: str | Iterable[str] = (),
    allocation: str = "uniform",
    max_layer_sparsity: float | None = None,
    layers: str | None = None,
    stack: str | Iterable[str] = (),
    invert: bool = False,
    multiple_of: int | None = None,
    seed: int = 0,
) -> PruningPlan:
    """Decide which channels a cut removes, from the atlas alone. No model is read, and torch is not imported.

    Args:
        atlas: A complete atlas.
        sparsity: Share of the FFN channels to remove.
        method: Score that ranks the channels: ``scar-prot``, ``scar-lp``, ``scar-conn``, ``taylor``, ``activation``,
            ``wanda``, ``wanda-group``, ``flap``, ``magnitude``, ``random``. Channels with low scores go first.
        protect: Channels that are never removed, as ``--protect`` takes them: ``supernodes``, ``supernodes+halo``,
            ``top:METRIC=2%``, ``LAYER:IDS``, or a file. Several are a union.
        unprotect: Channels to take out of that union, and out of what the method protects.
        allocation: ``uniform`` removes the same share of every FFN; ``global`` removes the lowest scores of all FFNs.
        max_layer_sparsity: Largest share of one FFN that ``global`` removes (default: 0.7).
        layers: Layers to cut, such as ``0-7,12``; None for all.
        stack: Stacks to cut; empty for all.
        invert: Whether to remove exactly the channels that would be kept.
        multiple_of: Round kept widths to a multiple of this (default: the largest of 256, 128, 64 and 32 that divides the
            full width and moves the kept width by less than 2%, or 1).
        seed: Seed of the method ``random``.

    Returns:
        The plan: the ids of the kept channels of every FFN (int arrays of shape (kept,), or (expert, kept)), and what the
        cut costs in channels and LP. `apply` carries it out, and `prune_` does so in memory.

    Raises:
        chanfmt.UsageError: An option has no meaning for this model, or the protected channels do not fit.
        chanfmt.AtlasError: The atlas is unfinished, or lacks what the method needs.
    """
    from surgery.planning.options import PlanOptions
    from surgery.planning.plan import make_plan

    options = PlanOptions(
        sparsity,
        method,
        protect,  # type: ignore[arg-type]
        unprotect,  # type: ignore[arg-type]
        allocation,
        max_layer_sparsity,
        layers,
        stack,  # type: ignore[arg-type]
        invert,
        multiple_of,
        seed,
    )
    options.check()
    with _opened(atlas) as opened:
        return make_plan(opened, options)


def prune(
    model: ModelSource | str | os.PathLike[str] | None,
    atlas: Given,
    out: str | os.PathLike[str] | None = None,
    *,
    sparsity: float = 0.5,
    recover: str = "none",
    recover_device: str = "auto",
    verify: bool = True,
    shard_bytes: int | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    progress: bool | None = None,
    **planning: Any,
) -> Result:
    """Cut a model and write the smaller checkpoint, which stock ``from_pretrained`` loads.

    The checkpoint is streamed tensor by tensor, and published whole or not at all. Before ``out`` gets its name, its shapes
    are checked against the stock class, and its logits against those of the dense model with the same channels masked
    (relative error at most 1e-4).

    Args:
        model: The model that the atlas measured. None for the model that the atlas names, from the Hub.
        atlas: A complete atlas of the model. The result gets a copy.
        out: Directory to write (default: MODEL-METHOD-PERCENT in the working directory).
        sparsity: Share of the FFN channels to remove.
        recover: How the kept channels are refitted, without labels: ``none``, ``bias`` or ``lstsq``.
        recover_device: Device of the refit: ``auto``, ``cpu``, ``cuda``, ...
        verify: Whether to compare logits. Shapes are always checked.
        shard_bytes: Largest size of a weights file in bytes; None for files that correspond to the model's.
        overwrite: Whether an earlier result in ``out`` is replaced.
        revision: Branch, tag or commit on the Hub, in place of the measured one.
        progress: Whether to draw progress bars on stderr; None draws them if stderr is a terminal.
        planning: Further arguments of `plan`, such as ``method`` and ``protect``.

    Returns:
        The result: its directory, and the record of what was removed, written and checked.

    Raises:
        chanfmt.UsageError: An option has no meaning for this model, or ``out`` cannot be written.
        chanfmt.AtlasError: The atlas is unfinished, or lacks what an option needs.
        chanfmt.ModelError: The model is not the model of the atlas, or stock code could not load the result.
        chanfmt.CheckError: The result did not pass its checks. Nothing is left behind.
    """
    from chanfmt.base.narrate import bars
    from surgery.cut.options import CutOptions
    from surgery.cut.prune import prune as prune_files
    from surgery.planning.options import PlanOptions
    from surgery.recovery.options import RecoveryOptions

    plan_options = PlanOptions(sparsity, **planning)
    plan_options.check()
    cut_options = CutOptions(overwrite=overwrite, verify=verify, shard_bytes=shard_bytes)
    recovery = RecoveryOptions(recover=recover, recover_device=recover_device)
    with bars(progress), _opened(atlas) as opened:
        return prune_files(opened, model, out, plan_options, cut_options, recovery, revision=revision)


@contextlib.contextmanager
def _opened(atlas: Given) -> Iterator[Atlas]:
    """``atlas``, open in the body. An atlas that was given open stays open."""
    from chanfmt.format.reader import Atlas
    from chanfmt.hub.locate import open_atlas

    if isinstance(atlas, Atlas):
        yield atlas
    else:
        with open_atlas(atlas, contained=True) as opened:
            yield opened
