"""A finished result to the Hub: checked here, described, uploaded in one commit, and read back."""

from __future__ import annotations

import contextlib
import json
import shlex
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from chanfmt.base.errors import ChanfmtError, CheckError, UsageError
from chanfmt.base.files import atomic_file
from chanfmt.base.narrate import say
from chanfmt.hub.names import check_repo
from chanfmt.hub.publish import PublishOptions, full_name, publish_folder
from surgery.evaluation.perplexity import perplexity_text
from surgery.result.card import UNVERIFIED, is_edited, model_card
from surgery.result.names import CARD_FILE, EVALUATION_FILE, default_repository
from surgery.result.result import check_unchanged, open_result

if TYPE_CHECKING:
    from collections.abc import Iterator

    from chanfmt.hub.publish import Published
    from surgery.result.evaluated import Evaluated
    from surgery.result.record import Report
    from surgery.result.result import Result


@dataclass(frozen=True)
class PushOptions(PublishOptions):
    """How a result is published."""

    eval: str | None = field(
        default=None,
        metadata={
            "help": "put the numbers of this output of surgery eval --json into the card",
            "metavar": "FILE",
        },
    )
    no_verify: bool = field(
        default=False,
        metadata={
            "help": "push a result whose logits were not compared; its card says so",
        },
    )


def push(directory: Path, repo: str | None, options: PushOptions) -> Published:
    """Publish the result in ``directory``.

    Args:
        repo: ``USER/NAME``, or ``NAME`` of the logged-in user's; None for `default_repository`.

    Raises:
        UsageError: ``directory`` holds no result, or one that was not verified, or the repository cannot be used as asked.
        CheckError: The result has changed since it was checked, or the Hub holds something else afterwards.
        HubError: The Hub refused or could not be reached.
    """
    result = open_result(directory)
    name = repo or default_repository(result.report.plan)
    check_repo(name)
    if result.report.logits is None and not options.no_verify:
        raise UsageError(
            f"the logits of {directory} were not compared with the masked dense model's: {result.report.logits_skipped}",
            hint="cut the model again where it can be compared, or add --no-verify; the card will say so",
        )
    check_unchanged(result)
    evaluated = _evaluation(result, options.eval) if options.eval else result.evaluated
    if evaluated and evaluated.dense is None:
        say("note: no perplexity of the dense model on the same tokens is at hand; the card gives the result's alone")
    with _resumable(directory, push_command(directory, repo, options)):
        name = full_name(name)
        _write_card(result, name, evaluated, new=options.eval is not None)
        result = open_result(directory)
        for stranger in result.strangers:
            say(f"{stranger} is not part of the result, and is not pushed")
        terms = result.report.base.terms
        if terms and not terms.allows(name.rsplit("/", 1)[-1]):
            say(f"note: the licence of {result.report.base.id} asks for names that begin with {terms.prefix!r}")
        return publish_folder(
            directory,
            name,
            kind="model",
            message=commit_message(result.report, evaluated),
            options=options,
            names=result.names,
        )


def commit_message(report: Report, evaluated: Evaluated | None) -> str:
    """What was done, with its numbers, in one line."""
    plan = report.plan
    share = 1 - report.parameters_after / report.parameters_before
    parts = [f"{plan.method}: {plan.sparsity_reached:.1%} of the FFN channels removed, {share:.1%} of the parameters"]
    if supernodes := sum(block.supernodes for block in plan.blocks):
        parts.append(f"{sum(block.supernodes_kept for block in plan.blocks):,} of {supernodes:,} supernodes kept")
    if evaluated:
        dense = f"{perplexity_text(evaluated.dense.perplexity)} to " if evaluated.dense else ""
        parts.append(f"perplexity {dense}{perplexity_text(evaluated.result.perplexity)} ({evaluated.data}, {evaluated.protocol})")
    return "; ".join(parts)


def push_command(directory: Path, repo: str | None, options: PushOptions) -> str:
    """The command line that does what `push` does."""
    flags = [
        field.metadata.get("flag", f"--{field.name.replace('_', '-')}")
        for field in fields(options)
        if getattr(options, field.name) is True
    ]
    more = ["--eval", options.eval] if options.eval else []
    return shlex.join(["surgery", "push", str(directory), *([repo] if repo else []), *flags, *more])


@contextlib.contextmanager
def _resumable(directory: Path, command: str) -> Iterator[None]:
    """Let whatever ends the push inside say that the result is still there, and how to go on."""
    text = f"{directory} is whole; to go on: {command}"
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(text) from None
    except ChanfmtError as error:
        error.hint = f"{error.hint}\n  {text}" if error.hint else text
        raise


def _evaluation(result: Result, path: str) -> Evaluated:
    from chanfmt.models.source import ModelSource
    from surgery.result.evaluated import take_evaluation

    return take_evaluation(Path(path), ModelSource(result.directory).fingerprint, result.report.applied.fingerprint)


def _write_card(result: Result, name: str, evaluated: Evaluated | None, *, new: bool) -> None:
    """Make the card name the repository and the numbers, unless somebody else wrote in it; keep the numbers beside it."""
    path = result.directory / CARD_FILE
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else None
    except (OSError, ValueError) as error:
        raise CheckError(f"cannot read {path}: {error}") from None
    if text is not None and is_edited(text):
        if new:
            raise UsageError(
                f"{path} was edited, so that no numbers can be put into it",
                hint="write them yourself and leave out --eval, or remove the file to have it written anew",
            )
        if result.report.logits is None and UNVERIFIED not in text:
            raise UsageError(
                f"{path} was edited, and no longer says that the logits were not compared",
                hint=f"write {UNVERIFIED!r} into it, or remove the file to have it written anew",
            )
        say(f"{path} was edited, and is pushed as it is")
        return
    if new and evaluated:
        with atomic_file(result.directory / EVALUATION_FILE) as temporary:
            temporary.write_text(json.dumps(evaluated.to_json(), indent=2) + "\n", encoding="utf-8")
    card = model_card(result.report, name, evaluated)
    if card != text:
        with atomic_file(path) as temporary:
            temporary.write_text(card, encoding="utf-8")
