"""Widths and parameters as written: linked FFNs together, at every sparsity."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest

from chanfmt.base.errors import UsageError
from chanfmt.format.reader import Atlas
from chanfmt.format.writer import write_atlas
from surgery.planning.file import load_plan, save_plan
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from surgery.planning.shrink import check_plan
from surgery.planning.width import kept_units
from surgery.planning.written import size_of, width_warnings, written_widths
from tests.support.factory import moe_content, random_content, with_fields

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class FFN:
    """What decides an FFN's width."""

    n_channels: int
    width_field: str | None = "width"
    width_factor: int = 1
    n_experts: int = 0
    channel_parameters: int = 96


REAL: dict[str, list[tuple[int, list[FFN]]]] = {
    "1408 x 2": [(1408, [FFN(1408, n_experts=64), FFN(2816, width_factor=2)])],
    "1536 x 2": [(1536, [FFN(1536, n_experts=160), FFN(3072, width_factor=2)])],
    "768": [(768, [FFN(768, n_experts=128)] * 2)],
    "5461": [(5461, [FFN(5461)] * 3)],
    "18944": [(18944, [FFN(18944)] * 3)],
    "27648": [(27648, [FFN(27648)] * 3)],
    "prime": [(7919, [FFN(7919)] * 3)],
    "stages": [(384, [FFN(384), FFN(768, width_factor=2), FFN(1536, width_factor=4), FFN(3072, width_factor=8)])],
    "two fields": [(10944, [FFN(10944)]), (1408, [FFN(1408, "moe", n_experts=8), FFN(2816, "moe", 2)])],
}
"""Name to the shared integers of a model, each with the FFNs that it sets: the widths of released models."""


@pytest.mark.parametrize("name", list(REAL))
def test_real_widths_at_every_sparsity(name: str) -> None:
    ffns = [ffn for _, group in REAL[name] for ffn in group]
    whole = sum(ffn.n_channels * max(1, ffn.n_experts) * ffn.channel_parameters for ffn in ffns)
    earlier = [ffn.n_channels for ffn in ffns]
    for percent in range(5, 96):
        kept = []
        for units, group in REAL[name]:
            left = kept_units(units, sorted({ffn.width_factor for ffn in group}), percent / 100)
            kept += [ffn.width_factor * left for ffn in group]
        widths = written_widths(ffns, kept)
        # An even cut needs no zeros.
        assert widths == kept
        assert all(width % 32 == 0 and 0 < width < ffn.n_channels for width, ffn in zip(widths, ffns, strict=True))
        assert all(now <= then for now, then in zip(widths, earlier, strict=True))
        earlier = widths
        assert width_warnings(ffns, widths) == ()
        size = size_of(ffns, kept, widths)
        assert size is not None
        assert size.asked == size.written
        assert not size.is_small
        # The widest FFN decides how far a multiple of 32 of the narrowest moves the size.
        assert abs(size.written / whole - percent / 100) <= max(0.02, 32 / min(ffn.n_channels for ffn in ffns))


def test_ffns_of_one_field_are_as_wide_as_the_widest_needs() -> None:
    shared = FFN(2816, width_factor=2)
    # 600 of the shared expert need a field of 300, and 320 of the routed experts one of 320.
    assert written_widths([FFN(1408), shared], [320, 600]) == [320, 640]
    # 1100 of the shared expert need 550; the field is a multiple of 32, so that both widths are.
    assert written_widths([FFN(1408), shared], [320, 1100]) == [576, 1152]
    assert written_widths([FFN(1408), shared], [320, 1100], 1) == [550, 1100]
    assert written_widths([FFN(1408), shared], [320, 2816]) == [1408, 2816]
    # Without a field, an FFN is as wide as before; if nobody knows, it is taken to be narrowed.
    assert written_widths([FFN(1408, ""), FFN(1408, None)], [320, 320]) == [1408, 320]
    # A list of widths has a place for each FFN.
    assert written_widths([FFN(1408, "widths[0]"), FFN(1408, "widths[1]")], [320, 640]) == [320, 640]


def test_odd_widths_warn_of_what_they_cost() -> None:
    [warning] = width_warnings([FFN(1408, n_experts=4), FFN(2816)], [564, 1128])
    for text in ("564 are not multiples of 32", "llama.cpp", "vLLM", "multiples of 8 in bfloat16"):
        assert text in warning
    assert width_warnings([FFN(40)], [20]) == (), "a tiny FFN has no better width"
    assert width_warnings([FFN(1000)], [1000]) == (), "what is not cut keeps its width"


@pytest.fixture
def linked(tmp_path: Path) -> Atlas:
    """A dense FFN of 96 channels, and experts of 24: one field sets both."""
    fields = {"decoder": ("width", 4), "decoder.experts": ("width", 1)}
    write_atlas(with_fields(moe_content(), fields), tmp_path / "a.h5")
    return Atlas.open(tmp_path / "a.h5")


def test_a_plan_chooses_linked_widths_together(linked: Atlas, tmp_path: Path) -> None:
    plan = make_plan(linked, PlanOptions(0.4, "magnitude"))
    # The narrowest has 24 channels, and so steps of 2: 24 - 9 = 15, rounded up.
    assert [block.n_kept for block in plan.blocks] == [64, 16, 16, 16]
    assert list(plan.widths) == [64, 16, 16, 16]
    assert plan.size is not None
    assert plan.size.asked == plan.size.written == 72 * (32 + 3 * 4 * 8)
    assert plan.parameters_after == plan.parameters - plan.size.written
    save_plan(plan, tmp_path / "plan")
    again = load_plan(tmp_path / "plan")
    assert (again.widths, again.size, again.parameters) == (plan.widths, plan.size, plan.parameters)


def test_protected_channels_must_fit_the_common_width(linked: Atlas) -> None:
    with pytest.raises(UsageError, match="layer 0 protects 70 channels and would keep 64, 6 too few"):
        make_plan(linked, PlanOptions(0.4, "magnitude", protect=("decoder/0:0-69",)))


def test_a_cut_of_some_layers_is_refused(tmp_path: Path) -> None:
    write_atlas(with_fields(random_content(channels=128), {"decoder": ("intermediate_size", 1)}), tmp_path / "a.h5")
    with Atlas.open(tmp_path / "a.h5") as atlas:
        plan = make_plan(atlas, PlanOptions(0.5, "magnitude", layers="1-2"))
        assert list(plan.widths) == [128] * 4
        with pytest.raises(UsageError, match="shrink by 0 of the 9,216 parameters") as caught:
            check_plan(plan)
        assert caught.value.hint == "leave out --layers, or add --allow-padding to write zeros in place of the removed channels"
        check_plan(make_plan(atlas, PlanOptions(0.5, "magnitude")))


def test_an_older_atlas_says_no_size(tmp_path: Path) -> None:
    write_atlas(random_content(channels=128), tmp_path / "a.h5")
    with Atlas.open(tmp_path / "a.h5") as atlas:
        assert {block.width_field for block in atlas.blocks} == {None}
        plan = make_plan(atlas, PlanOptions(0.5, "magnitude", layers="1-2"))
    assert plan.size is None
    assert plan.parameters_after is None
    assert list(plan.widths) == [block.n_kept for block in plan.blocks]
    check_plan(plan)


def test_a_hostile_plan_file_is_refused(linked: Atlas, tmp_path: Path) -> None:
    plan = make_plan(linked, PlanOptions(0.4, "magnitude"))
    for changes in (
        {"width_factor": 0},
        {"width_factor": 5},
        {"width_factor": 8},
        {"width_field": ""},
        {"channel_parameters": -1},
    ):
        first = dataclasses.replace(plan.blocks[0], **changes)
        save_plan(dataclasses.replace(plan, blocks=(first, *plan.blocks[1:])), tmp_path / "plan")
        with pytest.raises(UsageError, match="is not a pruning plan"):
            load_plan(tmp_path / "plan")
    assert np.array_equal(plan.blocks[0].kept, np.unique(plan.blocks[0].kept))
