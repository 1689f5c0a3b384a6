"""h5dump and ncdump, the readers of HDF5 and netCDF themselves, list an atlas and print its numbers."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest

from chanfmt.format import schema


def output(*command):
    if not shutil.which(command[0]):
        package = {"h5dump": "hdf5-tools", "ncdump": "netcdf-bin"}[command[0]]
        pytest.skip(f"{command[0]} is not installed (Debian package {package})")
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_h5dump_lists_every_object(stacks, path):
    listing = output("h5dump", "-n", path)
    found = set(re.findall(r"^\s*(?:group|dataset)\s+(\S+)", listing, re.MULTILINE))
    expected = {f"/stacks/{stack.name}/{name}" for stack in stacks.values() for name in stack.variables}
    assert expected <= found
    assert {"/model", "/calibration/token_ids", "/labels", "/block/tensors", "/producer"} <= found


@pytest.mark.parametrize("name", ["lp", "sum_q2", "tokens", "label"])
def test_h5dump_prints_the_values(stacks, path, name):
    # %.17g and %.9g give every bit back.
    text = output("h5dump", "-y", "-w", "0", "-m", "%.17g", "-d", f"/stacks/decoder.experts/{name}", path)
    data = text[text.index("DATA {") + len("DATA {") :]
    values = stacks["decoder.experts"].variables[name]
    found = np.array(data[: data.index("}")].replace(",", " ").split(), dtype=np.float64)
    np.testing.assert_array_equal(found.reshape(values.shape).astype(values.dtype), values)


def test_h5dump_shows_contiguous_unfiltered_storage(path):
    text = output("h5dump", "-p", "-H", path)
    assert "CHUNKED" not in text
    assert text.count("CONTIGUOUS") > 50
    assert set(re.findall(r"FILTERS \{\s*(\S+)", text)) == {"NONE"}


def test_ncdump_lists_named_dimensions(stacks, path):
    text = output("ncdump", "-h", path)
    for stack in stacks.values():
        for name in stack.variables:
            dimensions = ", ".join(schema.stack_dimensions(schema.STACK_VARIABLE_BY_NAME[name], stack.kind))
            assert f" {name}({dimensions}) ;" in text
