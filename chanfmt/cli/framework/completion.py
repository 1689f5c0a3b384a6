"""Scripts that complete commands, options and their values in a shell. The scripts are text: completing starts no Python."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class Node:
    """A program or one of its commands.

    Attributes:
        options: Its flags.
        choices: Flag to the values that it may have.
        commands: Name to summary and node of each command.
    """

    options: tuple[str, ...]
    choices: Mapping[str, tuple[str, ...]]
    commands: Mapping[str, tuple[str, Node]]

    def walk(self, *path: str) -> Iterator[tuple[tuple[str, ...], Node]]:
        """The node and all nodes below, each with the names that lead to it."""
        yield path, self
        for name, (_, child) in self.commands.items():
            yield from child.walk(*path, name)


def script(shell: str, program: str, node: Node) -> str:
    """The script for ``shell``, one of `SHELLS`. Other arguments are completed as files."""
    if shell == "fish":
        return _fish(program, node)
    bash = _bash(program, node)
    return bash if shell == "bash" else f"autoload -U +X bashcompinit && bashcompinit\n{bash}"


def _bash(program: str, node: Node) -> str:
    name = "_" + re.sub(r"\W", "_", program)
    known = [(path, child) for path, child in node.walk()]
    steps = [f"      '{' '.join(path[:-1])}/{path[-1]}') at='{' '.join(path)}' ;;" for path, _ in known if path]
    values = [
        f"    '{' '.join(path)}/{flag}') fits='{' '.join(choices)}' ;;"
        for path, child in known
        for flag, choices in child.choices.items()
    ]
    # zsh gives a meaning of its own to variables called path, words, commands and options.
    words = [
        f"    '{' '.join(path)}') names='{' '.join(child.commands)}' flags='{' '.join(child.options)}' ;;"
        for path, child in known
    ]
    return "\n".join(
        [
            f"# Completion of {program}. Load it with: source <({program} --completion bash)",
            f"{name}() {{",
            '  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" at="" fits="" names="" flags="" i',
            "  for ((i = 1; i < COMP_CWORD; i++)); do",
            '    case "$at/${COMP_WORDS[i]}" in',
            *steps,
            "    esac",
            "  done",
            '  case "$at/$prev" in',
            *values,
            "  esac",
            '  if [ -n "$fits" ]; then',
            '    COMPREPLY=($(compgen -W "$fits" -- "$cur"))',
            "    return",
            "  fi",
            '  case "$at" in',
            *words,
            "  esac",
            '  case "$cur" in',
            '    -*) COMPREPLY=($(compgen -W "$flags" -- "$cur")) ;;',
            '    *) if [ -n "$names" ]; then COMPREPLY=($(compgen -W "$names" -- "$cur")); '
            'else COMPREPLY=($(compgen -f -- "$cur")); fi ;;',
            "  esac",
            "}",
            f"complete -o filenames -F {name} {program}",
            "",
        ]
    )


def _fish(program: str, node: Node) -> str:
    lines = [f"# Completion of {program}. Load it with: {program} --completion fish | source"]
    for path, child in node.walk():
        seen = [f"__fish_seen_subcommand_from {name}" for name in path]
        if child.commands:
            unseen = f"not __fish_seen_subcommand_from {' '.join(child.commands)}"
            condition = shlex.quote("; and ".join([*seen, unseen]))
            for name, (summary, _) in child.commands.items():
                first = summary.split(". ")[0].rstrip(".")
                lines.append(f"complete -c {program} -f -n {condition} -a {name} -d {shlex.quote(first)}")
            seen = [*seen, unseen]
        condition = f" -n {shlex.quote('; and '.join(seen))}" if seen else ""
        for flag in child.options:
            kind = "-l" if flag.startswith("--") else "-s"
            values = child.choices.get(flag)
            more = f" -x -a {shlex.quote(' '.join(values))}" if values else ""
            lines.append(f"complete -c {program}{condition} {kind} {flag.lstrip('-')}{more}")
    return "\n".join([*lines, ""])
