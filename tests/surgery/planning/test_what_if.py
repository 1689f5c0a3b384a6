"""What-if gives the numbers of the plan, whatever is asked."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chanfmt.base.errors import AtlasError, ChanfmtError, UsageError
from chanfmt.format.reader import Atlas
from chanfmt.format.writer import write_atlas
from surgery.planning.methods import METHODS
from surgery.planning.options import ALLOCATIONS, PlanOptions
from surgery.planning.plan import make_plan
from surgery.planning.protect_file import write_protect_file
from surgery.planning.shrink import check_plan
from surgery.planning.what_if import WhatIf, total
from tests.support.factory import moe_atlas, moe_content, random_atlas, random_content, with_fields

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

T = TypeVar("T")


@pytest.fixture(scope="module", params=["dense", "experts", "linked", "uneven"])
def atlas(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    path = tmp_path_factory.mktemp("atlas") / "a.h5"
    if request.param == "linked":
        # The dense FFN is four times as wide as an expert, and one field sets both.
        fields = {"decoder": ("width", 4), "decoder.experts": ("width", 1)}
        write_atlas(with_fields(moe_content(), fields), path)
        return Atlas.open(path)
    if request.param == "uneven":
        write_atlas(with_fields(random_content(layers=5, channels=256), {"decoder": ("intermediate_size", 1)}), path)
        return Atlas.open(path)
    return Atlas.open(random_atlas(path, layers=5, channels=96) if request.param == "dense" else moe_atlas(path))


def outcome(call: Callable[[], T]) -> tuple[T | None, str]:
    """What ``call`` returns, or why it refuses."""
    try:
        return call(), ""
    except ChanfmtError as error:
        return None, error.message


@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("protect", [(), ("supernodes", "top:lp=3%")])
def test_the_numbers_are_the_plan_s(atlas: Atlas, method: str, allocation: str, protect: tuple[str, ...]) -> None:
    options = PlanOptions(0.5, method, protect=protect, allocation=allocation, seed=3)
    what_if = WhatIf(atlas, options)
    for sparsity in (0.05, 0.29, 0.5, 0.69, 0.94):
        plan, refusal = outcome(partial(make_plan, atlas, dataclasses.replace(options, sparsity=sparsity)))
        rows, own_refusal = outcome(partial(what_if.at, sparsity))
        assert own_refusal == refusal
        if plan is None or rows is None:
            continue
        assert what_if.protected == plan.protected
        for row, block in zip(rows, plan.blocks, strict=True):
            assert row.channels_kept == block.kept.size
            assert (row.supernodes, row.supernodes_kept) == (block.supernodes, block.supernodes_kept)
            assert row.lp_share == pytest.approx(block.lp_kept)
        assert total(rows).channels_kept == plan.channels_kept
        assert what_if.sizes(rows) == plan.sizes
        assert what_if.is_refused(rows) == (plan.size is not None and outcome(partial(check_plan, plan))[1] != "")
        assert total(rows).lp == pytest.approx(sum(row.lp for row in rows))


def test_marks_are_a_protect_file(tmp_path: Path) -> None:
    with Atlas.open(random_atlas(tmp_path / "a.h5")) as atlas:
        marks = {1: np.arange(96) % 7 == 0}
        write_protect_file(tmp_path / "p.json", atlas, marks)
        options = PlanOptions(0.6, "random", layers="1-2")
        plan = make_plan(atlas, dataclasses.replace(options, protect=(str(tmp_path / "p.json"),)))
        what_if = WhatIf(atlas, options, marks)
    rows = what_if.at(0.6)
    assert [row.lp_share for row in rows] == pytest.approx([block.lp_kept for block in plan.blocks])
    assert [row.channels_kept for row in rows] == [block.n_kept for block in plan.blocks]
    assert what_if.protected == plan.protected == 14


@settings(max_examples=30, deadline=None)
@given(first=st.floats(0.02, 0.9), second=st.floats(0.02, 0.9), method=st.sampled_from(list(METHODS)))
def test_more_is_never_kept_of_less(first: float, second: float, method: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    with Atlas.open(random_atlas(tmp_path_factory.mktemp("atlas") / "a.h5")) as atlas:
        what_if = WhatIf(atlas, PlanOptions(0.5, method))
    few, many = (what_if.at(sparsity) for sparsity in sorted((first, second), reverse=True))
    for less, more in zip(few, many, strict=True):
        assert less.channels_kept <= more.channels_kept
        assert less.supernodes_kept <= more.supernodes_kept
        assert less.lp_kept <= more.lp_kept


def test_what_cannot_be_asked(tmp_path: Path) -> None:
    with Atlas.open(random_atlas(tmp_path / "a.h5")) as atlas:
        what_if = WhatIf(atlas, PlanOptions(0.5))
        with pytest.raises(UsageError, match="nothing would be left"):
            what_if.at(1.0)
        with pytest.raises(UsageError, match="no layer 9"):
            WhatIf(atlas, PlanOptions(0.5, layers="9"))
        with pytest.raises(UsageError, match="do not fit"):
            WhatIf(atlas, PlanOptions(0.5), {0: np.ones(96, dtype=bool)}).at(0.5)
    with Atlas.open("spec/conformance/valid/partial.h5") as atlas, pytest.raises(AtlasError, match="unfinished"):
        WhatIf(atlas, PlanOptions(0.5))
