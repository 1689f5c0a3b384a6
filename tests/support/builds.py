"""Stop builds, and compare what they wrote."""

from __future__ import annotations

import dataclasses

import numpy as np

import chanfmt
from chanfmt.building.build import build as build_located
from chanfmt.building.options import BuildOptions
from chanfmt.format.records import LabelSettings
from chanfmt.hub.locate import locate_model
from tests.support.interrupted import killed_after

SETTINGS = LabelSettings(rho=0.03, support_size=8)


SEQUENCES = 20


def build(options, settings):
    """`chanfmt.building.build.build` of a model that lies here or on the test Hub. Returns the path written."""
    return build_located(options, settings, locate_model)


def request(model, output, **changes):
    values = {"calib": "pydoc", "sequences": SEQUENCES, "seq_len": 32, "batch_size": "2", "columns": "all"} | changes
    return BuildOptions(str(model), str(output), **values)


def stop_after(options, batches, monkeypatch, settings=SETTINGS):
    """Build until ``batches`` batches are done and in a partial atlas."""
    with killed_after(batches, monkeypatch):
        build(options, settings)


def columns_of(content):
    """The numbers that an atlas holds as extensions: path to values."""
    return {
        f"{group.path}/{item.name}": item.values
        for group in content.extensions
        for item in group.variables
        if item.dimensions != (item.name,) and isinstance(item.values, np.ndarray)
    }


def assert_equal(path, expected):
    """Two finished atlases agree bit for bit in all that does not name a moment or a session."""
    with chanfmt.open(path, verify=True) as found, chanfmt.open(expected, verify=True) as other:
        ours, theirs = found.content(), other.content()
    for name in ("title", "model", "labels", "core_rho", "blocks", "status", "dropped"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for group, other_group in zip(ours.extensions, theirs.extensions, strict=True):
        assert (group.path, group.attributes) == (other_group.path, other_group.attributes)
        for item, other_item in zip(group.variables, other_group.variables, strict=True):
            assert np.asarray(item.values).tobytes() == np.asarray(other_item.values).tobytes(), item.name
            assert dataclasses.replace(item, values=None) == dataclasses.replace(other_item, values=None)
    for field in dataclasses.fields(ours.calibration):
        np.testing.assert_array_equal(getattr(ours.calibration, field.name), getattr(theirs.calibration, field.name))
    for stack, other_stack in zip(ours.stacks, theirs.stacks, strict=True):
        assert list(stack.variables) == list(other_stack.variables)
        for name, values in stack.variables.items():
            assert values.tobytes() == other_stack.variables[name].tobytes(), name
