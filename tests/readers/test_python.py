"""xarray and netCDF4-python open an atlas: named dimensions, coordinates, the same values."""

from __future__ import annotations

import numpy as np
import pytest

from chanfmt.format import schema
from chanfmt.format.container import SCALE_ATTRIBUTES


def dimensions(stack, name):
    return schema.stack_dimensions(schema.STACK_VARIABLE_BY_NAME[name], stack.kind)


@pytest.mark.parametrize("engine", ["h5netcdf", "netcdf4"])
@pytest.mark.parametrize("name", ["decoder", "decoder.experts"])
def test_a_stack_is_a_dataset(stacks, path, name, engine):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip({"netcdf4": "netCDF4"}.get(engine, engine))
    stack = stacks[name]
    with xarray.open_dataset(path, engine=engine, group=f"stacks/{name}") as dataset:
        assert {*dataset.data_vars} == {*stack.variables}
        for variable in stack.variables:
            assert dataset[variable].dims == dimensions(stack, variable)
            assert dataset[variable].dtype == stack.variables[variable].dtype
            np.testing.assert_array_equal(dataset[variable].to_numpy(), stack.variables[variable], variable)
            assert dataset[variable].attrs["long_name"] == schema.STACK_VARIABLE_BY_NAME[variable].long_name
        assert {*dataset.coords} >= {"layer", "channel", "split"}
        # Coordinates are labels: layer 2 is looked up, not counted.
        layer = int(stack.layers[-1])
        np.testing.assert_array_equal(dataset["lp"].sel(layer=layer, channel=7).to_numpy(), stack.variables["lp"][-1, ..., 7])
        assert dataset["label"].attrs["flag_meanings"] == "none halo supernode"


@pytest.mark.parametrize("engine", ["h5netcdf", "netcdf4"])
def test_an_atlas_is_a_tree(content, path, engine):
    xarray = pytest.importorskip("xarray")
    pytest.importorskip({"netcdf4": "netCDF4"}.get(engine, engine))
    with xarray.open_datatree(path, engine=engine) as tree:
        assert tree.attrs["format"] == schema.FORMAT
        assert tree["model"].attrs["id"] == "tests/experts"
        assert tree["stacks/decoder.experts/lp"].dims == ("layer", "expert", "channel")
        assert tree["stacks/decoder/sum_q2_split"].dims == ("split", "layer", "channel")
        assert tree["block"].ds.sizes["block"] == len(content.blocks)
        assert tree["block/module"].to_numpy().tolist() == [block.module for block in content.blocks]
        assert tree["calibration/token_ids"].dims == ("sequence", "position")


def test_netcdf4_reads_every_variable(content, stacks, path):
    netcdf = pytest.importorskip("netCDF4")
    with netcdf.Dataset(path) as file:
        file.set_auto_mask(False)
        for stack in stacks.values():
            group = file["stacks"][stack.name]
            assert {name: len(dimension) for name, dimension in group.dimensions.items()} == {
                "layer": len(stack.layers),
                "channel": stack.n_channels,
                "split": stack.splits,
                "support": len(stack.supports),
                "nearest": schema.NEAREST,
                **({"expert": stack.n_experts} if stack.n_experts else {}),
            }
            for name in stack.variables:
                assert group[name].dimensions == dimensions(stack, name)
                np.testing.assert_array_equal(group[name][...], stack.variables[name], name)
                assert not {*group[name].ncattrs()} & SCALE_ATTRIBUTES
        assert file["block"]["stack"][...].tolist() == [block.stack for block in content.blocks]
        assert file["calibration"]["sequence_sha256"][0] == content.calibration.sequence_sha256[0]
        assert file["labels"].rho == content.labels.rho
