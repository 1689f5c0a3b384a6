"""Every command line in the README, in docs/ and in a --help is understood by its command; every link leads somewhere."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from chanfmt.base.errors import ChanfmtError
from chanfmt.cli.framework import Parser, make_parser
from chanfmt.cli.main import COMMANDS
from surgery.cli import main as surgery
from tui import cli as tui

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def lines_of(page: Path) -> list[str]:
    found = []
    for kind, block in BLOCK.findall(page.read_text(encoding="utf-8")):
        if kind not in ("", "sh", "console"):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            text = re.sub(r"^\$ ", "", line.strip())
            text = re.sub(r"^(?:srun |torchrun .* -m |[A-Z_]+=\S+ )", "", text)
            text = re.sub(r"^chanfmt ", "atlas ", text)
            if text.startswith(("atlas ", "surgery ", "atlas-tui ")):
                found.append(text)
    return found


def understood(line: str) -> None:
    words = shlex.split(line, comments=True)
    cut = next((place for place, word in enumerate(words) if re.fullmatch(r"[|>&;].*|\d?>.*", word)), len(words))
    program, *arguments = [word for word in words[:cut] if word != "..."]
    parser_of(program).parse_args(arguments)


def parser_of(program: str) -> Parser:
    if program == "atlas-tui":
        return tui.make_parser()
    parser, commands = make_parser(program, "")
    for command in COMMANDS if program == "atlas" else surgery.COMMANDS:
        command.add(commands)
    return parser


def leaves(parser: Parser) -> list[Parser]:
    """The parsers of the commands of ``parser``; itself if it has none."""
    groups = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [leaf for group in groups for child in group.choices.values() for leaf in leaves(child)] or [parser]


LEAVES = [leaf for program in ("atlas", "surgery", "atlas-tui") for leaf in leaves(parser_of(program))]


@pytest.mark.parametrize("parser", LEAVES, ids=lambda parser: parser.prog)
def test_every_help_ends_in_examples_that_are_understood(parser: Parser, monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2 <= len(parser.examples) <= 3
    for columns in (80, 50, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        _, _, examples = parser.format_help().partition("\nexamples:\n")
        assert all(len(line) <= columns - 2 for line in examples.splitlines())
        shown = [" ".join(line.split()) for line in examples.replace("\\\n", " ").splitlines()]
        assert shown == list(parser.examples)
    for line in parser.examples:
        assert line.startswith(f"{parser.prog} ")
        understood(line)


def test_help_of_every_command_fits_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for parser in [*LEAVES, parser_of("atlas"), parser_of("surgery")]:
        assert max(map(len, parser.format_help().splitlines())) <= 80, parser.prog


def test_every_option_has_a_help_text() -> None:
    for parser in LEAVES:
        parser.format_help()
        for action in parser._actions:
            assert action.help, f"{parser.prog} {action.dest}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_command_lines_are_understood(page: Path) -> None:
    problems = []
    for line in lines_of(page):
        try:
            understood(line)
        except (ChanfmtError, SystemExit) as error:
            problems.append(f"{line}\n    {error}")
    assert not problems, "\n".join(problems)


def test_there_are_command_lines_to_understand() -> None:
    assert len(lines_of(ROOT / "README.md")) >= 10
    assert sum(len(lines_of(page)) for page in PAGES) > 100
    with pytest.raises((ChanfmtError, SystemExit)):
        understood("atlas build MODEL --no-such-option -o FILE")


@pytest.mark.parametrize("page", [*PAGES, *sorted((ROOT / "spec").glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


def test_the_readme_is_short_and_begins_with_the_commands_that_ci_runs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 140
    first = next(block for _, block in BLOCK.findall(text))
    assert first.splitlines() == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in first.splitlines():
        assert re.search(rf"^{line.split()[1]}:", makefile, re.MULTILINE)


def test_the_numbers_of_the_readme_are_those_of_the_measurement() -> None:
    """The table of the README repeats docs/half.md, and nothing else."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    measured = (ROOT / "docs" / "half.md").read_text(encoding="utf-8")
    rows = [line for line in readme.splitlines() if line.startswith(("| half of the", "| the same", "| dense model"))]
    numbers = [re.findall(r"\b\d+\.\d\d\b", row) for row in rows]
    assert [len(each) for each in numbers] == [2] * 5
    assert all(number in measured for each in numbers for number in each)


def test_the_tour_lists_every_command() -> None:
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    missing = [leaf.prog for leaf in LEAVES if " ".join(leaf.prog.split()[:2]) not in text]
    assert not missing
