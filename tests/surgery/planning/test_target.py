"""Targets in size: how they are written, and the sparsity whose result is at or just below them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import chanfmt
import surgery
from chanfmt.base.errors import AtlasError, UsageError
from chanfmt.format.reader import Atlas
from surgery.cli.main import main
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from surgery.planning.target import parse_target, parse_targets
from tests.support.factory import random_atlas

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture
def atlas(tiny_atlas: Any) -> Iterator[Atlas]:
    with chanfmt.open(tiny_atlas("llama")) as opened:
        yield opened


@pytest.mark.parametrize(
    ("text", "parameters"),
    [
        ("75%", 750_000),
        ("12.5 %", 125_000),
        ("29%", 290_000),
        ("6B", 6_000_000_000),
        ("100M", 100_000_000),
        ("1.5k", 1_500),
        ("12GB", 6_000_000_000),
        ("300 MB", 150_000_000),
        ("1MiB", 2**19),
        ("3kb", 1_500),
    ],
)
def test_a_target_is_a_number_of_parameters(text: str, parameters: int) -> None:
    assert parse_target(text).parameters(1_000_000, 2) == parameters


@pytest.mark.parametrize(
    "text", ["", "75", "0.75", "-5%", "0%", "100%", "130%", "6G", "6 billion", "GB", "0B", "1e3M", "nan%", "12GBs"]
)
def test_anything_else_is_not_a_target(text: str) -> None:
    with pytest.raises(UsageError, match="--to") as error:
        parse_target(text)
    assert error.value.hint


def test_the_hint_is_what_was_meant() -> None:
    for text, meant in (("0.75", "75%"), ("75", "75%")):
        with pytest.raises(UsageError) as error:
            parse_target(text)
        assert error.value.hint is not None
        assert meant in error.value.hint


def test_several_targets() -> None:
    assert [target.text for target in parse_targets("90%, 75%,90%")] == ["90%", "75%"]
    with pytest.raises(UsageError, match="names no size"):
        parse_targets(" , ")


def sizes(atlas: Atlas, **options: Any) -> list[int]:
    """What every sparsity that is worth a try gives, by making all the plans."""
    found = []
    for sparsity in np.arange(0.02, 1, 0.01):
        try:
            found.append(make_plan(atlas, PlanOptions(float(sparsity), **options)).parameters_after)
        except UsageError:
            continue
    return [size for size in found if size is not None]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"multiple_of": 8},
        {"multiple_of": 1, "method": "activation"},
        {"multiple_of": 8, "allocation": "global", "method": "wanda"},
        {"multiple_of": 4, "protect": ("top:lp=20%",)},
    ],
    ids=str,
)
def test_no_other_sparsity_comes_nearer_from_below(atlas: Atlas, options: dict[str, Any]) -> None:
    reachable = sizes(atlas, **options)
    before = atlas.model.parameters
    tried = 0
    for percent in range(30, 100, 3):
        wanted = before * percent // 100
        below = [size for size in reachable if size <= wanted]
        if not below:
            continue
        plan = make_plan(atlas, PlanOptions(to=f"{percent}%", **options))
        assert plan.parameters_after is not None
        assert max(below) <= plan.parameters_after <= wanted
        assert plan.sized is not None
        assert (plan.sized.after, plan.sized.sparsity) == (plan.parameters_after, plan.sparsity)
        again = make_plan(atlas, PlanOptions(plan.sparsity, **options))
        assert [block.kept.tolist() for block in again.blocks] == [block.kept.tolist() for block in plan.blocks]
        tried += 1
    assert tried > 3


def test_an_unreachable_target_gives_the_smallest_size_which_is_reachable(atlas: Atlas) -> None:
    for target, kind in (("10%", "%"), ("9K", "K"), ("20KB", "KB")):
        with pytest.raises(UsageError, match="smallest result") as error:
            make_plan(atlas, PlanOptions(to=target))
        hint = error.value.hint or ""
        smallest = hint.removeprefix("use --to ").split(",")[0]
        assert smallest.endswith(kind)
        assert make_plan(atlas, PlanOptions(to=smallest)).parameters_after == min(sizes(atlas))


def test_a_target_that_removes_nothing_is_refused(atlas: Atlas) -> None:
    with pytest.raises(UsageError, match="removes nothing"):
        make_plan(atlas, PlanOptions(to="1B"))


def test_sparsity_and_size_exclude_each_other(atlas: Atlas) -> None:
    for options in (PlanOptions(0.5, to="75%"), PlanOptions()):
        with pytest.raises(UsageError, match="how much to remove"):
            make_plan(atlas, options)
    with pytest.raises(UsageError, match="invert"):
        make_plan(atlas, PlanOptions(to="75%", invert=True))
    assert surgery.plan(atlas).sparsity == 0.5
    assert surgery.plan(atlas, to="85%").parameters_after == make_plan(atlas, PlanOptions(to="85%")).parameters_after


def test_bytes_are_those_of_the_dtype(atlas: Atlas) -> None:
    full = make_plan(atlas, PlanOptions(to="160KB"))
    half = make_plan(atlas, PlanOptions(to="80KB", dtype="bfloat16"))
    assert full.parameters_after == half.parameters_after
    assert full.parameters_after is not None
    assert full.parameters_after * 4 <= 160_000
    with pytest.raises(UsageError, match="unknown dtype"):
        make_plan(atlas, PlanOptions(to="80KB", dtype="float7"))


def test_plan_dry_run_and_prune_say_the_same(tiny_atlas: Any, tiny_checkpoint: Any, tmp_path: Path, capsys: Any) -> None:
    path, model = str(tiny_atlas("llama")), str(tiny_checkpoint("llama"))
    said = []
    for arguments in (
        ["plan", path, "--to", "88KB", "--dtype", "bfloat16", "--multiple-of", "8"],
        ["prune", path, "--to", "88KB", "--dtype", "bfloat16", "--multiple-of", "8", "--dry-run"],
        [
            "prune",
            path,
            "--model",
            model,
            "--to",
            "88KB",
            "--dtype",
            "bfloat16",
            "--multiple-of",
            "8",
            "-o",
            str(tmp_path / "cut"),
        ],
    ):
        assert main([*arguments, "--json"]) == 0
        printed = capsys.readouterr()
        report = json.loads(printed.out)
        said.append(
            (
                [line for line in printed.err.splitlines() if line.startswith("--to 88KB comes to a sparsity of")],
                report["sparsity"],
                report["parameters"],
                [layer["kept"] for layer in report["layers"]],
            )
        )
    assert said[0] == said[1] == said[2]
    assert len(said[0][0]) == 1
    stored = json.loads((tmp_path / "cut" / "surgery.json").read_text())
    assert stored["bytes"]["after"] <= 88_000
    assert stored["bytes"]["after"] == 2 * stored["parameters"]["after"]


def test_a_command_without_an_amount_says_how_to_give_one(tiny_atlas: Any, capsys: Any) -> None:
    assert main(["plan", str(tiny_atlas("llama"))]) == 2
    assert "--to 75% (a size)" in capsys.readouterr().err


def test_an_atlas_that_does_not_know_sizes_is_refused(tmp_path: Path) -> None:
    with (
        Atlas.open(random_atlas(tmp_path / "a.h5")) as atlas,
        pytest.raises(AtlasError, match="how many parameters a channel has"),
    ):
        make_plan(atlas, PlanOptions(to="75%"))
