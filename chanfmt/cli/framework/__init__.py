"""The framework of the command lines: commands with option groups and examples, printing, errors, exit codes.

A command is a module with ``EXAMPLES``, a function ``add(commands)``, which calls `add_command`, and a function that runs
the command. The options of a command are dataclasses. Each dataclass is a group in ``--help``.
"""

from __future__ import annotations

from chanfmt.cli.framework.options import PrintOptions, add_options, parse_options
from chanfmt.cli.framework.parser import Parser, add_command, add_group, make_parser
from chanfmt.cli.framework.printing import print_json, print_line, print_pairs, print_table, print_wrapped
from chanfmt.cli.framework.run import run_command

__all__ = [
    "Parser",
    "PrintOptions",
    "add_command",
    "add_group",
    "add_options",
    "make_parser",
    "parse_options",
    "print_json",
    "print_line",
    "print_pairs",
    "print_table",
    "print_wrapped",
    "run_command",
]
