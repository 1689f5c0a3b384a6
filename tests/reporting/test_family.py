"""A report of several atlases: the verdicts are those of each atlas, and the figures have a line for each."""

from __future__ import annotations

import csv
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


def test_the_table_has_the_verdict_of_every_atlas(paths: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *map(str, paths), "-o", str(tmp_path / "f"), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    text = (tmp_path / "f" / "report.html").read_text()
    assert list(numbers["atlases"]) == ["one", "two", "<b>three"]
    assert "<b>three" not in text
    for path, member in zip(paths, numbers["atlases"].values(), strict=True):
        with chanfmt.open(path) as atlas:
            own = make_report(atlas)
        expected = {claim.statement: claim.verdict for section in own.sections for claim in section.claims}
        found = {claim["statement"]: claim["verdict"] for section in member["sections"].values() for claim in section["claims"]}
        assert found == expected
    table = re.search(r'<table class="claims family">(.*?)</table>', text, re.DOTALL)[1]
    for row in table.splitlines()[1:]:
        statement = re.search(r"<strong>(.*?)</strong>", row)
        if statement is None:
            continue
        verdicts = re.findall(r'class="chip [a-z-]+">([a-z ]+)<', row)
        claims = [
            claim["verdict"]
            for member in numbers["atlases"].values()
            for section in member["sections"].values()
            for claim in section["claims"]
            if claim["statement"] == statement[1]
        ]
        assert verdicts == claims
    with (tmp_path / "f" / "data" / "concentration.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert {row["atlas"] for row in rows} == {"one", "two", "<b>three"}
    assert len(rows) == 4 + 4 + 6
    assert "overlap" not in numbers["sections"]
    assert text.count("<summary>") >= 3


def test_atlases_of_one_architecture_are_compared(paths: list[Path], tmp_path: Path) -> None:
    report = chanfmt.report({"a": paths[0], "b": paths[1]}, tmp_path / "pair.html")
    assert [path.name for path in tmp_path.iterdir()] == ["pair.html"]
    rows = chanfmt.compare(*paths[:2])
    assert report.section("overlap").numbers["a, b: supernode_jaccard_median"] == np.median(
        [row.supernode_jaccard for row in rows]
    )
    # The page stands alone, so its captions name no files.
    assert "data/" not in (tmp_path / "pair.html").read_text()
    with pytest.raises(chanfmt.UsageError, match="exists"):
        chanfmt.report(paths[:2], tmp_path / "pair.html")
    assert chanfmt.report(paths[:2], tmp_path / "pair.html", overwrite=True).members.keys() == {"one", "two"}


def test_the_terminal_lists_every_verdict(paths: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *map(str, paths[:2]), "-o", str(tmp_path / "f.html")]) == 0
    printed = capsys.readouterr()
    assert len(re.findall(r"^  (?:agrees|differs|undecided|not comparable) +(?:one|two): ", printed.out, re.MULTILINE)) == 18
    assert printed.err.endswith(f"wrote {tmp_path / 'f.html'}\n")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_nothing_is_wider_than_the_screen(paths: list[Path], tmp_path: Path) -> None:
    chanfmt.report(paths, tmp_path / "f.html")
    with chromium(tmp_path / "profile") as browser:
        for width in (360, 1100):
            browser.open(tmp_path / "f.html", width=width)
            assert browser.value("document.documentElement.scrollWidth") <= width
        assert browser.errors == []
