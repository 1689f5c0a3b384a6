"""An interrupted refit continues from its last save to the bits of one that nobody interrupted."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from chanfmt.base.errors import ChanfmtError, UsageError
from chanfmt.models.source import ModelSource
from chanfmt.models.streaming.spool import Spool
from surgery.cut.apply import apply_plan, check_output
from surgery.cut.options import CutOptions
from surgery.recovery.leftover import partial_path
from surgery.recovery.options import Refit
from surgery.recovery.resume import PartialRefit, RefitState
from tests.support import zoo
from tests.support.heard import heard
from tests.support.plans import planned, read
from tests.support.repeated import repeated

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.planning.plan import PruningPlan
    from surgery.result.record import Report

LAYERS = 5


def refit(**changes: Any) -> Refit:
    ids = np.random.default_rng(3).integers(0, 90, (24, 20)).astype(np.int32)
    return dataclasses.replace(Refit(ids, "cpu", 1 << 30, save_every=0), **changes)


def save_model(directory: Path, model_type: str = "llama", seed: int = 0) -> Path:
    changes: dict[str, Any] = {"n_layer": LAYERS} if model_type == "gptj" else {"num_hidden_layers": LAYERS}
    if model_type == "gemma3_text":
        changes["layer_types"] = ["sliding_attention", "full_attention", *["sliding_attention"] * (LAYERS - 2)]
    zoo.tiny(model_type, "causal", seed, **changes).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its refit that nobody interrupted, and one that was interrupted after three saves."""
    directory = tmp_path_factory.mktemp("begun")
    save_model(directory / "model")
    run(directory, "whole", refit())
    with pytest.MonkeyPatch.context() as patch:
        stop_after(3, patch, directory, refit(), KeyboardInterrupt)
    return directory


@pytest.fixture
def stopped(begun: Path, tmp_path: Path) -> Path:
    """A copy of `begun`, which has ``out.partial`` and no ``out``."""
    return shutil.copytree(begun, tmp_path / "copy")


def middle(directory: Path) -> PruningPlan:
    """A plan that cuts blocks 1 and 3 of 5, so that there are uncut blocks before, between and after."""
    return planned(directory, lambda number, ffn: ffn.width // 2 if number in (1, 3) else ffn.width)


def run(directory: Path, output: str, given: Refit, plan: PruningPlan | None = None, **options: Any) -> Report:
    plan = plan or middle(directory / "model")
    cut = CutOptions(allow_padding=True, **options)
    return apply_plan(plan, ModelSource(directory / "model"), directory / output, cut, recovery=given)


def stop_after(saves: int, monkeypatch: pytest.MonkeyPatch, directory: Path, given: Refit, error: type[BaseException]) -> str:
    """Run the refit until it was saved ``saves`` times. Returns what the error says."""
    left = [saves]
    save = PartialRefit.save_if_due

    def save_and_stop(self: PartialRefit, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        left[0] -= 1
        if not left[0]:
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(PartialRefit, "save_if_due", save_and_stop)
        with pytest.raises(error) as caught:
            run(directory, "out", given)
    return str(caught.value)


def same_files(one: Path, other: Path) -> bool:
    found, expected = read(one), read(other)
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("model_type", "method"),
    [
        ("llama", "lstsq"),
        ("gemma3_text", "block"),
        *repeated(("llama", "block"), ("gptj", "lstsq"), ("gptj", "block"), ("gemma3_text", "lstsq")),
    ],
)
def test_it_continues_to_the_same_bits(model_type: str, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "model", model_type)
    given = refit(method=method)
    whole = run(tmp_path, "whole", given)
    for saves in (1, 2, 3, 4):
        text = stop_after(saves, monkeypatch, tmp_path, given, KeyboardInterrupt)
        assert "run the same command again to continue" in text
        assert (tmp_path / "out.partial" / "state.json").is_file()
        with heard() as said:
            # What is kept in memory is not part of the result.
            report = run(tmp_path, "out", dataclasses.replace(given, spool_bytes=0))
        fitted = (0, 0, 1, 1, 2)[saves]
        assert any(line.startswith("continuing the refit at ") and f"{fitted} of 2 FFNs" in line for line in said), said
        assert same_files(tmp_path / "out", tmp_path / "whole")
        assert report.recovery == whole.recovery
        assert sorted(item.name for item in tmp_path.iterdir()) == ["model", "out", "whole"]
        shutil.rmtree(tmp_path / "out")


def test_a_kill_between_two_saves_loses_what_came_after_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path / "model")
    run(tmp_path, "whole", refit())
    stop_after(1, monkeypatch, tmp_path, refit(), KeyboardInterrupt)
    # Nothing more is saved, and the last save stays.
    stop_after(2, monkeypatch, tmp_path, refit(save_every=math.inf), KeyboardInterrupt)
    assert json.loads((tmp_path / "out.partial" / "state.json").read_text())["block"] == 1
    run(tmp_path, "out", refit())
    assert same_files(tmp_path / "out", tmp_path / "whole")


CHANGES = {
    "the tokens": lambda given: dataclasses.replace(given, tokens=given.tokens[:, ::-1].copy()),
    "--recover (method)": lambda given: dataclasses.replace(given, method="block"),
    "the model": None,
    "the plan": None,
    "--dtype": None,
}


@pytest.mark.parametrize("changed", CHANGES)
def test_another_refit_starts_over_and_says_so(changed: str, stopped: Path) -> None:
    given = refit()
    shutil.rmtree(stopped / "whole")
    plan, options = middle(stopped / "model"), {}
    if changed == "the model":
        save_model(stopped / "model", seed=1)
        plan = middle(stopped / "model")
    elif changed == "the plan":
        plan = planned(stopped / "model", lambda number, ffn: ffn.width // 2 if number in (1, 3) else ffn.width, seed=1)
    elif changed == "--dtype":
        options["dtype"] = "bfloat16"
    else:
        given = CHANGES[changed](given)
    with heard() as said:
        run(stopped, "out", given, plan, **options)
    assert any("starting over" in line and changed in line for line in said), said
    run(stopped, "whole", given, plan, **options)
    assert same_files(stopped / "out", stopped / "whole")
    assert sorted(item.name for item in stopped.iterdir()) == ["model", "out", "whole"]


@pytest.mark.parametrize("damage", ["a byte", "shorter", "a file is gone", "not JSON", "another layout", "no state"])
def test_a_damaged_state_is_not_used(damage: str, stopped: Path) -> None:
    state = stopped / "out.partial" / "state.json"
    hidden = next(state.parent.glob("*.hidden"))
    if damage == "a byte":
        hidden.write_bytes(hidden.read_bytes()[:-1] + b"\x55")
    elif damage == "shorter":
        hidden.write_bytes(hidden.read_bytes()[:-1])
    elif damage == "a file is gone":
        hidden.unlink()
    elif damage == "not JSON":
        state.write_text(state.read_text()[:-2])
    elif damage == "another layout":
        state.write_text(state.read_text().replace('"layout": 1', '"layout": 2'))
    else:
        state.unlink()
    with heard() as said:
        run(stopped, "out", refit())
    assert any("is damaged" in line for line in said) is (damage != "no state"), said
    assert not any(line.startswith("continuing") for line in said)
    assert same_files(stopped / "out", stopped / "whole")
    assert not (stopped / "out.partial").exists()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_what_is_not_a_refit_stays(kind: str, tmp_path: Path) -> None:
    save_model(tmp_path / "model")
    other = tmp_path / "out.partial"
    if kind == "directory":
        other.mkdir()
        other /= "thesis.tex"
    other.write_text("mine")
    with pytest.raises(UsageError, match=r"out\.partial is in the way") as caught:
        run(tmp_path, "out", refit())
    assert "move it away" in str(caught.value)
    assert other.read_text() == "mine"
    # Without a refit nothing is kept there.
    apply_plan(middle(tmp_path / "model"), ModelSource(tmp_path / "model"), tmp_path / "out", CutOptions(allow_padding=True))
    assert other.read_text() == "mine"


def test_an_error_after_the_refit_says_how_to_continue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output cannot be written; then it can, and nothing is fitted again."""
    save_model(tmp_path / "model")
    run(tmp_path, "whole", refit())
    with monkeypatch.context() as patch:

        def fail(*args: Any, **kwargs: Any) -> None:
            raise ChanfmtError("the disk is full")

        patch.setattr("surgery.cut.apply.write_plan", fail)
        with pytest.raises(ChanfmtError, match="the disk is full") as caught:
            run(tmp_path, "out", refit())
    assert "run the same command again to continue" in str(caught.value)
    with heard() as said:
        run(tmp_path, "out", refit())
    assert any("2 of 2 FFNs are fitted" in line for line in said)
    assert same_files(tmp_path / "out", tmp_path / "whole")


def test_a_command_that_was_killed_after_it_published_leaves_nothing_that_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model")
    with monkeypatch.context() as patch:
        patch.setattr(PartialRefit, "remove", lambda self: None)
        run(tmp_path, "out", refit())
    assert (tmp_path / "out.partial").exists()
    with pytest.raises(UsageError, match="exists"):
        check_output(tmp_path / "out", overwrite=False)
    assert not (tmp_path / "out.partial").exists()


def partial(directory: Path, every: float | None = 0) -> PartialRefit:
    return PartialRefit(directory / "out", {"the plan": "a"}, {}, every)


def test_without_room_nothing_is_saved(tmp_path: Path) -> None:
    found = partial(tmp_path)
    with heard() as said, Spool(1 << 20, tmp_path) as spool:
        found.begin(1 << 60, 0, 0)
        spool.put(("check", 0), torch.ones(3))
        found.save_if_due(RefitState(1, (), {}), spool, [("check", 0)])
    assert len(said) == 1
    assert "will have to start over" in said[0]
    assert not partial_path(tmp_path / "out").exists()
    assert found.way_out() is None


def test_a_name_that_is_too_long_is_only_a_warning(tmp_path: Path) -> None:
    found = PartialRefit(tmp_path / ("x" * 250), {}, {}, 0)
    with heard() as said, Spool(1 << 20, tmp_path) as spool:
        found.begin(1, 1, 1)
        spool.put(("check", 0), torch.ones(3))
        for block in (1, 2):
            found.save_if_due(RefitState(block, (), {}), spool, [("check", 0)])
    assert ["not saved any more" in line for line in said] == [True]


def test_short_refits_are_not_saved(tmp_path: Path) -> None:
    found = partial(tmp_path, None)
    with heard() as said, Spool(1 << 20, tmp_path) as spool:
        found.begin(1, 1, 1)
        spool.put(("check", 0), torch.ones(3))
        found.save_if_due(RefitState(1, (), {}), spool, [("check", 0)], last=True)
    assert not said
    assert not list(tmp_path.iterdir())
