"""Every command line in the README and in docs/ is one that the commands understand; every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from chanfmt.base.errors import ChanfmtError
from chanfmt.cli import framework
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
    if program == "atlas-tui":
        tui.make_parser().parse_args(arguments)
        return
    parser, commands = framework.make_parser(program, "")
    for command in COMMANDS if program == "atlas" else surgery.COMMANDS:
        command.add(commands)
    parser.parse_args(arguments)


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
    assert len(lines_of(ROOT / "README.md")) > 20
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
