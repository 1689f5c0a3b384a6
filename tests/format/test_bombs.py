"""Texts that share their bytes: a small file that asks for any amount of memory."""

from __future__ import annotations

import os
import re

import h5py
import numpy as np
import pytest

import chanfmt
from chanfmt.algebra.validate import validate
from chanfmt.base.errors import AtlasError
from chanfmt.format import digest, reader
from chanfmt.format.reader import Atlas
from chanfmt.format.writer import write_atlas
from tests.support.factory import random_content

LONG, SHORT = 400_000, 113


@pytest.fixture
def path(tmp_path):
    write_atlas(random_content(), tmp_path / "a.h5")
    return tmp_path / "a.h5"


def share(path) -> int:
    """Let every text of ``SHORT`` bytes be the one text of ``LONG`` bytes. Returns the number of texts."""
    image = bytearray(path.read_bytes())
    heaps = [match.start() for match in re.finditer(b"GCOL", image)]

    def references(length: int) -> list[int]:
        wanted = [length.to_bytes(4, "little") + heap.to_bytes(8, "little") for heap in heaps]
        return [match.start() for start in wanted for match in re.finditer(re.escape(start), bytes(image))]

    (first,) = references(LONG)
    others = references(SHORT)
    for other in others:
        image[other : other + 16] = image[first : first + 16]
    path.write_bytes(image)
    return len(others)


def test_attributes_that_share_a_text(path):
    with h5py.File(path, "r+") as file:
        for number in range(5):
            group = file.create_group(f"x_lab/g{number}")
            for index in range(60):
                group.attrs[f"a{index}"] = "y" * SHORT
        file["x_lab"].attrs["long"] = "x" * LONG
    assert share(path) == 300
    assert [finding.code for finding in validate(path)] == ["E014"]
    with Atlas.open(path) as atlas, pytest.raises(AtlasError, match="bytes in a file of"):
        atlas.extensions()


def test_data_sets_that_share_a_text(path):
    with h5py.File(path, "r+") as file:
        group = file.create_group("x_lab")
        group.create_dataset("item", data=np.arange(1, dtype="<i4")).make_scale("item")
        for number in range(20):
            group.create_dataset(f"t{number}", data=["y" * SHORT], dtype=h5py.string_dtype("utf-8"))
        group.attrs["long"] = "x" * LONG
    assert share(path) == 20
    assert [finding.code for finding in validate(path)] == ["E014"]
    with pytest.raises(AtlasError, match="bytes in a file of"):
        Atlas.open(path)


@pytest.mark.parametrize(
    ("place", "name", "code"), [("/", "format", "E002"), ("model", "id", "E018"), ("model", "config", "E018")]
)
def test_an_attribute_of_many_texts_is_not_read(path, place, name, code):
    with h5py.File(path, "r+") as file:
        del file[place].attrs[name]
        file[place].attrs.create(name, ["y" * SHORT] * 500, dtype=h5py.string_dtype("utf-8"))
        file.create_group("x_lab").attrs["long"] = "x" * LONG
    with pytest.raises(AtlasError) as caught:
        Atlas.open(path)
    assert caught.value.code == code
    assert [finding.code for finding in validate(path)] == [code]


def test_honest_texts_of_the_size_of_the_file(path):
    with h5py.File(path, "r+") as file:
        group = file.create_group("x_lab")
        for index in range(60):
            group.attrs[f"a{index}"] = "y" * 100_000
    with Atlas.open(path) as atlas:
        assert len(atlas.extensions()[0].attributes) == 60
        # An attribute that is read again counts once.
        atlas.extensions()
    assert not [finding for finding in validate(path) if finding.code.startswith("E0")]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_digests_of_an_untrusted_file_are_recomputed_in_the_other_process(path, monkeypatch, tmp_path):
    log = tmp_path / "log"

    def noted(container):
        with log.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return digest.content_sha256(container)

    monkeypatch.setattr(reader, "content_sha256", noted)
    with chanfmt.open(path, verify=True, contained=True):
        pass
    (pid,) = log.read_text().split()
    assert int(pid) != os.getpid()
    log.unlink()
    with h5py.File(path, "r+") as file:
        file["stacks/decoder/lp"][0, 0] += 1
    with pytest.raises(AtlasError, match="does not match its content_sha256"):
        chanfmt.open(path, verify=True, contained=True)
