"""From a model to a smaller one: check the request, say what the run will take, run its steps, and judge the result."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from chanfmt.base.claims import claimed
from chanfmt.base.errors import AtlasError, ModelError, UsageError
from chanfmt.base.files import check_space, output_path
from chanfmt.base.narrate import say, warn
from chanfmt.hub.locate import check_model, locate_model, open_atlas
from surgery.cli.shrinking import outcome, steps
from surgery.cli.shrinking.estimate import estimate, result_dtype
from surgery.cli.shrinking.journal import FILE, Journal
from surgery.cli.shrinking.run import Runner
from surgery.cli.shrinking.steps import Places
from surgery.cli.shrinking.texts import choose_texts, split_file
from surgery.cut.gguf.size import check_gguf_output, in_format
from surgery.cut.options import CutOptions
from surgery.planning.expect import PARAMETERS, CutAsked, expect
from surgery.planning.formats import GGUF
from surgery.planning.grids import parse_names
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from surgery.planning.shrink import check_plan
from surgery.planning.target import BYTES, parse_target
from surgery.recovery.options import BEST_RECOVERY

if TYPE_CHECKING:
    from chanfmt.base.errors import ChanfmtError
    from chanfmt.format.reader import Atlas
    from chanfmt.models.source import ModelSource
    from surgery.cli.shrinking.estimate import Estimate
    from surgery.cli.shrinking.options import Request
    from surgery.cli.shrinking.outcome import Candidate, Shrunk
    from surgery.cli.shrinking.steps import Step
    from surgery.cli.shrinking.texts import Texts
    from surgery.planning.expect import Expectation
    from surgery.planning.plan import PruningPlan
    from surgery.result.evaluated import Evaluated

HEALING = ("distill", BEST_RECOVERY, "lstsq")
"""Recoveries of the command that heals the result; the first one that the model allows. `distill` trains all cut FFNs."""


@dataclass(frozen=True)
class Foreseen:
    """What is known before the first step.

    Attributes:
        request: The request, checked.
        places: Where the output and the steps' results go.
        texts: The texts.
        expected: What the run will take.
        nearest: The measured cuts nearest to the size.
        rows: All this for people, with what the run is about to do, as names and values.
        steps: The steps. The best cut is not known, so its step has ``BEST`` in place of a name.
    """

    request: Request
    places: Places
    texts: Texts
    expected: Estimate
    nearest: Expectation
    rows: list[list[str]]
    steps: list[Step]


def foresee(request: Request, *, begin: bool = True) -> Foreseen:
    """Check a request and estimate its run. No weight is read, and nothing is written.

    Args:
        begin: Check the output, too: the run is to begin.

    Raises:
        UsageError: An option is not possible, the output cannot be written, or no cut reaches the size.
        ModelError: The model cannot be read, or is not a causal language model.
        AtlasError: The given atlas cannot be read.
        MissingPackageError: The package that reads a text is not installed.
    """
    from chanfmt.models.load import pick_device

    request.check()
    check_model(request.shrink.model)
    places = Places(output_path(request.shrink.output))
    if places.output.name in ("", ".."):
        raise UsageError(f"-o {request.shrink.output} names no new directory", hint="name the directory to write, such as small")
    if request.format == GGUF:
        check_gguf_output(places.output)
    if begin:
        _check_places(places, overwrite=request.shrink.overwrite)
    measured: tuple[str, ...] = ()
    if request.measure.atlas:
        with open_atlas(request.measure.atlas, contained=True) as atlas:
            measured = tuple(item.source for item in atlas.calibration.contributions)
    texts = choose_texts(request.measure, request.judge, places.work, measured)
    device = pick_device(request.measure.device)
    source = locate_model(request.shrink.model)
    _check_language_model(source)
    expected = estimate(request, texts, source, device)
    nearest = _nearest_measured(request, expected)
    if nearest.warning:
        warn(nearest.warning)
    rows = [*_intentions(request, texts, expected, source), *nearest.rows]
    return Foreseen(request, places, texts, expected, nearest, rows, _foreseen_steps(request, texts, places))


def shrink(foreseen: Foreseen, *, shown: bool = True, quiet: bool = False) -> Shrunk:
    """Run the steps that are not done, and judge the result.

    Args:
        foreseen: From `foresee`.
        shown: Whether the steps write their notes and progress to stderr. If not, their warnings and errors still arrive, as
            warnings and errors of this process.
        quiet: Whether steps that are shown write warnings and errors only.

    Raises:
        UsageError: The work directory cannot be used, or holds the results of another command.
        StepError: A step failed.
        ChanfmtError: The disk is too small, or another process works on the same output.
        KeyboardInterrupt: Ctrl-C, or SIGTERM. The same call goes on.
    """
    expected = foreseen.expected
    for name, value in foreseen.rows:
        say(f"{name}: {value}" if name else value)
    check_space(foreseen.places.output.absolute().parent, expected.disk)
    if expected.available is not None and expected.memory > expected.available:
        warn(
            "the model may not fit in memory; an atlas can be built with less (atlas build --stream) and passed with --atlas, "
            "but the comparison loads a whole model"
        )
    with claimed(foreseen.places.work):
        return _run_steps(foreseen, shown=shown, quiet=quiet)


def _run_steps(foreseen: Foreseen, *, shown: bool, quiet: bool) -> Shrunk:
    from surgery.result.judge import put_verdict
    from surgery.result.result import open_result
    from surgery.result.verdict import judged

    request, texts, places = foreseen.request, foreseen.texts, foreseen.places
    first = steps.measure_step(request, texts, places)
    runner = Runner(places, len(foreseen.steps), first, overwrite=request.shrink.overwrite, shown=shown, quiet=quiet)
    split_file(texts)
    if first:
        runner.run(first)
    settled = _settle(request, texts, places)
    tried = steps.try_steps(request, texts, places, settled.to, settled.try_recover)
    found: list[Candidate] = []
    method, allocation = parse_names(request.cuts.methods)[0], settled.allocations[0]
    if tried:
        wanted = [step for step in tried if step.name.removeprefix("try ") in settled.allocations]
        runner.count -= len(tried) - len(wanted)
        for step in wanted:
            runner.run(step)
        found = outcome.candidates(places, parse_names(request.cuts.methods), settled.allocations)
        method, allocation = found[0].method, found[0].allocation
    runner.run(steps.cut_step(request, places, method, allocation, settled.recover))
    for step in steps.evaluate_steps(request, texts, places):
        runner.run(step)
    loss, answers = outcome.read_evaluation(places.held_out, calibrated=True)
    losses = [loss]
    if texts.other:
        losses.append(outcome.read_evaluation(places.other, calibrated=False)[0])
    verdict = judged(tuple(losses), answers)
    put_verdict(places.output, verdict, _evaluated(places))
    for step in _push_steps(request, places):
        runner.run(step)
    result = open_result(places.output)
    return outcome.Shrunk(
        request.shrink.model,
        request.shrink.to,
        result,
        places.work,
        foreseen.expected,
        tuple(runner.commands),
        tuple(found),
        verdict,
        steps.next_commands(request, texts, places, settled.heal, result.report.plan.layout),
    )


@dataclass(frozen=True)
class _Settled:
    """What the atlas settles.

    Attributes:
        allocations: Those that save what they should.
        to: The size as a sweep takes it.
        try_recover, recover: The recoveries that are possible.
        heal: Recovery of the command that heals the result; None if the model allows none.
    """

    allocations: tuple[str, ...]
    to: str
    try_recover: str
    recover: str
    heal: str | None


def _check_places(places: Places, *, overwrite: bool) -> None:
    """Refuse, before any work, places that cannot be written or that hold something else. Raises `UsageError`."""
    from surgery.cut.apply import check_output

    if places.work.exists() and not (places.work / FILE).is_file() and (not places.work.is_dir() or any(places.work.iterdir())):
        raise UsageError(
            f"{places.work} was not made by surgery shrink: it has no {FILE}", hint="remove it yourself, or choose another -o"
        )
    begun = places.work.is_dir() and not overwrite and "cut" in Journal(places.work).steps
    check_output(places.output, overwrite=overwrite or begun)


def _check_language_model(source: ModelSource) -> None:
    """Raise `ModelError` for a model whose next tokens nobody can predict: the comparison needs a causal language model."""
    from chanfmt.models.classes import auto_class

    name = auto_class(source.config).__name__
    if not name.endswith(("CausalLM", "ImageTextToText", "ConditionalGeneration")) or source.config.is_encoder_decoder:
        raise ModelError(
            f"{source.id} is not a causal language model (transformers loads it as {name}), so surgery shrink cannot compare it",
            hint="use its steps one by one: atlas build, surgery plan, surgery prune",
        )


def _nearest_measured(request: Request, expected: Estimate) -> Expectation:
    """The measured cuts nearest to the size, as far as it is known before the first step: by the first method and allocation."""
    cuts = request.cuts
    share = 1 - expected.most / expected.parameters
    method, allocation = parse_names(cuts.methods)[0], parse_names(cuts.allocations)[0]
    return expect(CutAsked(expected.parameters, share, PARAMETERS, method, allocation, cuts.recover))


def _intentions(request: Request, texts: Texts, expected: Estimate, source: ModelSource) -> list[list[str]]:
    """What the run is about to do and to take, as names and values."""
    methods, allocations = parse_names(request.cuts.methods), parse_names(request.cuts.allocations)
    tried = f"{', '.join(methods)} x {', '.join(allocations)} x {request.cuts.try_recover}"
    return [
        ["model", request.shrink.model],
        *expected.rows(parse_target(request.shrink.to), result_dtype(request, source)),
        ["measured on", _measured_on(request, texts)],
        ["cuts to try", f"{tried}, on {request.cuts.try_tokens:,} tokens of {texts.held_out}"],
        ["recovery", request.cuts.recover],
        *_format_rows(request),
        [
            "judged on",
            f"{texts.held_out} (held out)" + (f" and {texts.other}" if texts.other else "; no other text: add --other"),
        ],
    ]


def _format_rows(request: Request) -> list[list[str]]:
    """What is decided about the format of the result, and the other choice."""
    if request.shrink.format is not None or not request.shrink.is_gguf:
        return []
    if request.format == GGUF:
        other = "add --format safetensors for a checkpoint, to train or to serve with vLLM"
        return [["result", f"a GGUF file, as the model is; {other}"]]
    return [["result", "a checkpoint, because another option needs one; add --format gguf for a GGUF file"]]


def _measured_on(request: Request, texts: Texts) -> str:
    if request.measure.atlas:
        return f"the text of {request.measure.atlas}"
    return f"{texts.calib}: {texts.file} without its last tenth" if texts.file else texts.calib


def _foreseen_steps(request: Request, texts: Texts, places: Places) -> list[Step]:
    """The steps as far as they are known before the first one: the best cut is not."""
    first = steps.measure_step(request, texts, places)
    cuts = request.cuts
    tried = steps.try_steps(request, texts, places, request.shrink.to, cuts.try_recover)
    method = "BEST" if tried else parse_names(cuts.methods)[0]
    allocation = parse_names(cuts.allocations)[0] if len(parse_names(cuts.allocations)) == 1 else "BEST"
    return [
        *([first] if first else []),
        *tried,
        steps.cut_step(request, places, method, allocation, cuts.recover),
        *steps.evaluate_steps(request, texts, places),
        *_push_steps(request, places),
    ]


def _push_steps(request: Request, places: Places) -> list[Step]:
    return [] if request.publication is None else [steps.push_step(places, request.publication)]


def _settle(request: Request, texts: Texts, places: Places) -> _Settled:
    """Decide what needs the atlas.

    Raises:
        UsageError: No cut reaches the size, or no allocation saves what it should.
        AtlasError: The atlas lacks what a method needs.
    """
    with open_atlas(steps.atlas_of(request, places), contained=True) as atlas:
        to, target = request.shrink.to, parse_target(request.shrink.to)
        shrink, recover = request.shrink, request.cuts.recover
        written = CutOptions(format=request.format, quant=shrink.quant, cut_quant=shrink.cut_quant)
        wanted = PlanOptions(to=shrink.to, dtype=request.dtype, layout=shrink.layout)
        asked = in_format(wanted, written, atlas.blocks, shrink.model, recover)
        plans: dict[str, PruningPlan] = {}
        refused = None
        for allocation in parse_names(request.cuts.allocations):
            try:
                for method in parse_names(request.cuts.methods):
                    plan = make_plan(atlas, replace(asked, method=method, allocation=allocation))
                    check_plan(plan)
                    plans[allocation] = plan
            except UsageError as error:
                plans.pop(allocation, None)
                refused = error
                if len(parse_names(request.cuts.allocations)) > 1:
                    say(f"{allocation} allocation is left out: {error.message}")
        if not plans:
            assert refused is not None
            raise refused
        plan = next(iter(plans.values()))
        if target.kind == BYTES and plan.sized is not None:
            # A sweep writes no file, so its sizes are parameters.
            most = plan.sized.after if request.format == GGUF else target.parameters(plan.parameters, plan.sized.each)
            to = f"{most / 1e3:.3f}K"
        try_recover, recover = (possible(name, atlas, plan) for name in (request.cuts.try_recover, request.cuts.recover))
        text = steps.healing_text(request, texts)
        heal = next((name for name in HEALING if _refusal(name, atlas, plan, text) is None), None)
    return _Settled(tuple(plans), to, try_recover, recover, heal)


def possible(name: str, atlas: Atlas, plan: PruningPlan) -> str:
    """The recovery ``name``; ``none``, with a note, if the model or the atlas does not allow it."""
    error = _refusal(name, atlas, plan)
    if error is not None:
        say(f"no {name}: {error.message}")
        return "none"
    return name


def _refusal(name: str, atlas: Atlas, plan: PruningPlan, text: str = "") -> ChanfmtError | None:
    """Why the model or the atlas does not allow the recovery ``name`` on ``text``; None if they do."""
    from surgery.recovery.options import RecoveryOptions, plan_recovery

    try:
        plan_recovery(RecoveryOptions(name, recover_text=(text,) if text else ()), atlas, plan)
    except (UsageError, AtlasError) as error:
        return error
    return None


def _evaluated(places: Places) -> Evaluated:
    """The numbers on the held-out text in the form that travels with the result."""
    from surgery.result.evaluated import take_evaluation
    from surgery.result.result import open_result, written_model

    result = open_result(places.output)
    return take_evaluation(places.held_out, written_model(result).fingerprint, result.report.applied.fingerprint)
