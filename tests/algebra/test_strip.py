"""A stripped atlas says the same about every channel, and holds no sums."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import chanfmt
from chanfmt.algebra.strip import stripped
from chanfmt.base.errors import AtlasError
from chanfmt.cli.main import main
from chanfmt.format import schema
from chanfmt.format.records import ExtensionGroup, ExtensionVariable
from chanfmt.format.writer import write_atlas
from tests.support.factory import moe_content, random_content
from tests.support.hygiene import heavy_imports

SUMS = ("sum_u", "sum_u2", "sum_s2", "sum_q", "sum_abs_q", "sum_q2", "sum_q2_split", "max_abs_u")


@pytest.fixture(params=[random_content, moe_content], ids=["dense", "experts"])
def path(request, tmp_path):
    extension = ExtensionGroup(
        "x_lab",
        {"note": "kept"},
        (
            ExtensionVariable("bin", ("bin",), np.arange(3, dtype="i4"), "bin", "1", ""),
            ExtensionVariable("counts", ("bin",), np.arange(3), "counts", "1", "sum"),
        ),
    )
    write_atlas(dataclasses.replace(request.param(), extensions=(extension,)), tmp_path / "a.h5")
    return tmp_path / "a.h5"


def read(path):
    with chanfmt.open(path, verify=True) as atlas:
        return atlas.content()


@pytest.mark.parametrize("keep", [False, True])
def test_only_the_sums_and_the_text_go(path, tmp_path, keep):
    output = tmp_path / "small.h5"
    assert main(["strip", str(path), "-o", str(output), *(["--keep-tokens"] if keep else [])]) == 0
    before, after = read(path), read(output)
    assert after.dropped == SUMS
    for stack, other in zip(after.stacks, before.stacks, strict=True):
        assert set(other.variables) - set(stack.variables) == set(SUMS)
        assert stack.supports == other.supports
        for name, values in stack.variables.items():
            assert values.tobytes() == other.variables[name].tobytes(), name
    assert (after.calibration.token_ids is not None) == keep
    assert after.calibration.sequence_sha256 == before.calibration.sequence_sha256
    assert (after.labels, after.core_rho, after.blocks, after.model) == (
        before.labels,
        before.core_rho,
        before.blocks,
        before.model,
    )
    assert after.extensions[0].attributes == {"note": "kept"}
    assert {item.name for item in after.extensions[0].variables} == {"bin", "counts"}
    assert after.producer.history[-1]["command"] == "strip"
    assert output.stat().st_size < path.stat().st_size
    # Again it changes nothing more.
    again = stripped(after, keep_tokens=True)
    assert again.dropped == after.dropped
    assert [set(stack.variables) for stack in again.stacks] == [set(stack.variables) for stack in after.stacks]


def test_the_sums_are_those_of_the_schema():
    assert {variable.name for variable in schema.STACK_VARIABLES if variable.merge in ("sum", "max")} == {
        *SUMS,
        "tokens",
        "tokens_split",
    }


def test_a_stripped_atlas_is_shown_and_compared(path, tmp_path, capsys):
    output = str(tmp_path / "small.h5")
    assert main(["strip", str(path), "-o", output]) == 0
    assert "max_abs_u, the token ids" in capsys.readouterr().err
    for command in (["validate", output], ["info", output], ["show", output, "--layer", "0"], ["compare", output, str(path)]):
        assert main(command) == 0
    assert main(["merge", output, str(path), "-o", str(tmp_path / "x.h5")]) == 2
    assert "cannot be merged" in capsys.readouterr().err


def test_an_unfinished_build_is_refused():
    with pytest.raises(AtlasError, match="unfinished"):
        stripped(dataclasses.replace(random_content(), status="partial"))


def test_an_output_that_exists_is_kept(path, capsys):
    before = path.read_bytes()
    assert main(["strip", str(path), "-o", str(path)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert main(["strip", str(path), "-o", str(path), "--overwrite"]) == 0
    assert path.stat().st_size < len(before)


def test_nothing_heavy_is_loaded(path, tmp_path):
    assert not heavy_imports("chanfmt.cli.main", ["strip", str(path), "-o", str(tmp_path / "b.h5")])
