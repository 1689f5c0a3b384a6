"""An atlas reads back as it was written; a file that should not be trusted is refused with a sentence."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import os
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest

import chanfmt
from chanfmt.algebra.validate import validate
from chanfmt.base.errors import AtlasError, CheckError
from chanfmt.format import schema, writer
from chanfmt.format.records import Block, ExtensionGroup, ExtensionVariable
from chanfmt.format.writer import atlas_image, write_atlas
from tests.support.factory import moe_content, random_atlas, random_content


@pytest.fixture
def atlas_path(tmp_path):
    return random_atlas(tmp_path / "a.h5")


def test_round_trip(atlas_path):
    expected = random_content()
    with chanfmt.open(atlas_path, verify=True) as atlas:
        found = atlas.content()
    for name in ("title", "model", "labels", "core_rho", "blocks", "producer", "status", "dropped", "extensions"):
        assert getattr(found, name) == getattr(expected, name), name
    for field in dataclasses.fields(expected.calibration):
        np.testing.assert_array_equal(
            getattr(found.calibration, field.name), getattr(expected.calibration, field.name), field.name
        )
    for stack, other in zip(found.stacks, expected.stacks, strict=True):
        assert set(stack.variables) == set(other.variables)
        assert stack.supports == other.supports
        for name, values in other.variables.items():
            dtype = schema.STACK_VARIABLE_BY_NAME[name].dtype
            assert stack.variables[name].dtype == np.dtype(dtype), name
            np.testing.assert_array_equal(stack.variables[name], np.asarray(values, dtype=dtype), name)


def test_extensions_round_trip(tmp_path):
    random = np.random.default_rng(0)
    extension = ExtensionGroup(
        "x_lab/decoder",
        {"note": "hello", "runs": 3, "share": 0.5},
        (
            ExtensionVariable("layer", ("layer",), np.arange(4, dtype="i4"), "layer index in the model", "1", ""),
            ExtensionVariable("channel", ("channel",), np.arange(96, dtype="i4"), "channel index in the FFN", "1", ""),
            ExtensionVariable("hessian", ("layer", "channel"), random.random((4, 96)), "diagonal Hessian", "nats", "sum"),
            ExtensionVariable("name", ("layer",), ["a", "b", "c", "d"], "what we call it", "", "drop"),
            ExtensionVariable(
                "word", ("layer", "side"), np.array([["a", "b"]] * 4, dtype=object), "a word for each", "", "equal"
            ),
            ExtensionVariable("side", ("side",), np.arange(2, dtype="i4"), "side index", "1", ""),
        ),
    )
    write_atlas(dataclasses.replace(random_content(), extensions=(extension,), dropped=("wanda_group",)), tmp_path / "a.h5")
    with chanfmt.open(tmp_path / "a.h5", verify=True) as atlas:
        outer, found = atlas.content().extensions
        assert atlas.dropped == ("wanda_group",)
    assert outer == ExtensionGroup("x_lab", {}, ())
    assert (found.path, found.attributes) == (extension.path, extension.attributes)
    by_name = {variable.name: variable for variable in found.variables}
    assert set(by_name) == {variable.name for variable in extension.variables}
    for variable in extension.variables:
        other = by_name[variable.name]
        assert (other.dimensions, other.long_name, other.units, other.merge) == (
            variable.dimensions,
            variable.long_name,
            variable.units,
            variable.merge,
        )
        np.testing.assert_array_equal(other.values, variable.values)


def test_without_stored_tokens(tmp_path):
    content = random_content()
    content = dataclasses.replace(content, calibration=dataclasses.replace(content.calibration, token_ids=None))
    write_atlas(content, tmp_path / "a.h5")
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        assert atlas.calibration.token_ids is None
        assert atlas.calibration.sequences == 16


def test_same_content_same_bytes(monkeypatch):
    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2026, 1, 1, tzinfo=tz)

    monkeypatch.setattr(writer.datetime, "datetime", Clock)
    first, _ = atlas_image(random_content())
    time.sleep(1.1)
    assert atlas_image(random_content())[0] == first


def test_one_row_equals_the_array(atlas_path):
    with chanfmt.open(atlas_path) as atlas:
        stack = atlas.stacks["decoder"]
        row = stack.row("lp", 2)
        np.testing.assert_array_equal(row, stack["lp"][2])


def test_same_content_same_digest(tmp_path):
    first, second = write_atlas(random_content(), tmp_path / "a.h5"), write_atlas(random_content(), tmp_path / "b.h5")
    # `created` is content too; two writes within a second agree, others need not.
    with chanfmt.open(tmp_path / "a.h5") as a, chanfmt.open(tmp_path / "b.h5") as b:
        assert (first == second) == (a.created == b.created)


def test_every_flipped_bit_is_noticed(atlas_path):
    image = atlas_path.read_bytes()
    random = np.random.default_rng(0)
    for position in [*range(0, 2000, 7), *random.integers(0, len(image), 300)]:
        changed = bytearray(image)
        changed[position] ^= 1 << random.integers(8)
        atlas_path.write_bytes(changed)
        with pytest.raises(AtlasError):
            chanfmt.open(atlas_path, verify=True)


def test_changed_data_is_told_from_changed_bookkeeping(atlas_path):
    image = bytearray(atlas_path.read_bytes())
    with h5py.File(atlas_path) as file:
        offset = file["stacks/decoder/lp"].id.get_offset()
    image[offset + 17] ^= 4
    atlas_path.write_bytes(image)
    with chanfmt.open(atlas_path) as atlas, pytest.raises(AtlasError, match="content_sha256"):
        atlas.verify()


def test_infinite_values_are_not_written(tmp_path):
    content = random_content()
    content.stacks[0].variables["lp"][0, 0] = np.inf
    with pytest.raises(CheckError, match="infinite"):
        write_atlas(content, tmp_path / "a.h5")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = random_atlas(tmp_path / "a.h5")
    before = path.read_bytes()
    script = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from tests.support.factory import random_atlas\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "random_atlas(Path(sys.argv[1]), seed=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert os.strerror(errno.EFBIG) in done.stderr
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["a.h5"]


def test_block_lookup(atlas_path):
    with chanfmt.open(atlas_path) as atlas:
        assert atlas.block(2).index == 2
        with pytest.raises(AtlasError, match="no layer 9"):
            atlas.block(9)
        with pytest.raises(AtlasError, match="no stack"):
            atlas.block(2, "encoder")


@pytest.mark.parametrize(
    "text",
    [
        "[",
        "[" * 100_000,
        "{}",
        '[{"role": "write"}]',
        '[{"role":"write","tensor":"a","parameter":"a","axis":0,"start":5,"stop":2,"step":1}]',
        '[{"role":"write","tensor":"a","parameter":"a","axis":0,"start":0,"stop":2,"step":0}]',
        '[{"role":1,"tensor":"a","parameter":"a","axis":0,"start":0,"stop":2,"step":1}]',
        '[{"role":"write","tensor":"a","parameter":"a","axis":0,"start":0,"stop":2.0,"step":1}]',
        '[{"role":"write","tensor":"a","parameter":"a","axis":true,"start":0,"stop":2,"step":1}]',
        '[{"role":"write","tensor":"a","parameter":"a","axis":0,"start":0,"stop":2,"step":1,"index":"0"}]',
        '[{"role":"write","tensor":"a","parameter":"a","axis":0,"start":0,"stop":1' + "0" * 30 + ',"step":1}]',
        '[{"role":"write","tensor":"a","parameter":"a","axis":0,"start":0,"stop":' + "9" * 5000 + ',"step":1}]',
        '[{"role":"write","tensor":"\\ud800","parameter":"a","axis":0,"start":0,"stop":2,"step":1}]',
        "null",
        "7",
    ],
)
def test_bad_tensor_tables_are_refused(text):
    with pytest.raises(AtlasError, match="tensors"):
        Block.tensors_from_json(text)


def edit(path, change):
    with h5py.File(path, "r+") as file:
        change(file)


def replace_dataset(name, **arguments):
    def change(file):
        del file[name]
        file.create_dataset(name, **arguments)

    return change


def set_attribute(name, value):
    return lambda file: file.attrs.__setitem__(name, value)


def link_out(file):
    file["stacks/decoder/other"] = h5py.ExternalLink("b.h5", "/")


def hard_link_cycle(file):
    file["stacks/decoder/again"] = file["stacks"]


def deep(file):
    file.create_group("a/b/c/d/e")


def external_storage(file):
    del file["stacks/decoder/max_abs_u"]
    file.create_dataset("stacks/decoder/max_abs_u", shape=(4, 96), dtype="f4", external=[("secret", 0, 4 * 96 * 4)])


def virtual(file):
    layout = h5py.VirtualLayout(shape=(4, 96), dtype="f4")
    layout[:] = h5py.VirtualSource("b.h5", "x", shape=(4, 96))
    del file["stacks/decoder/max_abs_u"]
    file.create_virtual_dataset("stacks/decoder/max_abs_u", layout)


HOSTILE = {
    "external link": (link_out, "is a link"),
    "soft link": (lambda file: file.__setitem__("stacks/decoder/x", h5py.SoftLink("/model")), "is a link"),
    "hard link cycle": (hard_link_cycle, "same object"),
    "nested groups": (deep, "nested too deep"),
    "external storage": (external_storage, "another file"),
    "virtual dataset": (virtual, "another file"),
    "huge shape": (
        replace_dataset("stacks/decoder/max_abs_u", shape=(10**9, 10**9), dtype="f4", chunks=(1, 1024)),
        "chunked|declares",
    ),
    "unwritten data": (replace_dataset("stacks/decoder/max_abs_u", shape=(4, 96), dtype="f4"), "declares|impossible"),
    "compressed": (replace_dataset("stacks/decoder/max_abs_u", data=np.zeros((4, 96), "f4"), compression="gzip"), "chunked"),
    "half precision": (replace_dataset("stacks/decoder/max_abs_u", data=np.zeros((4, 96), "f2")), "type"),
    "big endian": (replace_dataset("stacks/decoder/max_abs_u", data=np.zeros((4, 96), ">f4")), "type"),
    "wrong dtype": (replace_dataset("stacks/decoder/max_abs_u", data=np.zeros((4, 96), "f8")), "has type"),
    "no dimension scales": (replace_dataset("stacks/decoder/max_abs_u", data=np.zeros((4, 96), "f4")), "dimensions"),
    "other format": (set_attribute("format", "anndata"), "not an importance atlas"),
    "newer major": (set_attribute("format_version", "2.0"), "upgrade"),
    "unknown feature": (set_attribute("features_required", "hologram"), "hologram"),
    "unreadable version": (set_attribute("format_version", "one"), "format_version"),
    "number for text": (set_attribute("status", 3), "not a text"),
    "missing sums": (lambda file: file.__delitem__("stacks/decoder/sum_u2"), "lacks 'sum_u2'"),
    "unknown status": (set_attribute("status", "half"), "status"),
    "impossible rho": (lambda file: file["labels"].attrs.__setitem__("rho", float("nan")), "rho"),
    "missing group": (lambda file: file.__delitem__("block"), "block"),
    "missing attribute": (lambda file: file["model"].attrs.__delitem__("id"), "lacks the attribute"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused(atlas_path, name):
    change, message = HOSTILE[name]
    edit(atlas_path, change)
    with pytest.raises(AtlasError, match=message) as caught:
        chanfmt.open(atlas_path)
    assert str(atlas_path) in caught.value.message


def test_a_newer_minor_version_is_read(atlas_path):
    edit(atlas_path, set_attribute("format_version", "1.7"))
    edit(atlas_path, lambda file: file.create_group("x_somebody").attrs.__setitem__("note", "hello"))
    with chanfmt.open(atlas_path) as atlas:
        assert atlas.format_version == "1.7"


def test_truncated_files_are_refused(atlas_path, tmp_path):
    image = atlas_path.read_bytes()
    for length in np.linspace(1, len(image) - 1, 40).astype(int):
        path = tmp_path / "t.h5"
        path.write_bytes(image[:length])
        with pytest.raises(AtlasError):
            chanfmt.open(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist"),
        (lambda path: path.mkdir(), "directory"),
        (lambda path: path.touch(), "empty"),
        (lambda path: path.write_text("hello"), "not an importance atlas"),
        (lambda path: h5py.File(path, "w").close(), "not an importance atlas"),
        (lambda path: os.mkfifo(path), "regular file"),
    ],
)
def test_not_an_atlas(tmp_path, make, message):
    path = tmp_path / "x.h5"
    make(path)
    with pytest.raises(AtlasError, match=message):
        chanfmt.open(path)


def test_the_image_needs_no_disk():
    image, digest = atlas_image(random_content())
    assert image.startswith(b"\x89HDF")
    assert len(digest) == 64


def test_reading_costs_little_memory_before_a_metric_is_asked_for(tmp_path):
    path = random_atlas(tmp_path / "a.h5", layers=24, channels=8192, hidden=8)
    script = (
        "import resource, sys, chanfmt\nfrom chanfmt.format.reader import Atlas\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "chanfmt.open(sys.argv[1])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = int(subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True).stdout)
    unit = 1 if sys.platform == "darwin" else 1024
    assert grown * unit < path.stat().st_size / 2


@pytest.mark.parametrize("make", [random_content, moe_content])
def test_an_atlas_built_in_its_file_says_the_same_as_one_built_in_memory(tmp_path, monkeypatch, make):
    def write_root(file, content):
        original(file, content)
        file.attrs["created"] = "2026-01-01T00:00:00+00:00"

    content, original = make(), writer._write_root
    monkeypatch.setattr(writer, "_write_root", write_root)
    digest = write_atlas(content, tmp_path / "memory.h5")
    monkeypatch.setattr(writer, "IN_MEMORY", 0)
    assert write_atlas(content, tmp_path / "file.h5") == digest
    assert not validate(tmp_path / "file.h5")
    # What is reserved is enough, and what is left of it is given back.
    assert (tmp_path / "file.h5").stat().st_size <= writer._size(content)
    assert (tmp_path / "file.h5").stat().st_size < 1.1 * (tmp_path / "memory.h5").stat().st_size
