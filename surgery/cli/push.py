"""`surgery push`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import UsageError
from chanfmt.cli.framework import PrintOptions, add_command, parse_options, print_json, print_line
from chanfmt.hub.names import check_repo
from chanfmt.hub.publish import VisibilityOptions, check_login

if TYPE_CHECKING:
    import argparse

EXAMPLES = (
    "surgery push llama-half",
    "surgery push llama-half USER/llama-half --public",
)


@dataclass(frozen=True)
class PushedOptions:
    """Which result, and where it goes."""

    directory: str = field(metadata={"help": "result of surgery prune or apply", "positional": "DIR", "kind": "result"})
    repo: str | None = field(
        default=None,
        metadata={
            "help": "USER/NAME, or NAME for a repository of yours (default: MODEL-METHOD-PERCENT)",
            "positional": "REPO",
            "kind": "name",
            "nargs": "?",
        },
    )


@dataclass(frozen=True)
class PublishingOptions(VisibilityOptions):
    """Whether and how the result is pushed."""

    push: str | None = field(
        default=None,
        metadata={
            "help": "push the result to REPO: USER/NAME, or NAME for a repository of yours (default: MODEL-METHOD-PERCENT)",
            "metavar": "REPO",
            "nargs": "?",
        },
    )

    def check(self, *, login: bool) -> None:
        """Raise `ChanfmtError`, before the cut, for what would stop the push after it.

        Args:
            login: Check that there is a token, too.
        """
        if self.push is None and (self.public or self.create_pr):
            raise UsageError("--public and --pr are for --push", hint="add --push, or leave them out")
        if self.push:
            check_repo(self.push)
        if self.push is not None and login:
            check_login()


def add(commands: Any) -> None:
    add_command(
        commands,
        "push",
        "publish a result on the Hugging Face Hub",
        run=_run,
        options=_options,
        examples=EXAMPLES,
        description=(
            "Publish a directory that surgery prune or apply wrote, with its card, private unless --public. After an interruption, "
            "run the same command again: it uploads what is missing."
        ),
    )


def _options() -> tuple[type, ...]:
    from surgery.result.push import PushOptions

    return PushedOptions, PushOptions


def _run(arguments: argparse.Namespace) -> None:
    from surgery.result.push import PushOptions, push

    pushed, talk = parse_options(arguments, PushedOptions), parse_options(arguments, PrintOptions)
    done = push(Path(pushed.directory), pushed.repo, parse_options(arguments, PushOptions))
    if talk.json:
        print_json(asdict(done))
    else:
        print_line(done.url)
