"""A report of several atlases: the verdicts are those of each atlas, and the figures have a line for each."""

from __future__ import annotations

import csv
import html
import json
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest

import chanfmt
from chanfmt.cli.main import main
from chanfmt.reporting.make import make_report
from tests.support.chromium import CHROMIUM, chromium
from tests.support.factory import random_atlas

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("family")
    return [
        random_atlas(folder / "one.h5", channels=200),
        random_atlas(folder / "two.h5", channels=200, seed=1),
        random_atlas(folder / "<b>three.h5", layers=6, channels=120, seed=2),
    ]


@pytest.fixture(scope="module")
def family(paths: list[Path]) -> Path:
    output = paths[0].parent / "f"
    assert main(["report", *map(str, paths), "-o", str(output), "--quiet"]) == 0
    return output


def test_the_table_has_the_verdict_of_every_atlas(paths: list[Path], family: Path) -> None:
    text, numbers = (family / "report.html").read_text(), json.loads((family / "report.json").read_text())
    assert list(numbers["atlases"]) == ["one", "two", "<b>three"]
    assert "<b>three" not in text
    verdicts = []
    for path, member in zip(paths, numbers["atlases"].values(), strict=True):
        with chanfmt.open(path) as atlas:
            own = make_report(atlas)
        verdicts.append({claim.statement: claim.verdict for section in own.sections for claim in section.claims})
        claims = [claim for section in member["sections"].values() for claim in section["claims"]]
        assert {claim["statement"]: claim["verdict"] for claim in claims} == verdicts[-1]
    table = re.search(r'<table class="claims family">(.*?)</table>', text, re.DOTALL)[1]
    shown = {}
    for row in table.split("<tr>")[2:]:
        statement = html.unescape(re.search(r"<strong>(.*?)</strong>", row)[1])
        shown[statement] = re.findall(r'class="chip [a-z-]+">([a-z ]+)<', row)
    assert shown == {statement: [found[statement] for found in verdicts] for statement in verdicts[0]}
    with (family / "data" / "concentration.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["atlas"] for row in rows] == ["one"] * 4 + ["two"] * 4 + ["<b>three"] * 6
    # The third model has other FFNs.
    assert "overlap" not in numbers["sections"]
    assert re.findall(r"<summary>(.*?)</summary>", text)[-3:] == ["one", "two", "&lt;b&gt;three"]


def test_atlases_of_one_architecture_are_compared(paths: list[Path]) -> None:
    report = chanfmt.report({"a": paths[0], "b": paths[1]})
    rows = chanfmt.compare(*paths[:2])
    assert report.section("overlap").numbers == {
        "a, b: supernode_jaccard_median": np.median([row.supernode_jaccard for row in rows])
    }
    assert report.members.keys() == {"a", "b"}


def test_a_page_alone(paths: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["report", *map(str, paths[:2]), "-o", str(tmp_path / "f.html")]
    assert main(command) == 0
    printed = capsys.readouterr()
    assert len(re.findall(r"^  (?:agrees|differs|undecided|not comparable) +(?:one|two): ", printed.out, re.MULTILINE)) == 18
    assert printed.err.endswith(f"wrote {tmp_path / 'f.html'}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["f.html"]
    # No files lie beside the page, so its captions name none.
    assert "data/" not in (tmp_path / "f.html").read_text()
    assert main(command) == 2


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_nothing_is_wider_than_the_screen(family: Path, tmp_path: Path) -> None:
    with chromium(tmp_path / "profile") as browser:
        for width in (360, 1100):
            browser.open(family / "report.html", width=width)
            assert browser.value("document.documentElement.scrollWidth") <= width
        assert browser.errors == []
