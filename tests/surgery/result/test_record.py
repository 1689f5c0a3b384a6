"""What `surgery plan` prints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from chanfmt.format.reader import Atlas
from surgery.cli.main import main
from surgery.planning.options import PlanOptions
from surgery.planning.plan import layer_rows, make_plan
from surgery.result.names import default_name
from surgery.result.record import plan_json, summary_rows
from tests.support.factory import moe_atlas, random_atlas

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return Atlas.open(random_atlas(tmp_path_factory.mktemp("atlas") / "a.h5", layers=3, channels=100))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return Atlas.open(moe_atlas(tmp_path_factory.mktemp("atlas") / "e.h5"))


def summary(atlas: Atlas, *arguments: Any, **options: Any) -> dict[str, str]:
    return dict(summary_rows(make_plan(atlas, PlanOptions(*arguments, **options))))


def test_layers_of_experts_take_one_row(experts: Atlas) -> None:
    headings, rows = layer_rows(make_plan(experts, PlanOptions(0.5)))
    assert headings == ["layer", "module", "channels", "kept", "supernodes removed", "LP kept"]
    assert [row[:5] for row in rows] == [
        ["0", "model.layers.0.mlp", "96", "64", "0 of 1"],
        *(
            [str(layer), f"model.layers.{layer}.mlp.experts", "4 x 24", "4 x 12", f"0 of {count}"]
            for layer, count in ((1, 3), (2, 4), (3, 4))
        ),
    ]


def test_widths_are_ranges(atlas: Atlas, experts: Atlas) -> None:
    assert summary(atlas, 0.5)["width"] == "100 to 64 in 3 FFNs"
    assert summary(atlas, 0.5, layers="1")["width"] == "100 to 64 in 1 FFN, 100 as before in 2 FFNs"
    assert summary(experts, 0.5)["width"] == "96 to 64 in 1 FFN; 24 to 12 in 3 FFNs (each of its 4 experts keeps the same number)"
    plan = make_plan(atlas, PlanOptions(0.5, allocation="global", multiple_of=1))
    widths = [block.n_kept for block in plan.blocks]
    assert dict(summary_rows(plan))["width"] == f"100 to between {min(widths)} and {max(widths)} in 3 FFNs"


def test_a_protection_that_changes_nothing_is_said_so(atlas: Atlas) -> None:
    rows = summary(atlas, 0.5, protect=("supernodes@0", "none", "1:0-9"), unprotect=("1:3",))
    assert rows["protected"].startswith("supernodes, supernodes@0, 1:0-9 (")
    assert rows["- supernodes"] == "3 channels; no effect: scar-prot keeps all of them anyway"
    assert rows["- supernodes@0"] == "1 channel, 0 of which are new; no effect: all of them are already protected or unprotected"
    assert "other channels go in their place" in rows["- 1:0-9"]
    assert rows["unprotected"] == "1:3 (1 channel no longer protected)"
    assert summary(atlas, 0.5, "random")["protected"] == "nothing (0 channels)"


def test_shares_asked_and_reached(atlas: Atlas) -> None:
    assert summary(atlas, 0.5)["sparsity"] == "0.5 asked, 0.36 reached"
    assert summary(atlas, 0.5, multiple_of=1)["sparsity"] == "0.5 asked, 0.5 reached"
    assert (
        summary(atlas, 0.3, layers="0", stack=("decoder",), multiple_of=1)["sparsity"]
        == "0.3 asked, 0.3 reached in layers 0 of decoder; 0.1 of the whole model"
    )
    assert "inverted" in summary(atlas, 0.3, invert=True)["allocation"]
    assert summary(atlas, 0.3, invert=True, multiple_of=1)["sparsity"] == "0.3 asked, 0.7 reached"
    assert "at most 0.6 of each" in summary(atlas, 0.3, allocation="global", max_layer_sparsity=0.6)["allocation"]


def test_json_holds_what_each_selector_did(atlas: Atlas, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "plan",
        str(atlas.path),
        "--sparsity",
        "0.5",
        "--method",
        "magnitude",
        "--protect",
        "halo",
        "--protect",
        "1:0-9",
        "--unprotect",
        "1:3",
        "--allocation",
        "global",
        "--layers",
        "0-1",
        "--stack",
        "decoder",
        "--json",
    ]
    assert main(arguments) == 0
    value = json.loads(capsys.readouterr().out)
    plan = make_plan(
        atlas,
        PlanOptions(
            0.5, "magnitude", protect=("halo", "1:0-9"), unprotect=("1:3",), allocation="global", layers="0-1", stack=("decoder",)
        ),
    )
    assert set(value.pop("expected")) == {"nearest", "outside"}
    assert value == json.loads(json.dumps(plan_json(plan)))
    first = value["protection"][0]
    assert first["selector"] == "halo"
    assert first["cost"] == plan.protection[0].cost > 0
    assert first["cost_share"] == pytest.approx(first["cost"] / plan.channels_kept)
    assert value["scope"] == {"layers": "0-1", "stack": ["decoder"], "channels": 200}
    # 64 of 100 channels stay: the multiple of 32 nearest to a half.
    assert value["sparsity"]["reached_in_scope"] == pytest.approx(0.36)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "random-scar-prot-50"),
        ({"allocation": "global"}, "random-scar-prot-50-global"),
        ({"invert": True}, "random-scar-prot-50-inverted"),
        ({"layers": "0-1"}, "random-scar-prot-50-partial"),
        (
            {"allocation": "global", "stack": ("decoder",), "invert": True, "layers": "1-2"},
            "random-scar-prot-50-global-partial-inverted",
        ),
    ],
)
def test_default_names_say_what_was_asked(atlas: Atlas, options: dict[str, Any], name: str) -> None:
    assert default_name(make_plan(atlas, PlanOptions(0.5, **options))) == name


def test_bad_selectors_exit_with_two(atlas: Atlas, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("layer,channel\n1,3\n1,100\n")
    assert main(["plan", str(atlas.path), "--sparsity", "0.5", "--protect", str(tmp_path / "p.csv")]) == 2
    assert "p.csv, line 3: there is no channel 100" in capsys.readouterr().err
