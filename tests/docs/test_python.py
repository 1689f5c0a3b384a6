"""The examples of docs/python.md run, and what they use agrees with the file."""

from __future__ import annotations

import doctest
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

import chanfmt
from chanfmt.base.errors import AtlasError, MissingPackageError
from chanfmt.format import schema
from tests.support.factory import moe_atlas, random_atlas

ROOT = Path(__file__).parents[2]
VALID = sorted((ROOT / "spec" / "conformance" / "valid").glob("*.h5"))


def test_the_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    failed, tried = doctest.testfile(str(ROOT / "docs" / "python.md"), module_relative=False)
    assert tried > 20
    assert not failed


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_xarray_has_what_the_file_has(path: Path) -> None:
    import xarray

    with chanfmt.open(path) as atlas:
        for name, stack in atlas.stacks.items():
            dataset = stack.to_xarray()
            assert set(dataset.data_vars) >= set(stack.variables)
            with xarray.open_dataset(path, group=f"stacks/{name}", engine="h5netcdf", decode_times=False) as other:
                for variable in stack.variables:
                    np.testing.assert_array_equal(dataset[variable].values, other[variable].values)
                    assert dataset[variable].dims == other[variable].dims
                    for key in ("long_name", "units"):
                        assert dataset[variable].attrs[key] == other[variable].attrs[key]
                np.testing.assert_array_equal(dataset.layer, other.layer)


def test_frames_have_a_row_per_channel(tmp_path: Path) -> None:
    with chanfmt.open(moe_atlas(tmp_path / "a.h5")) as atlas:
        frame = atlas.to_pandas()
        dense, experts = atlas.stacks["decoder"], atlas.stacks["decoder.experts"]
        assert len(frame) == dense["lp"].size + experts["lp"].size
        one = frame[(frame["stack"] == "decoder.experts") & (frame.expert == 2) & (frame.layer == experts.layers[1])]
        np.testing.assert_array_equal(one.lp, experts["lp"][1, 2])
        np.testing.assert_array_equal(one.channel, np.arange(experts.n_channels))
        assert one.label.tolist() == [schema.LABELS[value] for value in experts["label"][1, 2].tolist()]
        assert (frame[frame["stack"] == "decoder"].expert == -1).all()
        with pytest.raises(AtlasError, match="no 'fame'"):
            atlas.to_pandas(["fame"])


def test_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "xarray", None)
    with chanfmt.open(random_atlas(tmp_path / "a.h5")) as atlas:
        with pytest.raises(MissingPackageError, match="xarray"):
            atlas.stacks["decoder"].to_xarray()
        with pytest.raises(MissingPackageError, match="pandas"):
            atlas.to_pandas()


@pytest.mark.parametrize(
    "name",
    [
        "chanfmt.algebra.labels",
        "chanfmt.algebra.compare",
        "chanfmt.analysis.mass",
        "chanfmt.analysis.association",
        "chanfmt.analysis.resample",
    ],
)
def test_the_docstrings_examples_run(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried
    assert not failed
