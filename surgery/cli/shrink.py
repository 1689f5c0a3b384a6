"""`surgery shrink`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say, warn
from chanfmt.cli.framework import PrintOptions, add_command, parse_options, print_json, print_line, print_pairs, print_table
from surgery.cli.push import PublishingOptions

if TYPE_CHECKING:
    import argparse

    from surgery.cli.shrinking.estimate import Estimate
    from surgery.cli.shrinking.options import Request
    from surgery.cli.shrinking.outcome import Candidate
    from surgery.cli.shrinking.steps import Places, Step
    from surgery.cli.shrinking.texts import Texts
    from surgery.planning.expect import Expectation
    from surgery.result.verdict import Verdict

EXAMPLES = (
    "surgery shrink meta-llama/Llama-3.2-1B --to 75% -o llama-small",
    "surgery shrink SmolLM2.gguf --to 100M -o small --calib pydoc --dry-run",
    "surgery shrink ./model --to 12GB -o small --atlas hf://USER/model-atlas --push",
)


def add(commands: Any) -> None:
    add_command(
        commands,
        "shrink",
        "from a model to a smaller one that is checked, compared and judged",
        run=_run,
        options=_options,
        examples=EXAMPLES,
        description=(
            "Make a model smaller: measure it, try a few cuts, apply the best one, recover it, and compare both models. Every step "
            "is a command that is printed before it runs. After an interruption, the same command goes on at the first step that "
            "is not done."
        ),
    )


def _options() -> tuple[type, ...]:
    from surgery.cli.shrinking import options

    return (
        options.ShrinkOptions,
        options.MeasureOptions,
        options.CutsOptions,
        options.JudgeOptions,
        PublishingOptions,
        options.DryRunOptions,
    )


def _run(arguments: argparse.Namespace) -> None:
    from chanfmt.base.claims import claimed
    from chanfmt.base.errors import UsageError
    from chanfmt.base.files import check_space, output_path
    from chanfmt.hub.locate import check_model, locate_model, open_atlas
    from chanfmt.models.load import pick_device
    from surgery.cli.shrinking import options
    from surgery.cli.shrinking.estimate import estimate
    from surgery.cli.shrinking.steps import Places
    from surgery.cli.shrinking.texts import choose_texts

    request = options.Request(
        parse_options(arguments, options.ShrinkOptions),
        parse_options(arguments, options.MeasureOptions),
        parse_options(arguments, options.CutsOptions),
        parse_options(arguments, options.JudgeOptions),
    )
    request.check()
    dry_run = parse_options(arguments, options.DryRunOptions).dry_run
    publishing = parse_options(arguments, PublishingOptions)
    publishing.check(login=not dry_run)
    check_model(request.shrink.model)
    places = Places(output_path(request.shrink.output))
    if places.output.name in ("", ".."):
        raise UsageError(f"-o {request.shrink.output} names no new directory", hint="name the directory to write, such as small")
    if not dry_run:
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
    rows = [*_intentions(request, texts, expected, source), *nearest.rows]
    if nearest.warning:
        warn(nearest.warning)
    talk = parse_options(arguments, PrintOptions)
    if dry_run:
        commands = [step.command for step in _foreseen(request, texts, places, publishing)]
        if talk.json:
            print_json({"estimate": expected.to_json(), "expected": nearest.to_json(), "commands": commands})
            return
        print_pairs(rows)
        print_line()
        for command in commands:
            print_line(command)
        return
    for name, value in rows:
        say(f"{name}: {value}" if name else value)
    check_space(places.output.absolute().parent, expected.disk)
    if expected.available is not None and expected.memory > expected.available:
        warn(
            "the model may not fit in memory; an atlas can be built with less (atlas build --stream) and passed with --atlas, "
            "but the comparison loads a whole model"
        )
    with claimed(places.work):
        _shrink(request, texts, places, publishing, expected, talk)


def _check_places(places: Places, *, overwrite: bool) -> None:
    """Refuse, before any work, places that cannot be written or that hold something else. Raises `UsageError`."""
    from chanfmt.base.errors import UsageError
    from surgery.cli.shrinking.journal import FILE, Journal
    from surgery.cut.apply import check_output

    if places.work.exists() and not (places.work / FILE).is_file() and (not places.work.is_dir() or any(places.work.iterdir())):
        raise UsageError(
            f"{places.work} was not made by surgery shrink: it has no {FILE}", hint="remove it yourself, or choose another -o"
        )
    begun = places.work.is_dir() and not overwrite and "cut" in Journal(places.work).steps
    check_output(places.output, overwrite=overwrite or begun)


def _check_language_model(source: Any) -> None:
    """Raise `ModelError` for a model whose next tokens nobody can predict: the comparison needs a causal language model."""
    from chanfmt.base.errors import ModelError
    from chanfmt.models.classes import auto_class

    name = auto_class(source.config).__name__
    if not name.endswith(("CausalLM", "ImageTextToText", "ConditionalGeneration")) or source.config.is_encoder_decoder:
        raise ModelError(
            f"{source.id} is not a causal language model (transformers loads it as {name}), so surgery shrink cannot compare it",
            hint="use its steps one by one: atlas build, surgery plan, surgery prune",
        )


def _nearest_measured(request: Request, expected: Estimate) -> Expectation:
    """The measured cuts nearest to the size, as far as it is known before the first step: by the first method and allocation."""
    from surgery.planning.expect import PARAMETERS, CutAsked, expect
    from surgery.planning.grids import parse_names

    cuts = request.cuts
    share = 1 - expected.most / expected.parameters
    method, allocation = parse_names(cuts.methods)[0], parse_names(cuts.allocations)[0]
    return expect(CutAsked(expected.parameters, share, PARAMETERS, method, allocation, cuts.recover))


def _intentions(request: Request, texts: Texts, expected: Estimate, source: Any) -> list[list[str]]:
    """What the run is about to do and to take, as names and values."""
    from surgery.cli.shrinking.estimate import result_dtype
    from surgery.planning.grids import parse_names
    from surgery.planning.target import parse_target

    methods, allocations = parse_names(request.cuts.methods), parse_names(request.cuts.allocations)
    tried = f"{', '.join(methods)} x {', '.join(allocations)} x {request.cuts.try_recover}"
    return [
        ["model", request.shrink.model],
        *expected.rows(parse_target(request.shrink.to), result_dtype(request, source)),
        ["measured on", _measured_on(request, texts)],
        ["cuts to try", f"{tried}, on {request.cuts.try_tokens:,} tokens of {texts.held_out}"],
        ["recovery", request.cuts.recover],
        [
            "judged on",
            f"{texts.held_out} (held out)" + (f" and {texts.other}" if texts.other else "; no other text: add --other"),
        ],
    ]


def _measured_on(request: Request, texts: Texts) -> str:
    if request.measure.atlas:
        return f"the text of {request.measure.atlas}"
    return f"{texts.calib}: {texts.file} without its last tenth" if texts.file else texts.calib


def _foreseen(request: Request, texts: Texts, places: Places, publishing: PublishingOptions) -> list[Step]:
    """The steps as far as they are known before the first one: the best cut is not."""
    from surgery.cli.shrinking import steps
    from surgery.planning.grids import parse_names

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
        *_push_steps(places, publishing),
    ]


def _push_steps(places: Places, publishing: PublishingOptions) -> list[Step]:
    from surgery.cli.shrinking.steps import push_step

    if publishing.push is None:
        return []
    return [push_step(places, publishing.push, public=publishing.public, create_pr=publishing.create_pr)]


def _shrink(
    request: Request, texts: Texts, places: Places, publishing: PublishingOptions, expected: Estimate, talk: PrintOptions
) -> None:
    """Run the steps that are not done, and print what they found."""
    from surgery.cli.shrinking import outcome, steps
    from surgery.cli.shrinking.run import Runner
    from surgery.cli.shrinking.texts import split_file
    from surgery.planning.grids import parse_names
    from surgery.result.judge import put_verdict
    from surgery.result.verdict import judged

    first = steps.measure_step(request, texts, places)
    foreseen = _foreseen(request, texts, places, publishing)
    runner = Runner(places, len(foreseen), first, overwrite=request.shrink.overwrite, quiet=talk.quiet)
    split_file(texts)
    if first:
        runner.run(first)
    allocations, to, try_recover, recover = _settled(request, places)
    tried = steps.try_steps(request, texts, places, to, try_recover)
    found: list[Candidate] = []
    method, allocation = parse_names(request.cuts.methods)[0], allocations[0]
    if tried:
        wanted = [step for step in tried if step.name.removeprefix("try ") in allocations]
        runner.count -= len(tried) - len(wanted)
        for step in wanted:
            runner.run(step)
        found = outcome.candidates(places, parse_names(request.cuts.methods), allocations)
        method, allocation = found[0].method, found[0].allocation
    cut = steps.cut_step(request, places, method, allocation, recover)
    runner.run(cut)
    for step in steps.evaluate_steps(request, texts, places):
        runner.run(step)
    loss, answers = outcome.read_evaluation(places.held_out, calibrated=True)
    losses = [loss]
    if texts.other:
        losses.append(outcome.read_evaluation(places.other, calibrated=False)[0])
    verdict = judged(tuple(losses), answers)
    put_verdict(places.output, verdict, _evaluated(places))
    for step in _push_steps(places, publishing):
        runner.run(step)
    _tell(request, texts, places, expected, found, verdict, runner.commands, talk)


def _settled(request: Request, places: Places) -> tuple[tuple[str, ...], str, str, str]:
    """What the atlas settles: allocations that save something, the size as a sweep takes it, and both recoveries.

    Raises:
        UsageError: No cut reaches the size, or no allocation saves what it should.
        AtlasError: The atlas lacks what a method needs.
    """
    from chanfmt.base.errors import UsageError
    from chanfmt.hub.locate import open_atlas
    from surgery.cli.shrinking.steps import atlas_of
    from surgery.planning.grids import parse_names
    from surgery.planning.options import PlanOptions
    from surgery.planning.plan import make_plan
    from surgery.planning.shrink import check_plan
    from surgery.planning.sized import stored_dtype
    from surgery.planning.target import BYTES, BYTES_OF, parse_target

    with open_atlas(atlas_of(request, places), contained=True) as atlas:
        dtype, target = request.shrink.result_dtype, parse_target(request.shrink.to)
        to = request.shrink.to
        if target.kind == BYTES:
            # A sweep writes no file, so its sizes are parameters.
            to = f"{target.parameters(atlas.model.parameters, BYTES_OF[stored_dtype(atlas, dtype)]) / 1e3:.3f}K"
        plans, refused = {}, None
        for allocation in parse_names(request.cuts.allocations):
            try:
                for method in parse_names(request.cuts.methods):
                    plan = make_plan(atlas, PlanOptions(method=method, allocation=allocation, to=request.shrink.to, dtype=dtype))
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
        recoveries = [_possible(name, atlas, plan) for name in (request.cuts.try_recover, request.cuts.recover)]
    return tuple(plans), to, recoveries[0], recoveries[1]


def _possible(name: str, atlas: Any, plan: Any) -> str:
    """The recovery ``name``; ``none`` if the model or the atlas does not allow it."""
    from chanfmt.base.errors import AtlasError, UsageError
    from surgery.recovery.options import RecoveryOptions, plan_recovery

    try:
        plan_recovery(RecoveryOptions(name), atlas, plan)
    except (UsageError, AtlasError) as error:
        say(f"no {name}: {error.message}")
        return "none"
    return name


def _evaluated(places: Places) -> Any:
    """The numbers on the held-out text in the form that travels with the result."""
    from chanfmt.models.source import ModelSource
    from surgery.result.evaluated import take_evaluation
    from surgery.result.result import open_result

    dense = open_result(places.output).report.applied.fingerprint
    return take_evaluation(places.held_out, ModelSource(places.output).fingerprint, dense)


def _tell(
    request: Request,
    texts: Texts,
    places: Places,
    expected: Estimate,
    found: list[Candidate],
    verdict: Verdict,
    commands: list[dict[str, Any]],
    talk: PrintOptions,
) -> None:
    """Print the cuts that were tried, the losses, the answers, the size, the verdict, and what to do next."""
    from dataclasses import asdict

    from surgery.cli.shrinking.outcome import candidate_rows
    from surgery.cli.shrinking.steps import next_commands
    from surgery.evaluation.tables import answer_rows
    from surgery.planning.sizes import count_text, size_text
    from surgery.result.result import open_result
    from surgery.result.verdict import loss_table

    report = open_result(places.output).report
    before, after = report.parameters_before, report.parameters_after
    following = next_commands(request, texts, places)
    if talk.json:
        print_json(
            {
                "model": request.shrink.model,
                "to": request.shrink.to,
                "output": str(places.output),
                "work": str(places.work),
                "estimate": expected.to_json(),
                "steps": commands,
                "tried": [asdict(item) for item in found],
                "cut": {"method": report.plan.method, "allocation": report.plan.allocation, "sparsity": report.plan.sparsity}
                | {"recover": report.recovery.method if report.recovery else "none"},
                "parameters": {"before": before, "after": after},
                "bytes": {"before": report.bytes_before, "after": report.bytes_after},
                "verdict": verdict.to_json(),
                "next": following,
            }
        )
        return
    if found:
        print_table(*candidate_rows(found))
        print_line()
    print_table(*loss_table(verdict))
    for pair in verdict.answers:
        print_line()
        print_pairs(answer_rows(pair.prompt, (("dense", pair.dense), ("smaller", pair.result))))
    print_line()
    print_pairs(
        [
            [
                "size",
                f"{count_text(before)} to {count_text(after)} parameters ({after / before:.1%}), {size_text(report.bytes_after)}",
            ],
            ["output", f"{places.output} (the steps' results are in {places.work})"],
            ["verdict", verdict.sentence()],
            *([name, command] for name, command in following.items()),
        ]
    )
