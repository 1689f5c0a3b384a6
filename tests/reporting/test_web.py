"""The page of a report as its reader meets it: verdicts first, a living part by keys and mouse, nothing that a file can run."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest

import chanfmt
from chanfmt.cli.main import main
from chanfmt.format.writer import write_atlas
from chanfmt.reporting.explore import BINS, MOST_UNITS, SPREAD, TOP, explored
from chanfmt.reporting.make import make_report
from chanfmt.reporting.units import find_units
from tests.support.chromium import CHROMIUM, chromium
from tests.support.factory import moe_atlas, random_atlas, random_content

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.chromium import Browser


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_atlas(tmp_path_factory.mktemp("atlas") / "a.h5", layers=6, channels=300)


@pytest.fixture(scope="module")
def page(atlas: Path) -> Path:
    assert main(["report", str(atlas), "-o", str(atlas.parent / "r"), "--quiet"]) == 0
    return atlas.parent / "r" / "report.html"


def test_the_first_line_counts_the_verdicts(atlas: Path, page: Path) -> None:
    with chanfmt.open(atlas) as opened:
        verdicts = [claim.verdict for section in make_report(opened).sections for claim in section.claims]
    text = page.read_text()
    chips = re.findall(r'<span class="chip ([a-z-]+)">(\d+) ', text[: text.index("<nav")])
    assert {name.replace("-", " "): int(count) for name, count in chips} == {
        verdict: verdicts.count(verdict) for verdict in set(verdicts)
    }
    line = (page.parent / "report.md").read_text().splitlines()[2]
    assert line.startswith(f"Of {len(verdicts)} claims of the paper: ")
    assert sum(map(int, re.findall(r"\d+", line)[1:])) == len(verdicts)


def test_the_contents_lead_to_every_section(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r'<a href="#([a-z]+)"', text)
    assert len(links) == 8
    assert all(text.count(f'id="{link}"') == 1 for link in links)


def test_what_the_page_holds_of_the_channels(atlas: Path, page: Path) -> None:
    text = page.read_text()
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text)[1])
    assert [unit["name"] for unit in data["units"]] == [f"layer {layer}" for layer in range(6)]
    with chanfmt.open(atlas) as opened:
        for layer, unit in enumerate(data["units"]):
            lp = opened.stacks["decoder"]["lp"][layer].astype(float)
            order = np.argsort(-lp, kind="stable")
            assert unit["channels"][:TOP] == order[:TOP].tolist()
            assert unit["channels"] == order[np.array(unit["ranks"]) - 1].tolist()
            assert unit["ranks"][-1] == 300
            assert len(unit["channels"]) <= TOP + SPREAD
            assert unit["values"]["lp"] == pytest.approx(lp[unit["channels"]].tolist(), rel=1e-3)
            # The bins of a strip cover the mass once.
            edges = 301 ** np.linspace(0, 1, BINS + 1) - 1
            assert np.array(unit["shares"]) @ np.diff(edges) == pytest.approx(1, rel=1e-3)


def test_many_experts_are_shown_evenly_spaced(tmp_path: Path) -> None:
    with chanfmt.open(moe_atlas(tmp_path / "a.h5")) as atlas:
        units, _ = find_units(atlas)
        many = units * (2 * MOST_UNITS // len(units) + 1)
        shown = explored(many, several_stacks=True)
    assert len(shown) == MOST_UNITS
    assert "expert" in shown[1].name


def test_no_text_of_a_file_runs(tmp_path: Path) -> None:
    content = random_content()
    model = dataclasses.replace(content.model, id="</script><script>alert(1)</script>")
    write_atlas(dataclasses.replace(content, model=model), tmp_path / "a.h5")
    assert main(["report", str(tmp_path / "a.h5"), "-o", str(tmp_path / "r"), "--quiet"]) == 0
    text = (tmp_path / "r" / "report.html").read_text()
    # One script with data, and the one whose hash the policy names.
    assert len(re.findall("<script", text)) == 2
    assert "script-src 'sha256-" in text
    assert "unsafe-inline'; script-src" in text
    assert "alert(1)</script>" not in text


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_the_living_part_by_keys(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.errors == []
    assert browser.value("document.getElementById('living').hidden") is False
    browser.value("document.getElementById('map').focus()")
    browser.press("ArrowDown", "ArrowDown", "ArrowRight", "Enter")
    assert browser.value("document.getElementById('readout').textContent").startswith("layer 2, rank 1: ")
    assert browser.value("document.getElementById('layer').textContent").startswith("layer 2: ")
    browser.value("document.getElementById('channels').focus()")
    browser.press("ArrowDown", "ArrowDown")
    assert browser.value("document.querySelector('#channels tr.chosen td').textContent") == "3"
    assert "rank 3 of 300" in browser.value("document.querySelector('#card strong').textContent")
    assert browser.value("document.querySelectorAll('#scatter circle.chosen').length") == 1


def test_the_living_part_by_mouse(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.click("#map", across=0.999, down=4.5 / 6)
    assert browser.value("document.getElementById('layer').textContent").startswith("layer 4: ")
    assert re.fullmatch(
        r"layer 4, ranks? .*300: .*% of its LP per channel", browser.value("document.getElementById('readout').textContent")
    )
    browser.click("#channels tr:nth-child(3)")
    assert "rank 2 of 300" in browser.value("document.querySelector('#card strong').textContent")
    before = browser.value("document.querySelector('#scatter circle').getAttribute('cx')")
    browser.value(
        "(() => { const x = document.getElementById('x'); x.value = 'write_norm'; x.dispatchEvent(new Event('change')); })()"
    )
    assert browser.value("document.querySelector('#scatter circle').getAttribute('cx')") != before
    browser.click("#scatter circle:nth-of-type(1)")
    assert browser.value("document.querySelectorAll('#scatter circle.chosen').length") == 1
    assert browser.errors == []


@pytest.mark.parametrize("width", [360, 1100])
def test_nothing_is_wider_than_the_screen(browser: Browser, page: Path, width: int) -> None:
    browser.open(page, width=width)
    assert browser.value("document.documentElement.scrollWidth") <= width
