"""`atlas cache`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.narrate import say
from chanfmt.cli import framework

if TYPE_CHECKING:
    import argparse

    from chanfmt.models.gguf_cache import Entry


@dataclass(frozen=True)
class ClearOptions:
    """What is removed."""

    names: tuple[str, ...] = field(
        default=(), metadata={"help": "entries, or the GGUF files that they were made from", "positional": "NAME", "nargs": "*"}
    )
    all: bool = field(default=False, metadata={"help": "remove every entry"})


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "cache",
        help="list and remove dequantised GGUF files",
        description="List and remove the checkpoints that chanfmt made from GGUF files.",
        printing=False,
    )
    actions = framework.add_group(parser, "ACTION")
    framework.add_command(
        actions,
        "list",
        "list dequantised GGUF files",
        run=_list,
        options=lambda: (),
        examples=("atlas cache list --json", "atlas cache list --quiet"),
        description="List the checkpoints that chanfmt made from GGUF files, last used first, with what made them and their size.",
    )
    framework.add_command(
        actions,
        "clear",
        "remove dequantised GGUF files",
        run=_clear,
        options=lambda: (ClearOptions,),
        examples=("atlas cache clear SmolLM2-135M-Instruct.Q4_1.gguf", "atlas cache clear --all"),
        description=(
            "Remove checkpoints that chanfmt made from GGUF files. The GGUF files stay, and a checkpoint is made again when it is "
            "needed. An entry that a process uses or makes is not removed. The exit code is 1 if such an entry stays."
        ),
    )


def _list(arguments: argparse.Namespace) -> None:
    from chanfmt.models.gguf_cache import cache_directory, entries

    found = entries()
    total = sum(entry.bytes for entry in found)
    if arguments.json:
        framework.print_json({"directory": str(cache_directory()), "bytes": total, "entries": list(map(_as_json, found))})
        return
    if found:
        framework.print_table(
            ("file", "size", "last used", "made by", "entry"),
            [(_file(entry), _size(entry.bytes), _day(entry.last_used), _made_by(entry), entry.name) for entry in found],
        )
    say(f"{len(found)} {'entry' if len(found) == 1 else 'entries'} of {_size(total)} in {cache_directory()}")


def _clear(arguments: argparse.Namespace) -> int:
    from chanfmt.models.gguf_cache import remove

    chosen = _chosen(framework.parse_options(arguments, ClearOptions))
    removed, kept = [], []
    for entry in chosen:
        if remove(entry.name):
            removed.append(entry)
            say(f"removed {entry.name}: {_size(entry.bytes)}")
        else:
            kept.append(entry)
            say(f"{entry.name} stays, because a process uses it or makes it; end that process, and run this command again")
    if arguments.json:
        framework.print_json(
            {
                "removed": [entry.name for entry in removed],
                "kept": [entry.name for entry in kept],
                "bytes": sum(entry.bytes for entry in removed),
            }
        )
    return 1 if kept else 0


def _chosen(options: ClearOptions) -> list[Entry]:
    """The entries that are named. Raises `UsageError` for names that no entry has."""
    from chanfmt.base.choices import did_you_mean
    from chanfmt.base.errors import UsageError
    from chanfmt.models.gguf_cache import entries

    hint = "see what there is with: atlas cache list"
    if bool(options.names) == options.all:
        raise UsageError("name what to remove, or add --all, and not both" if options.all else "name what to remove", hint=hint)
    found = entries()
    if options.all:
        return found
    known = {entry.name: {entry.name, *([entry.conversion.file] if entry.conversion else [])} for entry in found}
    words = set().union(*known.values())
    for name in options.names:
        if name not in words:
            raise UsageError(f"the cache has no entry {name!r}{did_you_mean(name, words)}", hint=hint)
    return [entry for entry in found if known[entry.name] & {*options.names}]


def _as_json(entry: Entry) -> dict[str, Any]:
    from dataclasses import asdict
    from datetime import UTC, datetime

    used = datetime.fromtimestamp(entry.last_used, UTC).isoformat(timespec="seconds")
    return asdict(entry) | {"last_used": used}


def _file(entry: Entry) -> str:
    return entry.conversion.file if entry.conversion else "-"


def _made_by(entry: Entry) -> str:
    if entry.conversion is None:
        return {"unfinished": "a process that was killed"}.get(entry.state, "an older chanfmt")
    return ", ".join(f"{name} {number}" for name, number in entry.conversion.converter.items())


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def _day(seconds: float) -> str:
    from datetime import datetime

    return f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M}"
