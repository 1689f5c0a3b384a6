"""h5wasm under Node reads an atlas as a browser would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def found(path):
    directory = os.environ.get("H5WASM_DIR", "")
    if not shutil.which("node"):
        pytest.skip("node is not installed")
    if not (Path(directory) / "node_modules" / "h5wasm").is_dir():
        pytest.skip("H5WASM_DIR names no directory where `npm install h5wasm` was run")
    command = ["node", str(Path(__file__).with_name("read.mjs")), directory, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_attributes_and_texts(content, found):
    assert found["format"] == "channel-importance-atlas"
    assert found["rho"] == content.labels.rho
    assert found["modules"] == [block.module for block in content.blocks]


def test_every_array(stacks, found):
    assert {*found["stacks"]} == {*stacks}
    for stack in stacks.values():
        read = found["stacks"][stack.name]
        assert read["kind"] == stack.kind
        assert read["layer"]["values"] == stack.layers.tolist()
        for name, values in stack.variables.items():
            assert tuple(read[name]["shape"]) == values.shape
            kind = {"f": "fd", "i": "iq", "u": "B"}[values.dtype.kind]
            assert read[name]["dtype"].lstrip("<|") in kind
            # null became None becomes NaN.
            np.testing.assert_array_equal(
                np.array(read[name]["values"], dtype=float).reshape(values.shape).astype(values.dtype), values, name
            )


def test_a_slice(stacks, found):
    values = stacks["decoder.experts"].variables["lp"][1, :, 3:5]
    np.testing.assert_array_equal(np.float32(found["slice"]).reshape(values.shape), values)
