"""What a cut cost where somebody measured it: the nearest rows, and what nobody measured."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest

from chanfmt.format.reader import Atlas
from surgery.cli.main import main
from surgery.planning.expect import CHANNELS, PARAMETERS, CutAsked, asked_of, expect, measured_text
from surgery.planning.measured import FORMAT, Loss, MeasuredCut, cuts_of, measured_cuts
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from tests.support.factory import moe_atlas, random_atlas

if TYPE_CHECKING:
    from pathlib import Path

SMALL, LARGE = 100_000_000, 1_000_000_000


def cut(share: float, above: float = 1.0, **values: Any) -> MeasuredCut:
    """A measured cut. A third of the parameters of its model is in FFN channels."""
    fields = {
        "model": "Small",
        "weights": "",
        "model_type": "llama",
        "parameters": SMALL,
        "calibration": "a text",
        "calibration_tokens": 1024,
        "method": "scar-prot",
        "allocation": "uniform",
        "recovery": "none",
        "recovery_text": "",
        "recovery_tokens": 0,
        "channels_removed": share,
        "parameters_removed": share / 3,
        "losses": (Loss("novels", "prose", above, above - 0.02, above + 0.03, 3.0, 4096, 4),),
        "seq_len": 1024,
        "seed": 0,
        "date": "2026-11-30",
        "version": "0.1.0",
        "command": "python bench/expect.py",
    }
    return MeasuredCut(**{**fields, **values})


GRID = tuple(
    cut(share, above * share, recovery=recovery, **model)
    for model in ({}, {"model": "Large", "parameters": LARGE})
    for recovery, above in (("none", 4), ("lstsq", 2))
    for share in (0.1, 0.3, 0.5)
)


def asked(share: float = 0.3, **values: Any) -> CutAsked:
    return dataclasses.replace(CutAsked(SMALL, share, CHANNELS, "scar-prot"), **values)


def found(question: CutAsked) -> list[tuple[str, str, float]]:
    return [(item.model, item.recovery, item.channels_removed) for item in expect(question, GRID).nearest]


def test_a_plan_without_a_recovery_gets_the_row_without_and_the_best_one() -> None:
    assert found(asked()) == [("Small", "none", 0.3), ("Small", "lstsq", 0.3)]
    assert expect(asked(), GRID).outside == ()
    assert expect(asked(), GRID).warning == ""


def test_a_recovery_that_is_chosen_gets_its_own_row() -> None:
    assert found(asked(0.33, recovery="lstsq")) == [("Small", "lstsq", 0.3)]
    assert found(asked(0.12, recovery="none")) == [("Small", "none", 0.1)]


def test_between_two_shares_the_larger_one_counts() -> None:
    assert [row[2] for row in found(asked(0.4))] == [0.5, 0.5]


def test_a_share_of_the_parameters_is_compared_with_shares_of_parameters() -> None:
    # 0.17 of the channels would be near 0.1, and 0.17 of the parameters are half of the channels.
    assert [row[2] for row in found(asked(0.17, share_of=PARAMETERS))] == [0.5, 0.5]
    assert expect(asked(0.17, share_of=PARAMETERS), GRID).outside == ()
    assert "20% of the parameters" in expect(asked(0.2, share_of=PARAMETERS), GRID).warning


def test_the_nearest_model_is_nearest_by_the_factor() -> None:
    assert {row[0] for row in found(asked(parameters=2 * SMALL))} == {"Small"}
    # Nearer to the small model by difference, and to the large one by factor.
    assert {row[0] for row in found(asked(parameters=4 * SMALL))} == {"Large"}
    assert expect(asked(parameters=4 * SMALL), GRID).outside == ()
    [outside] = expect(asked(parameters=8 * LARGE), GRID).outside
    assert outside == "the model has 8.00B parameters, and the nearest measured one has 1.00B"
    [outside] = expect(asked(parameters=SMALL // 10), GRID).outside
    assert outside == "the model has 10.0M parameters, and the nearest measured one has 100.0M"


@pytest.mark.parametrize(
    ("question", "said"),
    [
        (asked(0.75), "it removes 75% of the FFN channels, and at most 50% were measured"),
        (asked(method="wanda"), "the method wanda was not measured (scar-prot was)"),
        (asked(allocation="global"), "the allocation global was not measured (uniform was)"),
        (asked(recovery="block"), "the recovery block was not measured for it (none, lstsq were)"),
        (asked(unusual=("routed experts",)), "routed experts were not measured"),
        (asked(unusual=("an inverted plan",)), "an inverted plan was not measured"),
        (asked(parameters=0), "the atlas does not say how large the model is"),
    ],
)
def test_what_nobody_measured_is_said_and_no_number_is_made_up(question: CutAsked, said: str) -> None:
    expectation = expect(question, GRID)
    assert expectation.outside == (said,)
    assert said in expectation.warning
    assert expectation.nearest
    assert set(expectation.nearest) <= set(GRID)


def test_a_rounded_width_is_not_outside() -> None:
    assert expect(asked(0.509), GRID).outside == ()


def test_without_data_there_is_neither_a_row_nor_a_warning() -> None:
    assert expect(asked(), ()).rows == []
    assert expect(asked(), ()).warning == ""


def test_a_row_in_words() -> None:
    both = cut(
        0.3,
        0.31,
        recovery="lstsq",
        losses=(Loss("WikiText-2", "prose", 0.314, 0.28, 0.34, 3, 9, 2), Loss("pydoc", "manual", 0.45, None, None, 3, 9, 1)),
    )
    assert measured_text(both) == (
        "Small, 30% of FFN channels, scar-prot + lstsq: +0.31 nats per token on WikiText-2 (0.28 to 0.34), +0.45 on pydoc"
    )


def test_the_data_of_the_package_is_complete() -> None:
    cuts = measured_cuts()
    assert cuts
    for item in cuts:
        assert 0 < item.channels_removed < 1
        assert 0 < item.parameters_removed < item.channels_removed
        assert len(item.losses) == 2
        assert all(loss.low is not None and loss.low <= loss.above <= loss.high and loss.tokens for loss in item.losses)  # type: ignore[operator]
        assert bool(item.recovery_tokens) == (item.recovery != "none")
        assert item.date
        # A path of the machine that measured belongs to nobody else.
        assert "/" not in item.command.replace("bench/expect.py", "")


def test_another_format_is_refused() -> None:
    with pytest.raises(ValueError, match="measured-cuts/2"):
        cuts_of({"format": FORMAT.replace("/1", "/2"), "runs": []})


def test_a_plan_says_what_is_unusual_about_it(tmp_path: Path) -> None:
    with Atlas.open(random_atlas(tmp_path / "a.h5", layers=3, channels=100)) as atlas:
        plan = make_plan(atlas, PlanOptions(0.5))
        assert asked_of(plan, "lstsq") == CutAsked(
            plan.parameters, plan.sparsity_reached, CHANNELS, "scar-prot", recovery="lstsq"
        )
        assert asked_of(make_plan(atlas, PlanOptions(0.5, layers="1"))).unusual == ("a cut of some FFNs only",)
        assert asked_of(make_plan(atlas, PlanOptions(0.5, invert=True))).unusual == ("an inverted plan",)
        protected = make_plan(atlas, PlanOptions(0.5, "random", protect=("0:0-20",)))
        assert asked_of(protected).unusual == ("protection that changes the cut",)
    with Atlas.open(moe_atlas(tmp_path / "e.h5")) as atlas:
        assert asked_of(make_plan(atlas, PlanOptions(0.5))).unusual == ("routed experts",)


def test_plan_and_dry_run_print_the_nearest_rows(tmp_path: Path, capsys: Any) -> None:
    atlas = str(random_atlas(tmp_path / "a.h5", layers=3, channels=100))
    assert main(["plan", atlas, "--sparsity", "0.5", "--method", "wanda"]) == 0
    said = capsys.readouterr()
    assert "nearest measured" in said.out
    assert "the method wanda was not measured" in said.err
    assert main(["plan", atlas, "--sparsity", "0.5", "--json"]) == 0
    expected = json.loads(capsys.readouterr().out)["expected"]
    assert {item["recovery"] for item in expected["nearest"]} >= {"none"}
    assert all(item["losses"][0]["above"] > 0 for item in expected["nearest"])
    assert expected["outside"]
    assert main(["prune", atlas, "--sparsity", "0.5", "--recover", "none", "--dry-run", "--json"]) == 0
    assert [item["recovery"] for item in json.loads(capsys.readouterr().out)["expected"]["nearest"]] == ["none"]
