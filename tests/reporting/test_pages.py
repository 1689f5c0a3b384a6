"""The pages: what they hold, that nothing in a file can write into them, and that every atlas has a report."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import chanfmt
from chanfmt.base.errors import AtlasError
from chanfmt.cli.main import main
from chanfmt.format.writer import write_atlas
from chanfmt.reporting.make import make_report
from tests.support.factory import moe_atlas, random_atlas, random_content
from tests.support.repeated import repeated

CONFORMANCE = sorted((Path(__file__).parents[2] / "spec" / "conformance" / "valid").glob("*.h5"))
ALIKE = ("inputs", "interleaved", "merged", "names-no-tokens-stored", "newer-minor", "no-file-digest", "other-definition",
         "relabelled", "shared", "special-tokens", "tie", "unknown-name", "used-twice", "widths")  # fmt: skip
"""Conformance files whose reports have the sections and the gaps of other files' reports."""
SECTIONS = {"concentration", "factors", "controls", "halo", "reading", "stability"}


class Page(HTMLParser):
    """Tags that are open, and every source and link."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "img":
            assert dict(attrs)["alt"]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = random_atlas(tmp_path / "a.h5", layers=6, channels=200), tmp_path / "r"
    assert main(["report", str(source), "-o", str(target)]) == 0
    assert "The top 1% of the channels" in capsys.readouterr().out
    numbers = json.loads((target / "report.json").read_text())
    assert set(numbers["sections"]) == SECTIONS
    assert not any(section["missing"] for section in numbers["sections"].values())
    figures = sorted(path.stem for path in (target / "figures").glob("*.png"))
    assert figures == sorted(path.stem for path in (target / "figures").glob("*.svg"))
    for path in (target / "figures").glob("*.svg"):
        ElementTree.parse(path)
    page = Page((target / "report.html").read_text())
    assert page.open == []
    sources = [source for source in page.sources if not source.startswith("#")]
    assert [source.partition(";")[0] for source in sources] == ["data:image/png", *["data:image/svg+xml"] * len(figures)]
    markdown = (target / "report.md").read_text()
    captions = [line for line in markdown.splitlines() if line.startswith("_") and line.endswith("_")]
    assert len(captions) == len(figures)
    assert all("Data: data/" in line for line in captions)
    for name in figures:
        assert f"](figures/{name}.png)" in markdown
    for path in (target / "data").glob("*.csv"):
        assert f"data/{path.name}" in markdown
        with path.open() as stream:
            rows = list(csv.reader(stream))
        assert len({len(row) for row in rows}) == 1
        assert len(rows) > 1
    share = numbers["sections"]["concentration"]["numbers"]["top_share_median"]
    with (target / "data" / "concentration.csv").open() as stream:
        assert share == pytest.approx(np.median([float(row["top_share"]) for row in csv.DictReader(stream)]))


def test_the_same_atlas_gives_the_same_bytes(tmp_path: Path) -> None:
    source = random_atlas(tmp_path / "a.h5")
    for name in ("r", "s"):
        assert main(["report", str(source), "-o", str(tmp_path / name)]) == 0
    for path in (tmp_path / "r").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "s" / path.relative_to(tmp_path / "r")).read_bytes(), path


@pytest.mark.parametrize("name", [*sorted({path.stem for path in CONFORMANCE} - set(ALIKE)), *repeated(*ALIKE)])
def test_every_conformance_file_has_a_report_or_a_reason(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [path] = (path for path in CONFORMANCE if path.stem == name)
    code = main(["report", str(path), "-o", str(tmp_path / "r")])
    written = capsys.readouterr()
    assert "Traceback" not in written.err
    if code:
        assert code == 2
        assert "holds no measured LP" in written.err
        assert path.stem == "partial"
        assert not (tmp_path / "r").exists()
        return
    numbers = json.loads((tmp_path / "r" / "report.json").read_text())
    # Measured effects have a section only where the file has such columns.
    assert set(numbers["sections"]) == SECTIONS | ({"measured"} if path.stem == "columns" else set())
    for section in numbers["sections"].values():
        assert section["numbers"] or section["missing"]
    assert Page((tmp_path / "r" / "report.html").read_text()).open == []
    # Sentences leave out unknown numbers.
    assert not re.search(r"\bnan\b|: ;|: \.", (tmp_path / "r" / "report.md").read_text() + written.out)


@pytest.mark.parametrize(
    ("name", "section", "word"),
    [
        ("no-redundancy", "halo", "redundancy"),
        ("stripped", "stability", "splits"),
    ],
)
def test_what_is_missing_is_said(name: str, section: str, word: str, tmp_path: Path) -> None:
    path = next(path for path in CONFORMANCE if path.stem == name)
    assert main(["report", str(path), "-o", str(tmp_path / "r")]) == 0
    [missing] = json.loads((tmp_path / "r" / "report.json").read_text())["sections"][section]["missing"]
    assert word in missing
    assert missing in (tmp_path / "r" / "report.md").read_text()


def test_narrow_ffns_are_not_judged_by_percents_they_do_not_have(tmp_path: Path) -> None:
    with chanfmt.open(random_atlas(tmp_path / "a.h5", layers=6, channels=24)) as atlas:
        lp = atlas.stacks["decoder"]["lp"].astype(np.float64)
        section = make_report(atlas).sections[0]
    times = np.median(lp.max(axis=1) / lp.mean(axis=1))
    assert section.numbers["top_over_even_median"] == pytest.approx(times)
    verdicts = [claim.verdict for claim in section.claims]
    assert (verdicts[0], verdicts[2]) == ("not comparable", "not comparable")
    assert "top 4.2% of the channels" in section.text[0]


def test_labels_and_redundancy_of_different_cores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, wide = random_atlas(tmp_path / "a.h5", layers=4, channels=200), tmp_path / "wide.h5"
    assert main(["label", str(source), "--rho", "0.05", "-o", str(wide)]) == 0
    capsys.readouterr()
    assert main(["report", str(wide), "-o", str(tmp_path / "r")]) == 0
    assert "still refer to the top 0.01" in capsys.readouterr().err


def test_experts_and_those_that_no_token_reached(tmp_path: Path) -> None:
    with chanfmt.open(moe_atlas(tmp_path / "a.h5")) as atlas:
        report = make_report(atlas)
    assert any("no calibration token reached" in note for note in report.notes)
    table = report.sections[0].tables[0].columns
    assert set(table["expert"]) > {-1, 0}


def test_names_in_the_file_stay_text(tmp_path: Path) -> None:
    content = random_content()
    model = dataclasses.replace(content.model, id="<script>alert(1)</script>|[x](javascript:1)")
    path = tmp_path / "a.h5"
    write_atlas(dataclasses.replace(content, model=model), path)
    assert main(["report", str(path), "-o", str(tmp_path / "r")]) == 0
    html = (tmp_path / "r" / "report.html").read_text()
    assert html.count("<script") == 2, "the page's own data and script"
    assert "&lt;script&gt;" in html
    assert "<script" not in (tmp_path / "r" / "report.md").read_text()


def test_outputs_are_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = random_atlas(tmp_path / "a.h5")
    target = tmp_path / "r"
    target.mkdir()
    (target / "thesis.tex").write_text("mine")
    assert main(["report", str(source), "-o", str(target)]) == 2
    assert main(["report", str(source), "-o", str(target), "--overwrite"]) == 2
    assert "something other than a report" in capsys.readouterr().err
    assert (target / "thesis.tex").read_text() == "mine"
    shutil.rmtree(target)
    assert main(["report", str(source), "-o", str(target)]) == 0
    assert main(["report", str(source), "-o", str(target)]) == 2
    capsys.readouterr()
    assert main(["report", str(source), "-o", str(target), "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((target / "report.json").read_text())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "r"]


def test_an_atlas_without_lp_is_refused(tmp_path: Path) -> None:
    content = random_content()
    content.stacks[0].variables["lp"][:] = np.nan
    write_atlas(content, tmp_path / "a.h5")
    with chanfmt.open(tmp_path / "a.h5") as atlas, pytest.raises(AtlasError, match="no measured LP"):
        make_report(atlas)


def test_every_panel_is_drawn_into_the_axes_of_the_caller(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    with chanfmt.open(random_atlas(tmp_path / "a.h5")) as atlas:
        report = make_report(atlas)
    plots = [plot for section in report.sections for plot in section.plots]
    assert plots
    for plot in plots:
        figure = Figure()
        for axes, draw in zip(figure.subplots(2, len(plot.draw), squeeze=False)[1], plot.draw, strict=True):
            draw(axes)
            assert axes.has_data(), plot.name
            assert not figure.legends
        assert not any(axes.has_data() for axes in figure.axes[: len(plot.draw)])
