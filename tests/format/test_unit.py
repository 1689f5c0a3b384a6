"""A unit is a dense FFN or one expert, and gives what its stack holds of it."""

from __future__ import annotations

import numpy as np
import pytest

import chanfmt
from chanfmt.base.errors import AtlasError
from chanfmt.format.unit import Unit, unit_rows
from tests.support.factory import moe_atlas, random_atlas


@pytest.fixture
def dense(tmp_path):
    with chanfmt.open(random_atlas(tmp_path / "dense.h5")) as atlas:
        yield atlas


@pytest.fixture
def experts(tmp_path):
    with chanfmt.open(moe_atlas(tmp_path / "experts.h5")) as atlas:
        yield atlas


def test_a_dense_ffn_is_one_unit(dense):
    units = list(dense.units())
    assert [(unit.index, unit.layer, unit.expert) for unit in units] == [
        (block.index, block.layer_index, None) for block in dense.blocks
    ]
    stack = dense.stacks["decoder"]
    for unit in units:
        np.testing.assert_array_equal(unit.values("lp"), stack["lp"][unit.row])
        np.testing.assert_array_equal(unit.labels, stack["label"][unit.row])
        np.testing.assert_array_equal(unit.by_split("sum_q2_split"), stack["sum_q2_split"][:, unit.row])
        np.testing.assert_array_equal(unit.by_split("tokens_split"), stack["tokens_split"][:, unit.row])
        assert unit.tokens == stack["tokens"][unit.row]
        assert type(unit.tokens) is int
        assert unit.number("core_covered") == stack["core_covered"][unit.row]
        assert unit.n_channels == unit.values("lp").size == dense.blocks[0].n_channels


def test_every_expert_is_a_unit(experts):
    units = list(experts.units())
    assert len(units) == sum(max(1, block.n_experts) for block in experts.blocks)
    assert [unit.expert for unit in units[:6]] == [None, 0, 1, 2, 3, 0]
    for block in experts.blocks:
        own = list(experts.units(block))
        assert [unit.expert for unit in own] == list(block.experts)
        stack = experts.stacks[block.stack]
        assert all(unit.block is block and unit.stack is stack for unit in own)
        np.testing.assert_array_equal([unit.values("lp") for unit in own], unit_rows(stack.row("lp", block.row)))
        if block.n_experts:
            for unit in own:
                assert unit.tokens == stack["tokens"][block.row, unit.expert]
                np.testing.assert_array_equal(unit.by_split("sum_q2_split"), stack["sum_q2_split"][:, block.row, unit.expert])


def test_known_leaves_out_what_no_token_reached(experts):
    idle = [unit for unit in experts.units() if unit.tokens == 0]
    assert idle
    for unit in idle:
        assert np.isnan(unit.values("lp")).all()
        assert unit.known("lp").shape == (0,)
    reached = next(unit for unit in experts.units() if unit.tokens)
    assert len(reached.known("lp")) == reached.n_channels


def test_what_the_stack_does_not_hold(dense):
    unit = next(dense.units())
    assert not unit.holds("x_lab/hessian")
    assert unit.known("x_lab/hessian").shape == (0,)
    assert np.isnan(unit.number("x_lab/hessian"))
    with pytest.raises(AtlasError, match="holds no 'x_lab/hessian'"):
        unit.values("x_lab/hessian")


def test_a_unit_can_be_made_of_a_block_and_a_stack(experts):
    block = experts.blocks[1]
    unit = Unit(block, experts.stacks[block.stack], 2)
    np.testing.assert_array_equal(unit.values("lp"), experts.stacks[block.stack]["lp"][block.row, 2])


def test_rows_of_units_are_a_view():
    one, several = np.zeros(3, dtype=bool), np.zeros((2, 3), dtype=bool)
    unit_rows(one)[0, 1] = True
    unit_rows(several)[1, 2] = True
    assert one.tolist() == [False, True, False]
    assert several.tolist() == [[False] * 3, [False, False, True]]
    # A slice that is not contiguous stays a view too.
    wide = np.zeros((3, 4))
    unit_rows(wide[:, 1])[0, 2] = 5
    assert wide[2, 1] == 5
    for shape in ((), (1, 2, 3)):
        with pytest.raises(ValueError, match="one or two dimensions"):
            unit_rows(np.zeros(shape))
