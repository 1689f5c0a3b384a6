"""Push a finished result to the Hub: check it, describe it, upload it in one commit, and read it back."""

from __future__ import annotations

import contextlib
import json
import shlex
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from chanfmt.base.errors import ChanfmtError, CheckError, UsageError
from chanfmt.base.files import atomic_file
from chanfmt.base.inputs import input_path
from chanfmt.base.narrate import say
from chanfmt.base.text import perplexity_text
from chanfmt.hub.names import check_repo
from chanfmt.hub.publish import PublishOptions, check_login, full_name, publish_folder
from surgery.result.card import UNVERIFIED, is_edited, model_card
from surgery.result.names import CARD_FILE, EVALUATION_FILE, default_repository
from surgery.result.result import check_unchanged, open_result, written_model

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator
    from pathlib import Path

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
            "help": "output of surgery eval --json, whose numbers go into the card",
            "metavar": "FILE",
        },
    )
    no_verify: bool = field(
        default=False,
        metadata={
            "help": "push the result even if its logits were not compared; its card then says so",
        },
    )


PUSH_DEFAULTS = PushOptions()
"""Push to a private repository that holds nothing else, and refuse a result that was not verified."""


def push(directory: str | os.PathLike[str], repo: str | None = None, options: PushOptions = PUSH_DEFAULTS) -> Published:
    """Publish the result in ``directory`` on the Hub, in one commit, and read the commit back.

    If the push is interrupted, the directory stays, and the same call uploads what is missing.

    Args:
        directory: A result of `surgery.cut.prune`.
        repo: ``USER/NAME``, or ``NAME`` in the logged-in user's namespace; None for `default_repository`.

    Returns:
        The URL and the commit.

    Raises:
        UsageError: ``directory`` holds no result, or a result that was not verified, or the repository cannot be used as asked.
        CheckError: The result changed since it was checked, or the Hub holds something else afterwards.
        HubError: The Hub refused, or could not be reached.
    """
    directory = input_path(directory)
    result = open_result(directory)
    name = repo or default_repository(result.report.plan)
    check_repo(name)
    if result.report.logits is None and not options.no_verify:
        raise UsageError(
            f"the logits of {directory} were not compared with the masked dense model's: {result.report.logits_skipped}",
            hint="cut the model again on a machine with more memory, or add --no-verify; the card will then say so",
        )
    # Reading all files again takes minutes, so everything else is checked before.
    evaluated = _evaluation(result, options.eval) if options.eval else result.evaluated
    _check_card(result, new=options.eval is not None)
    check_login()
    check_unchanged(result)
    if evaluated and evaluated.dense is None:
        say("note: there is no perplexity of the dense model on the same tokens; the card gives only the result's")
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
    """One line on what was done, with its numbers."""
    plan = report.plan
    parts = [report.sizes.headline, f"{plan.method}: {plan.sparsity_reached:.1%} of the FFN channels removed"]
    if supernodes := sum(block.supernodes for block in plan.blocks):
        parts.append(f"{sum(block.supernodes_kept for block in plan.blocks):,} of {supernodes:,} supernodes kept")
    if evaluated:
        dense = f"{perplexity_text(evaluated.dense.perplexity)} to " if evaluated.dense else ""
        parts.append(f"perplexity {dense}{perplexity_text(evaluated.result.perplexity)} ({evaluated.data}, {evaluated.protocol})")
    return "; ".join(parts)


def push_command(directory: Path, repo: str | None, options: PushOptions) -> str:
    """The command line that pushes ``directory`` with the same arguments."""
    flags = [
        field.metadata.get("flag", f"--{field.name.replace('_', '-')}")
        for field in fields(options)
        if getattr(options, field.name) is True
    ]
    more = ["--eval", options.eval] if options.eval else []
    return shlex.join(["surgery", "push", str(directory), *([repo] if repo else []), *flags, *more])


@contextlib.contextmanager
def _resumable(directory: Path, command: str) -> Iterator[None]:
    """Add to every error of the body, and to an interrupt, that the result is whole and how to continue."""
    text = f"{directory} is whole; continue with: {command}"
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(text) from None
    except ChanfmtError as error:
        error.add_hint(text)
        raise


def _evaluation(result: Result, path: str) -> Evaluated:
    from surgery.result.evaluated import take_evaluation

    return take_evaluation(input_path(path), written_model(result).fingerprint, result.report.applied.fingerprint)


def _card(path: Path) -> str | None:
    """The text of the card; None if there is no card. Raises `CheckError` if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8") if path.exists() else None
    except (OSError, ValueError) as error:
        raise CheckError(f"cannot read {path}: {error}") from None


def _check_card(result: Result, *, new: bool) -> bool:
    """Whether somebody edited the card, which is then pushed as it is.

    Raises:
        UsageError: It was edited, and ``new`` numbers should go into it, or it hides that the logits were not compared.
        CheckError: It cannot be read.
    """
    path = result.directory / CARD_FILE
    text = _card(path)
    if text is not None and is_edited(text):
        if new:
            raise UsageError(
                f"{path} was edited, so no numbers can be put into it",
                hint="write the numbers yourself and leave out --eval, or remove the file to have it written again",
            )
        if result.report.logits is None and UNVERIFIED not in text:
            raise UsageError(
                f"{path} was edited, and no longer says that the logits were not compared",
                hint=f"write {UNVERIFIED!r} into the card, or remove the file to have it written again",
            )
        return True
    return False


def _write_card(result: Result, name: str, evaluated: Evaluated | None, *, new: bool) -> None:
    """Put the repository's name and the numbers into the card, unless somebody edited it. Keep the numbers in a file, too."""
    path = result.directory / CARD_FILE
    text = _card(path)
    if _check_card(result, new=new):
        say(f"{path} was edited, and is pushed as it is")
        return
    if new and evaluated:
        with atomic_file(result.directory / EVALUATION_FILE, overwrite=True) as temporary:
            temporary.write_text(json.dumps(evaluated.to_json(), indent=2) + "\n", encoding="utf-8")
    card = model_card(result.report, name, evaluated)
    if card != text:
        with atomic_file(path, overwrite=True) as temporary:
            temporary.write_text(card, encoding="utf-8")
