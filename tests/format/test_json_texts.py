"""Wrong JSON inside an atlas: a finding of the validator, and an error of one line everywhere else."""

from __future__ import annotations

import dataclasses
import json

import h5py
import numpy as np
import pytest

import chanfmt
from chanfmt.algebra.export import describe
from chanfmt.algebra.merge import merge
from chanfmt.algebra.validate import validate
from chanfmt.base.errors import AtlasError, UsageError
from chanfmt.cli.main import main
from chanfmt.format.records import Block
from chanfmt.format.texts import configuration, object_lines, parsed
from chanfmt.format.writer import write_atlas
from chanfmt.reporting.make import make_report
from tests.support.factory import random_content

DEEP = "[" * 5_000
HUGE = "9" * 5_000
NO_OBJECT = {
    "number": "7",
    "list": "[1, 2]",
    "null": "null",
    "text": '"prune"',
    "true": "true",
    "deep": DEEP,
    "deep-inside": '{"command": ' + DEEP + "]" * len(DEEP) + "}",
    "huge": HUGE,
    "huge-inside": '{"command": ' + HUGE + "}",
    "infinite": '{"seconds": 1e999}',
    "no-json": "{command: 1}",
    "control": '{"command": "\x1b[31m"}',
}
GOOD = json.dumps({"command": "label", "version": "0.1.0"})


@pytest.fixture
def path(tmp_path):
    write_atlas(random_content(), tmp_path / "a.h5")
    return tmp_path / "a.h5"


def put(path, where, value):
    """Set the attribute or the first text of the column ``where``."""
    with h5py.File(path, "r+") as file:
        name, _, attribute = where.partition("@")
        if attribute:
            file[name].attrs[attribute] = value
        else:
            file[name][0] = value


def codes(path):
    return {(finding.code, finding.path) for finding in validate(path) if finding.code != "E401"}


@pytest.mark.parametrize("line", NO_OBJECT.values(), ids=NO_OBJECT)
@pytest.mark.parametrize("lines", ["{}", GOOD + "\n{}", "{}\n" + GOOD], ids=["alone", "last", "first"])
def test_a_history_line_that_is_no_object(path, line, lines, capsys):
    put(path, "producer@history", lines.replace("{}", line, 1))
    assert ("E110", "/producer@history") in codes(path)
    with chanfmt.open(path) as atlas:
        assert atlas.blocks
        for read in (lambda: atlas.producer, atlas.content):
            with pytest.raises(AtlasError, match="/producer@history is not valid") as caught:
                read()
            assert caught.value.code == "E110"
            assert "\n" not in caught.value.message
            assert len(caught.value.message) < 200
    assert main(["validate", str(path)]) == 1
    assert main(["info", "--json", str(path)]) == 2
    assert main(["strip", str(path), "-o", str(path.with_name("b.h5"))]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_a_history_of_objects_is_read(path):
    put(path, "producer@history", f"{GOOD}\n\n{GOOD}\n")
    assert not {code for code, _ in codes(path)} & {"E110"}
    with chanfmt.open(path) as atlas:
        assert [line["command"] for line in atlas.producer.history] == ["label", "label"]
        assert atlas.producer.commands() == (atlas.producer.command, "label", "label")


@pytest.mark.parametrize("text", ["7", '"ab"', '{"a": 1}', "[1]", "[null]", DEEP, HUGE, ""])
def test_architectures(path, text):
    put(path, "model@architectures", text)
    assert ("E110", "/model@architectures") in codes(path)
    with pytest.raises(AtlasError, match="/model@architectures is not valid") as caught:
        chanfmt.open(path)
    assert caught.value.code == "E110"


@pytest.mark.parametrize("text", ["7", "[]", '{"torch": 2}', '{"torch": null}', DEEP, HUGE, ""])
def test_versions(path, text):
    put(path, "producer@versions", text)
    assert ("E110", "/producer@versions") in codes(path)
    with chanfmt.open(path) as atlas, pytest.raises(AtlasError, match="/producer@versions is not valid"):
        _ = atlas.producer


@pytest.mark.parametrize("text", ["7", "[]", "null", '"a"', DEEP, HUGE, "", "{"])
def test_config(tmp_path, text):
    content = random_content()
    write_atlas(dataclasses.replace(content, model=dataclasses.replace(content.model, config=text)), tmp_path / "a.h5")
    assert ("E110", "/model@config") in codes(tmp_path / "a.h5")
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        assert make_report(atlas).sections


def test_a_config_may_hold_what_models_hold():
    assert configuration('{"time_step_limit": [0.0, Infinity]}') == {"time_step_limit": [0.0, float("inf")]}


@pytest.mark.parametrize("text", ["7", "[]", '{"a": 1}', '{"a": ["f4", 3]}', '{"a": ["f4", [0]]}', '{"a": ["f4", [1], 2]}', DEEP])
def test_contribution_inputs(tmp_path, text):
    content = random_content()
    rows = tuple(dataclasses.replace(row, inputs=text) for row in content.calibration.contributions)
    calibration = dataclasses.replace(content.calibration, contributions=rows)
    write_atlas(dataclasses.replace(content, calibration=calibration), tmp_path / "a.h5")
    assert ("E110", "/calibration/contribution_inputs") in codes(tmp_path / "a.h5")
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        assert describe(atlas)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("7", "E110"),
        ("{}", "E110"),
        ("[7]", "E110"),
        (DEEP, "E110"),
        (HUGE, "E110"),
        ('[{"role":"up","tensor":"a","parameter":"a","axis":0,"start":0,"stop":96,"step":1,"index":"0"}]', "E110"),
        ('[{"role":"up","tensor":"a","parameter":"a","axis":0,"start":-1,"stop":96,"step":1}]', "E204"),
        ('[{"role":"up","tensor":"a","parameter":"a","axis":0,"start":1' + "0" * 40 + ',"stop":96,"step":1}]', "E204"),
    ],
)
def test_tensors(path, text, code):
    put(path, "block/tensors", text)
    assert code in {found for found, _ in codes(path)}
    with chanfmt.open(path) as atlas, pytest.raises(AtlasError, match="/block/tensors") as caught:
        list(atlas.blocks[0].tensors)
    assert caught.value.code == code


def test_keys_of_a_newer_minor_version_are_passed_over():
    text = '[{"role":"up","tensor":"a","parameter":"b","axis":null,"start":0,"stop":0,"step":1,"newer":{"a":[1e3,null]}}]'
    (item,) = Block.tensors_from_json(text)
    assert (item.role, item.tensor, item.parameter, item.axis, item.index) == ("up", "a", "b", None, None)


def test_tensors_are_parsed_when_they_are_asked_for(path):
    put(path, "block/tensors", "[")
    with chanfmt.open(path) as atlas:
        np.testing.assert_array_equal(atlas.stacks["decoder"].row("label", 0).shape, (96,))
        assert len(atlas.blocks[1].tensors) == 3


@pytest.mark.parametrize("value", [np.arange(3), np.array(["a", "b"], dtype=h5py.string_dtype())], ids=["numbers", "texts"])
def test_an_extension_attribute_of_several_values(path, value):
    with h5py.File(path, "r+") as file:
        file.create_group("x_lab").attrs["note"] = value
    assert ("E018", "/x_lab@note") in codes(path)
    with chanfmt.open(path) as atlas, pytest.raises(AtlasError, match="/x_lab@note is not a single") as caught:
        atlas.content()
    assert caught.value.code == "E018"
    with chanfmt.open(path) as atlas, pytest.raises((AtlasError, UsageError)):
        merge([atlas, atlas])


@pytest.mark.parametrize(
    "value", [7, np.arange(3), np.array(["a", "b"], dtype=h5py.string_dtype())], ids=["number", "numbers", "texts"]
)
@pytest.mark.parametrize("name", ["long_name", "units", "merge"])
def test_a_text_of_an_extension_metric_that_is_none(path, name, value):
    with h5py.File(path, "r+") as file:
        group = file.create_group("x_lab/decoder")
        for dimension in ("layer", "channel"):
            group[dimension] = file[f"stacks/decoder/{dimension}"][...]
            group[dimension].make_scale(dimension)
        group["score"] = np.zeros((4, 96), dtype="<f4")
        for axis, dimension in enumerate(("layer", "channel")):
            group["score"].dims[axis].attach_scale(group[dimension])
        group["score"].attrs[name] = value
    with chanfmt.open(path) as atlas:
        for read in (lambda: atlas.stacks["decoder"].all_metrics, atlas.extensions):
            with pytest.raises(AtlasError, match=r"is not a (text|single text)"):
                read()


def test_parsed_says_where():
    with pytest.raises(AtlasError) as caught:
        parsed("[", dict[str, str], "/producer@versions")
    assert (caught.value.code, caught.value.where) == ("E110", "/producer@versions")
    assert object_lines("", "/producer@history") == ()
