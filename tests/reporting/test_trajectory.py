"""Trajectories: their numbers against a loop, the axis from names, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import json
from contextlib import ExitStack
from typing import TYPE_CHECKING

import numpy as np
import pytest

import chanfmt
from chanfmt.algebra.compare import compare
from chanfmt.cli.main import main
from chanfmt.format.writer import write_atlas
from chanfmt.reporting.trajectory import make_trajectory, steps_of
from tests.support.factory import moe_atlas, random_atlas, random_content

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def series(tmp_path: Path) -> list[Path]:
    paths = []
    for step in (8, 64, 512):
        content = random_content(channels=200, seed=step)
        paths.append(tmp_path / f"checkpoint-{step}.h5")
        write_atlas(dataclasses.replace(content, model=dataclasses.replace(content.model, fingerprint=f"{step:064x}")), paths[-1])
    return paths


def test_numbers_against_a_loop(series: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trajectory", *map(str, series), "-o", str(tmp_path / "t"), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)["sections"]
    with ExitStack() as stack:
        atlases = [stack.enter_context(chanfmt.open(path)) for path in series]
        lp = [atlas.stacks["decoder"]["lp"].astype(float) for atlas in atlases]
        shares = [np.median([np.sort(row)[-2:].sum() / row.sum() for row in rows]) for rows in lp]
        overlaps = [np.median([row.supernode_jaccard for row in compare(atlas, atlases[-1])]) for atlas in atlases]
    found = numbers["concentration"]["numbers"]
    ends = [found["first_top_share_median"], found["last_top_share_median"]]
    assert ends == pytest.approx([shares[0], shares[-1]])
    assert numbers["overlap"]["numbers"]["first_with_last_jaccard_median"] == pytest.approx(overlaps[0])
    rises = [
        np.sort(last)[-2:].sum() / last.sum() - np.sort(first)[-2:].sum() / first.sum()
        for first, last in zip(lp[0], lp[-1], strict=True)
    ]
    assert found["rise_median"] == pytest.approx(np.median(rises))
    [claim] = numbers["concentration"]["claims"]
    sign = np.sign([found["rise_low"], found["rise_high"]]).sum()
    assert claim["verdict"] == {2: "agrees", -2: "differs", 0: "undecided"}[sign]
    with (tmp_path / "t" / "data" / "concentration.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [row["step"] for row in rows] == ["8", "64", "512"]
    assert [float(row["top_share_median"]) for row in rows] == pytest.approx(shares)
    with (tmp_path / "t" / "data" / "overlap.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [float(row["last_supernode_jaccard_median"]) for row in rows] == pytest.approx(overlaps)
    assert float(rows[-1]["last_correlation_median"]) == pytest.approx(1)
    for name in ("concentration", "overlap"):
        assert (tmp_path / "t" / "figures" / f"{name}.svg").is_file()


def test_the_axis_comes_from_names_that_ascend(series: list[Path], tmp_path: Path) -> None:
    with ExitStack() as stack:
        atlases = [stack.enter_context(chanfmt.open(path)) for path in series]
        assert steps_of(atlases) == [8, 64, 512]
        assert steps_of(atlases[::-1]) is None
        assert steps_of([*atlases, stack.enter_context(chanfmt.open(random_atlas(tmp_path / "final.h5")))]) is None
        backwards = make_trajectory(atlases[::-1], "cba")
    assert backwards.sections[0].tables[0].columns["step"].tolist() == [1, 2, 3]


def test_what_differs_is_said(series: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trajectory", str(series[0]), *map(str, series), "-o", str(tmp_path / "t")]) == 0
    said = capsys.readouterr()
    assert "not measured on the same tokens" in said.err
    assert "the same weights" in said.err
    assert not said.out.startswith("not comparable")


def test_the_same_weights_are_no_trajectory(series: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trajectory", str(series[0]), str(series[0]), "-o", str(tmp_path / "t")]) == 0
    assert capsys.readouterr().out.startswith("not comparable")


def test_files_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    paths = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        paths.append(random_atlas(tmp_path / place / "model.h5", seed=len(paths)))
    assert main(["trajectory", *map(str, paths), "-o", str(tmp_path / "t")]) == 0
    with (tmp_path / "t" / "data" / "concentration.csv").open() as stream:
        assert [row["checkpoint"] for row in csv.DictReader(stream)] == ["a/model", "b/model"]


def test_steps_are_of_one_kind_of_name(tmp_path: Path) -> None:
    with ExitStack() as stack:

        def atlas(name: str, model: str, revision: str) -> chanfmt.Atlas:
            content = random_content()
            write_atlas(
                dataclasses.replace(content, model=dataclasses.replace(content.model, id=model, revision=revision)),
                tmp_path / name,
            )
            return stack.enter_context(chanfmt.open(tmp_path / name))

        series = [atlas(f"step{step}.h5", "my/Step-3-mini", "main") for step in (2, 4)]
        assert steps_of(series) == [2, 4]
        series = [atlas(f"{place}.h5", f"out/checkpoint-{step}", "") for place, step in enumerate((5, 6))]
        assert steps_of(series) == [5, 6]
        series = [atlas(f"step{place}.h5", "a/b", revision) for place, revision in enumerate(("stage1-step9", "stage2-step3"))]
        assert steps_of(series) == [0, 1]


def test_experts(tmp_path: Path) -> None:
    paths = [moe_atlas(tmp_path / f"step{step}.h5", seed=step) for step in (1, 2)]
    assert main(["trajectory", *map(str, paths), "-o", str(tmp_path / "t")]) == 0


@pytest.mark.parametrize("case", ["one", "other", "missing"])
def test_refusals(case: str, series: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = {"one": [], "other": [random_atlas(tmp_path / "o.h5", channels=64)], "missing": [tmp_path / "no.h5"]}[case]
    reason = {"one": "two atlases or more", "other": "has 200 channels", "missing": "does not exist"}[case]
    assert main(["trajectory", str(series[0]), *map(str, other), "-o", str(tmp_path / "t")]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
