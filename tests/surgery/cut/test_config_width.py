"""A plan's result is laid out so that stock code loads it: linked widths together, and each group of FFNs for itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from chanfmt.base.errors import UsageError
from chanfmt.models.safetensors import CheckpointIndex
from chanfmt.models.stock import meta_shapes
from surgery.cut.config_width import Layout, check_layout, find_layout
from surgery.planning.plan import BlockPlan, PruningPlan
from tests.support import zoo
from tests.support.cut_models import FAMILIES, save_model
from tests.support.plans import plan_of
from tests.support.plans import planned as planned_for

if TYPE_CHECKING:
    from pathlib import Path


def planned(name: str, kept: int) -> PruningPlan:
    family = FAMILIES[name]
    plan = plan_of(*(block.tensors for block in family.blocks()), kept=np.arange(kept, dtype=np.int32), width=family.width)
    assert isinstance(plan.blocks[0], BlockPlan)
    return plan


@pytest.mark.parametrize("name", list(FAMILIES))
def test_the_field_is_found_and_moves_what_it_should(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    index = CheckpointIndex.open(save_model(name, tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    plan = planned(name, 19)
    before = meta_shapes(config)
    layout = find_layout(plan, config, index)
    assert {field: change.after for field, change in layout.fields.items()} == {family.field: 19}
    assert layout.fields[family.field].before == config[family.field]
    after = meta_shapes(layout.config)
    assert layout.allowed == {key: {shape} for key, shape in after.items()}
    assert sum(before[key] != after[key] for key in before) == len(layout.cuts)
    assert {key for key in layout.config if layout.config[key] != config.get(key)} == {family.field}


def laid_out(directory: Path, plan: PruningPlan) -> tuple[Layout, CheckpointIndex]:
    index = CheckpointIndex.open(directory)
    return find_layout(plan, json.loads((directory / "config.json").read_text()), index), index


def tiny(model_type: str, family: str, directory: Path) -> Path:
    zoo.tiny(model_type, family).save_pretrained(directory)
    return directory


def test_linked_experts_get_the_widths_that_their_field_can_give(tmp_path: Path) -> None:
    """Two shared experts are one FFN of twice the width. Its 27 channels need a field of 14, and so do the routed experts' 11."""
    model = tiny("deepseek_v3", "causal", tmp_path)
    kept = {44: 21, 28: 11, 56: 27}
    plan = planned_for(model, lambda number, ffn: kept[ffn.width])
    layout, _ = laid_out(model, plan)
    assert {block.n_channels: layout.widths[block.name] for block in plan.blocks} == {44: 21, 28: 14, 56: 28}
    assert {name: change.after for name, change in layout.fields.items()} == {
        "intermediate_size": 21,
        "moe_intermediate_size": 14,
    }


def test_a_dense_ffn_is_narrowed_although_the_experts_stay(tmp_path: Path) -> None:
    model = tiny("deepseek_v3", "causal", tmp_path)
    plan = planned_for(model, lambda number, ffn: 20 if ffn.width == 44 else ffn.width)
    layout, index = laid_out(model, plan)
    assert {name: change.after for name, change in layout.fields.items()} == {"intermediate_size": 20}
    check_layout(plan, layout, index)


def test_ffns_without_a_field_stay_and_the_others_are_narrowed(tmp_path: Path) -> None:
    """The adapters of X-MOD are as wide as a share of the hidden size; its FFNs have a field."""
    model = tiny("xmod", "masked", tmp_path)
    plan = planned_for(model, lambda number, ffn: ffn.width // 2)
    layout, index = laid_out(model, plan)
    assert {block.n_channels: layout.widths[block.name] for block in plan.blocks} == {44: 22, 16: 16}
    check_layout(plan, layout, index)


@pytest.mark.parametrize(
    ("model_type", "keep", "reason"),
    [
        ("llama", lambda number, ffn: ffn.width // 2 if number else ffn.width, "intermediate_size sets the width of"),
        (
            "bloom",
            lambda number, ffn: ffn.width // 2,
            "no config field that sets the width of transformer.h.0.mlp and 1 other FFNs",
        ),
        # Less than half of what was asked: one expert group keeps nearly everything.
        ("mixtral", lambda number, ffn: ffn.width // 4 if number else ffn.width - 4, "intermediate_size sets the width of"),
    ],
)
def test_a_file_that_would_hardly_shrink_is_refused(model_type: str, keep: Any, reason: str, tmp_path: Path) -> None:
    model = tiny(model_type, "causal", tmp_path)
    plan = planned_for(model, keep)
    layout, index = laid_out(model, plan)
    with pytest.raises(UsageError, match=reason) as caught:
        check_layout(plan, layout, index)
    assert "--allow-padding" in str(caught.value.hint)
