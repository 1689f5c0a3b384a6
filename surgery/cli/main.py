"""The ``surgery`` command. Each subcommand is one function here that adds it and one that runs it."""

from __future__ import annotations

import dataclasses
import re
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from chanfmt.base.errors import MissingPackageError, UsageError
from chanfmt.base.narrate import say, warn
from chanfmt.base.text import printable
from chanfmt.cli.framework import add_options, make_parser, parse_options, print_json, print_table, run_command
from chanfmt.hub.failures import no_token
from chanfmt.hub.names import check_repo
from chanfmt.hub.publish import VisibilityOptions
from surgery.planning.plan import PlanOptions
from surgery.recovery.options import RecoveryOptions
from surgery.result.push import PushOptions

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from chanfmt.cli.framework import Parser
    from chanfmt.hub.publish import Published
    from surgery.planning.plan import PruningPlan
    from surgery.recovery.options import BiasRecovery, Refit

    Commands = argparse._SubParsersAction[Parser]


@dataclass(frozen=True)
class AtlasOptions:
    """Where the scores come from."""

    atlas: str = field(metadata={"help": "importance atlas of the model, a file or hf://REPO/FILE", "positional": "ATLAS"})


@dataclass(frozen=True)
class PlanFileOptions:
    """A plan that was written earlier."""

    plan: str = field(metadata={"help": "plan written by surgery plan", "positional": "PLAN"})


@dataclass(frozen=True)
class PlanOutputOptions:
    """Where the plan goes."""

    output: str | None = field(
        default=None,
        metadata={
            "help": "write the plan to this file (default: print it only)",
            "short": "-o",
            "metavar": "PLAN",
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the output where it exists"})


@dataclass(frozen=True)
class ApplyOptions:
    """What to cut, and where the result goes."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, directory or .gguf file of the model (default: the one the atlas names, from the Hub)",
            "metavar": "MODEL",
        },
    )
    revision: str | None = field(
        default=None,
        metadata={
            "help": "branch, tag or commit of the model on the Hub (default: the commit that the atlas was measured at)",
        },
    )
    output: str | None = field(
        default=None,
        metadata={
            "help": "output directory (default: MODEL-METHOD-PERCENT here)",
            "short": "-o",
            "metavar": "DIR",
        },
    )
    shard_size: str | None = field(
        default=None,
        metadata={
            "help": "largest size of a weights file, such as 5GB (default: files that correspond to the model's)",
            "metavar": "SIZE",
        },
    )
    no_verify: bool = field(
        default=False,
        metadata={
            "help": "do not compare logits with those of the masked dense model",
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "replace the output where it is an earlier result"})


@dataclass(frozen=True)
class FineTuneOptions:
    """Which weights a plan is for."""

    fine_tune: bool = field(
        default=False,
        metadata={
            "help": "MODEL is a fine-tune of the plan's model: other weights in the same tensors",
        },
    )


@dataclass(frozen=True)
class RestoreOptions:
    """What is restored, and where it goes."""

    directory: str = field(metadata={"help": "result of surgery prune or apply, trained since or not", "positional": "DIR"})
    output: str = field(metadata={"help": "output directory", "short": "-o", "metavar": "DIR"})
    shard_size: str | None = field(
        default=None,
        metadata={
            "help": "largest size of a weights file, such as 5GB (default: files that correspond to DIR's)",
            "metavar": "SIZE",
        },
    )
    no_verify: bool = field(default=False, metadata={"help": "do not compare logits with those of DIR"})
    overwrite: bool = field(default=False, metadata={"help": "replace the output where it is an earlier result"})


@dataclass(frozen=True)
class PublishingOptions(VisibilityOptions):
    """Whether and how a result is pushed as soon as it is made."""

    push: str | None = field(
        default=None,
        metadata={
            "help": "then push the result: to USER/NAME, to NAME of yours, or to a name as the directory's default",
            "metavar": "REPO",
            "nargs": "?",
        },
    )

    def check(self, *, login: bool) -> None:
        """Raise `ChanfmtError` for what would stop the push and can be told before the cut.

        Args:
            login: Ask for a token too.
        """
        if self.push is None and (self.public or self.create_pr):
            raise UsageError("--public and --pr are for --push")
        if self.push:
            check_repo(self.push)
        if self.push is not None and login:
            from huggingface_hub import get_token

            if get_token() is None:
                raise no_token()


@dataclass(frozen=True)
class PushedOptions:
    """What is pushed, and where to."""

    directory: str = field(metadata={"help": "result of surgery prune or apply", "positional": "DIR"})
    repo: str | None = field(
        default=None,
        metadata={
            "help": "USER/NAME, or NAME of yours (default: MODEL-METHOD-PERCENT)",
            "positional": "REPO",
            "nargs": "?",
        },
    )


@dataclass(frozen=True)
class DryRunOptions:
    """Stop early."""

    dry_run: bool = field(default=False, metadata={"help": "print the plan and stop"})


@dataclass(frozen=True)
class ResultsOptions:
    """Where an experiment's rows go."""

    output: str = field(
        metadata={
            "help": "directory for results.csv and results.json; rows that are there are not measured again",
            "short": "-o",
            "metavar": "DIR",
        }
    )
    overwrite: bool = field(default=False, metadata={"help": "drop the rows that are there"})


@dataclass(frozen=True)
class TalkOptions:
    """What is printed."""

    json: bool = field(default=False, metadata={"help": "print the result as JSON"})
    quiet: bool = field(default=False, metadata={"help": "print no progress"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code."""
    parser, commands = make_parser("surgery", "Remove the FFN channels that an importance atlas says matter least.")
    for add in COMMANDS:
        add(commands)
    return run_command(parser, arguments)


def add_prune(commands: Commands) -> None:
    """``surgery prune``: atlas to smaller model."""
    _add(
        commands,
        "prune",
        "cut a model",
        _prune,
        AtlasOptions,
        PlanOptions,
        ApplyOptions,
        RecoveryOptions,
        PublishingOptions,
        DryRunOptions,
        TalkOptions,
    )


def add_plan(commands: Commands) -> None:
    """``surgery plan``: atlas to plan; no model is needed."""
    _add(
        commands,
        "plan",
        "decide what a cut would remove, from the atlas alone",
        _plan,
        AtlasOptions,
        PlanOptions,
        PlanOutputOptions,
        TalkOptions,
    )


def add_apply(commands: Commands) -> None:
    """``surgery apply``: plan to smaller model."""
    _add(commands, "apply", "cut a model as a plan says", _apply, PlanFileOptions, ApplyOptions, FineTuneOptions, TalkOptions)


def add_push(commands: Commands) -> None:
    """``surgery push``: a result to the Hub."""
    _add(commands, "push", "put a result on the Hub", _push, PushedOptions, PushOptions, TalkOptions)


def add_restore(commands: Commands) -> None:
    """``surgery restore``: smaller model back to full width."""
    _add(
        commands,
        "restore",
        "put a cut model back into its full width, with zeros where channels were removed",
        _restore,
        RestoreOptions,
        TalkOptions,
    )


def add_eval(commands: Commands) -> None:
    """``surgery eval``: losses, speed and memory side by side."""
    from surgery.evaluation.options import EvaluateOptions

    _add(commands, "eval", "perplexity, speed and memory of several models on the same text", _eval, EvaluateOptions, TalkOptions)


def add_sweep(commands: Commands) -> None:
    """``surgery sweep``: perplexity of many cuts, without writing any."""
    from surgery.experiments.subject import SubjectOptions
    from surgery.experiments.sweep_plan import SweepOptions

    _add(
        commands,
        "sweep",
        "perplexity of many cuts of one loaded model, as a table and a figure",
        _sweep,
        AtlasOptions,
        SweepOptions,
        SubjectOptions,
        ResultsOptions,
        TalkOptions,
    )


def add_ablate(commands: Commands) -> None:
    """``surgery ablate``: what removing chosen channels costs, an experiment each."""
    from surgery.experiments.ablation.experiments import EXPERIMENTS
    from surgery.experiments.subject import SubjectOptions

    summary = "what removing chosen channels of a loaded model costs, with controls"
    parser = commands.add_parser("ablate", help=summary, description=summary[0].upper() + summary[1:] + ".")
    experiments = parser.add_subparsers(metavar="EXPERIMENT", required=True)
    for name, kind in EXPERIMENTS.items():
        _add(experiments, name, kind.summary, _ablate, AtlasOptions, kind.options, SubjectOptions, ResultsOptions, TalkOptions)
        experiments.choices[name].set_defaults(experiment=name, kind=kind.options)


def _add(commands: Commands, name: str, summary: str, run: object, *options: type) -> None:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    for kind in options:
        add_options(parser, kind)
    parser.set_defaults(run=run)


def _prune(arguments: argparse.Namespace) -> None:
    import chanfmt
    from surgery.recovery.options import plan_recovery

    options = parse_options(arguments, ApplyOptions)
    talk = parse_options(arguments, TalkOptions)
    dry_run = parse_options(arguments, DryRunOptions).dry_run
    plan_options = parse_options(arguments, PlanOptions)
    recovery_options = parse_options(arguments, RecoveryOptions)
    plan_options.check()
    recovery_options.check()
    publishing = parse_options(arguments, PublishingOptions)
    publishing.check(login=not dry_run)
    path = parse_options(arguments, AtlasOptions).atlas
    plan = _make_plan(path, plan_options, talk)
    if dry_run:
        _print_plan(plan, talk)
        return
    # An address without a commit may name another file by now.
    with chanfmt.open(plan.atlas_source or path) as atlas:
        recovery, atlas_file = plan_recovery(recovery_options, atlas, plan), atlas.path
    _cut(plan, options, talk, recovery=recovery, atlas=atlas_file, publishing=publishing)


def _plan(arguments: argparse.Namespace) -> None:
    from chanfmt.base.files import check_target
    from surgery.planning.plan import save_plan

    options = parse_options(arguments, PlanOutputOptions)
    talk = parse_options(arguments, TalkOptions)
    if options.output:
        check_target(Path(options.output), overwrite=options.overwrite)
    plan = _make_plan(parse_options(arguments, AtlasOptions).atlas, parse_options(arguments, PlanOptions), talk)
    if options.output:
        save_plan(plan, Path(options.output))
        say(f"wrote {options.output}; apply it with: surgery apply {options.output} --model MODEL -o DIR")
    _print_plan(plan, talk)


def _apply(arguments: argparse.Namespace) -> None:
    from surgery.planning.plan import load_plan

    plan = load_plan(Path(parse_options(arguments, PlanFileOptions).plan))
    fine_tune = parse_options(arguments, FineTuneOptions).fine_tune
    _cut(plan, parse_options(arguments, ApplyOptions), parse_options(arguments, TalkOptions), fine_tune=fine_tune)


def _push(arguments: argparse.Namespace) -> None:
    pushed, talk = parse_options(arguments, PushedOptions), parse_options(arguments, TalkOptions)
    done = _push_result(Path(pushed.directory), pushed.repo, parse_options(arguments, PushOptions), talk)
    if talk.json:
        print_json(asdict(done))
    else:
        print(printable(done.url))


def _restore(arguments: argparse.Namespace) -> None:
    from chanfmt.hub.locate import locate_model
    from surgery.cut.restore import restore

    options = parse_options(arguments, RestoreOptions)
    talk = parse_options(arguments, TalkOptions)
    output = Path(options.output)
    shard_bytes = parse_size(options.shard_size)
    restored = restore(
        locate_model(options.directory).directory,
        output,
        overwrite=options.overwrite,
        verify=not options.no_verify,
        shard_bytes=shard_bytes,
    )
    say(f"wrote {output}")
    if talk.json:
        print_json(restored | {"output": str(output)})


def _eval(arguments: argparse.Namespace) -> None:
    from surgery.evaluation.evaluate import evaluate
    from surgery.evaluation.options import EvaluateOptions

    options = parse_options(arguments, EvaluateOptions)
    evaluations = evaluate(options.models, options.data, **options.settings())
    if parse_options(arguments, TalkOptions).json:
        print_json(evaluations.to_json())
        return
    for line in evaluations.coverage():
        print(printable(line))
    for table in evaluations.tables():
        print()
        print_table(*table)


def _sweep(arguments: argparse.Namespace) -> None:
    import chanfmt
    from surgery.experiments.results import check_directory
    from surgery.experiments.subject import SubjectOptions
    from surgery.experiments.sweep import sweep, table
    from surgery.experiments.sweep_plan import SweepOptions
    from surgery.experiments.sweep_plot import write_figure

    options, output = parse_options(arguments, SweepOptions), parse_options(arguments, ResultsOptions)
    subject = parse_options(arguments, SubjectOptions)
    # The atlas may be downloaded below. A fault in the output directory should show before that.
    check_directory(Path(output.output))
    with chanfmt.open(parse_options(arguments, AtlasOptions).atlas, contained=True) as atlas:
        results = sweep(
            atlas,
            subject.model,
            subject.data,
            **vars(options),
            **subject.running(),
            output=output.output,
            overwrite=output.overwrite,
        )
    identity = results.identity
    try:
        title = f"{identity['model']}, {identity['data']}, {identity['tokens']:,} tokens"
        figures = write_figure(results.rows, Path(output.output) / "sweep", title)
    except MissingPackageError as error:
        figures = ()
        say(f"no figure: {error.message}; {error.hint}")
    say(f"wrote {', '.join(str(path) for path in (*results.files, *figures))}")
    if parse_options(arguments, TalkOptions).json:
        print_json({"identity": identity, "rows": results.rows})
    else:
        print_table(*table(results.rows))


def _ablate(arguments: argparse.Namespace) -> None:
    import chanfmt
    from surgery.experiments.ablation.run import ablate
    from surgery.experiments.ablation.tables import summary_table
    from surgery.experiments.results import check_directory
    from surgery.experiments.subject import SubjectOptions

    options, output = parse_options(arguments, arguments.kind), parse_options(arguments, ResultsOptions)
    subject = parse_options(arguments, SubjectOptions)
    # The atlas may be downloaded below. A fault in the output directory should show before that.
    check_directory(Path(output.output))
    with chanfmt.open(parse_options(arguments, AtlasOptions).atlas, contained=True) as atlas:
        ablation = ablate(
            atlas,
            arguments.experiment,
            subject.model,
            subject.data,
            **vars(options),
            **subject.running(),
            output=output.output,
            overwrite=output.overwrite,
        )
    results = ablation.results
    say(f"wrote {', '.join(str(path) for path in results.files)}")
    if parse_options(arguments, TalkOptions).json:
        print_json({"identity": results.identity, "summary": ablation.summary, "rows": ablation.rows})
        return
    print_table(*ablation.table())
    print()
    print_table(*summary_table(ablation.summary))


def _make_plan(path: str, options: PlanOptions, talk: TalkOptions) -> PruningPlan:
    import chanfmt
    from surgery.planning.plan import make_plan

    with chanfmt.open(path, contained=True) as atlas:
        plan = make_plan(atlas, options)
    for warning in plan.warnings:
        warn(warning)
    return plan


def _cut(
    plan: PruningPlan,
    options: ApplyOptions,
    talk: TalkOptions,
    *,
    fine_tune: bool = False,
    recovery: Refit | BiasRecovery | None = None,
    atlas: Path | None = None,
    publishing: PublishingOptions | None = None,
) -> None:
    from chanfmt.base.command_line import recorded_command
    from surgery.cut.apply import apply_plan, check_output
    from surgery.cut.source import find_model
    from surgery.result.names import default_name
    from surgery.result.record import summary_rows

    output = Path(options.output or default_name(plan))
    shard_bytes = parse_size(options.shard_size)
    # A download may follow: complain about the output before it.
    check_output(output, overwrite=options.overwrite)
    model = find_model(plan.model, options.model, options.revision)
    say(f"cutting {model.id}")
    if model.revision and (model.source, model.id) == (plan.model.source, plan.model.id):
        plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, revision=model.revision))
    report = apply_plan(
        plan,
        model.directory,
        output,
        overwrite=options.overwrite,
        verify=not options.no_verify,
        fine_tune=model if fine_tune else None,
        shard_bytes=shard_bytes,
        recovery=recovery,
        atlas=atlas,
        command=recorded_command("surgery"),
    )
    say(f"wrote {output}")
    if not talk.json:
        _print_pairs([*summary_rows(plan, report), ["output", str(output)]])
    where = {"output": str(output)}
    if publishing and publishing.push is not None:
        push_options = PushOptions(public=publishing.public, create_pr=publishing.create_pr, no_verify=options.no_verify)
        where["url"] = _push_result(output, publishing.push or None, push_options, talk).url
    if talk.json:
        print_json(report.to_json() | where)
    elif "url" in where:
        print(printable(where["url"]))


def _push_result(directory: Path, repo: str | None, options: PushOptions, talk: TalkOptions) -> Published:
    from surgery.result.push import push

    return push(directory, repo, options)


def parse_size(text: str | None) -> int | None:
    """Bytes of a size as transformers writes it: ``5GB`` (decimal), ``500MB``, ``1GiB``. Raises `UsageError`."""
    if text is None:
        return None
    found = re.fullmatch(r"([0-9]+(?:[.][0-9]+)?) ?([KMGT]?)(i?)B", text, re.IGNORECASE)
    size = int(float(found[1]) * (1024 if found[3] else 1000) ** " KMGT".index(found[2].upper() or " ")) if found else 0
    if size < 1:
        raise UsageError(f"--shard-size {text!r} is not a size", hint="write it like 5GB, 500MB or 1GiB")
    return size


def _print_plan(plan: PruningPlan, talk: TalkOptions) -> None:
    from surgery.result.record import layer_rows, plan_json, summary_rows

    if talk.json:
        print_json(plan_json(plan))
        return
    print_table(*layer_rows(plan))
    print()
    _print_pairs(summary_rows(plan))


def _print_pairs(rows: Sequence[Sequence[str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(printable(f"{name.ljust(width)}  {value}"))


COMMANDS = (add_prune, add_plan, add_apply, add_push, add_restore, add_eval, add_sweep, add_ablate)


if __name__ == "__main__":
    sys.exit(main())
