"""Which program has which command, so that a command typed after the wrong program gets the right answer.

`atlas` must not import `surgery`, so these are names only. tests/cli/test_mistakes.py compares them with the programs.
"""

from __future__ import annotations

COMMANDS = {
    "atlas": (
        "build", "info", "show", "validate", "label", "merge", "strip", "compare", "report", "trajectory", "export",
        "import", "import-imatrix", "push", "pull", "cache",
    ),
    "surgery": ("prune", "plan", "apply", "push", "restore", "eval", "sweep", "ablate", "replaceability", "shrink"),
}  # fmt: skip
"""Program to its commands."""

OPTIONS = {
    "--sparsity": "surgery prune",
    "--protect": "surgery prune",
    "--method": "surgery prune",
    "--allocation": "surgery prune",
    "--recover": "surgery prune",
    "--data": "surgery eval",
    "--max-tokens": "surgery eval",
    "--calib": "atlas build",
    "--sequences": "atlas build",
    "--rho": "atlas build",
}
"""Options that people type after the other program, and a command that has the option."""

SAME = (
    ("--calib", "--data"),
    ("--metric", "--sort"),
    ("--output", "--out", "--output-dir", "--outfile"),
    ("--sparsity", "--ratio", "--prune", "--amount"),
    ("--seq-len", "--sequence-length", "--max-length"),
    ("--overwrite", "--force"),
    ("--recover", "--recovery"),
)
"""Spellings of the same thing in different commands and programs."""


def home_of(program: str, command: str) -> str:
    """The other program that has ``command``; empty if there is none."""
    return next((other for other, names in COMMANDS.items() if other != program and command in names), "")


def synonyms(option: str) -> tuple[str, ...]:
    """Other spellings of ``option``."""
    return tuple(name for group in SAME if option in group for name in group if name != option)
