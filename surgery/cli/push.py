"""`surgery push`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import UsageError
from chanfmt.base.text import printable
from chanfmt.cli.framework import parse_options, print_json
from chanfmt.hub.failures import no_token
from chanfmt.hub.names import check_repo
from chanfmt.hub.publish import VisibilityOptions
from surgery.cli.options import TalkOptions, add_command
from surgery.result.push import PushOptions

if TYPE_CHECKING:
    import argparse


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


def add(commands: Any) -> None:
    add_command(commands, "push", "put a result on the Hub", _run, PushedOptions, PushOptions, TalkOptions)


def _run(arguments: argparse.Namespace) -> None:
    from surgery.result.push import push

    pushed, talk = parse_options(arguments, PushedOptions), parse_options(arguments, TalkOptions)
    done = push(Path(pushed.directory), pushed.repo, parse_options(arguments, PushOptions))
    if talk.json:
        print_json(asdict(done))
    else:
        print(printable(done.url))
