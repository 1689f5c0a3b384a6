"""Protect files: three formats, written and read, and files that are not protect files."""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from chanfmt.algebra.export import export
from chanfmt.base.errors import ChanfmtError, UsageError
from chanfmt.format.reader import Atlas
from chanfmt.format.writer import write_atlas
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from surgery.planning.protect_file import read_protect_file, write_protect_file
from tests.support.factory import moe_atlas, moe_content, random_atlas

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return Atlas.open(random_atlas(tmp_path_factory.mktemp("atlas") / "a.h5", layers=3, channels=137))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return Atlas.open(moe_atlas(tmp_path_factory.mktemp("atlas") / "e.h5"))


def json_file(path: Path, atlas: Atlas, layers: Any, **extra: Any) -> Path:
    value = {"format": "protect/1", "atlas_sha256": atlas.content_sha256, "layers": layers} | extra
    path.write_text(json.dumps(value))
    return path


def marked(path: Path, atlas: Atlas) -> set[tuple[int, ...]]:
    """(block, channel) or (block, expert, channel) of what ``path`` names."""
    masks, _ = read_protect_file(path, atlas)
    return {(index, *where) for index, mask in masks.items() for where in np.argwhere(mask).tolist()}


def test_a_json_file_joins_the_union(atlas: Atlas, tmp_path: Path) -> None:
    name = str(json_file(tmp_path / "p.json", atlas, {"1": [136, 0, 7], "2": []}))
    plan = make_plan(atlas, PlanOptions(0.9, "magnitude", protect=("supernodes", name)))
    assert {0, 7, 136} <= set(plan.blocks[1].kept)
    assert plan.protect == ("supernodes", "p.json")
    assert plan.warnings == ()
    core = sum(block.supernodes for block in plan.blocks)
    assert core < plan.protected <= core + 3


def test_a_file_of_another_atlas_warns(atlas: Atlas, tmp_path: Path) -> None:
    path = json_file(tmp_path / "p.json", atlas, {"1": [3]}, atlas_sha256="0" * 64)
    masks, warnings = read_protect_file(path, atlas)
    assert np.flatnonzero(masks[1]).tolist() == [3]
    assert "another atlas" in warnings[0]
    assert make_plan(atlas, PlanOptions(0.5, protect=(str(path),))).warnings == warnings


def test_json_keys(experts: Atlas, tmp_path: Path) -> None:
    path = json_file(
        tmp_path / "p.json",
        experts,
        {
            "0": [95],
            "decoder.experts/1/1": [0, 23],
            "1/2": [4],
            "decoder/0": [1],
        },
    )
    assert marked(path, experts) == {(0, 95), (0, 1), (1, 1, 0), (1, 1, 23), (1, 2, 4)}
    with pytest.raises(UsageError, match=r"p\.json: layer 'decoder/0': it names channel 95 twice"):
        read_protect_file(json_file(path, experts, {"0": [95], "decoder/0": [95]}), experts)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", "0,95\n0,1\n"),
        ("p.txt", "# mine\n0,95  # the best\n\n  0 , 1\n"),
        ("p.csv", "\ufefflayer,channel\r\n0,95\r\n0,1\r\n"),
        ("p.txt", "channel,layer\n95,0\n1,0\n"),
        ("p.csv", 'stack,label,expert,layer,channel\n"decoder",2,,0,95\ndecoder,1,,0,1\n'),
    ],
)
def test_lines_of_dense_ffns(experts: Atlas, tmp_path: Path, name: str, text: str) -> None:
    path = tmp_path / name
    path.write_text(text, newline="")
    assert marked(path, experts) == {(0, 95), (0, 1)}


def test_lines_of_experts(experts: Atlas, tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("layer,expert,channel\n1,1,0\n3,3,23\n0,,5\n")
    assert marked(path, experts) == {(1, 1, 0), (3, 3, 23), (0, 5)}


@pytest.mark.parametrize("name", ["atlas", "experts"])
def test_rows_of_an_exported_table_are_a_protect_file(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(name)
    export(found, tmp_path / "all.csv")
    lines = (tmp_path / "all.csv").read_text().splitlines(keepends=True)
    label = lines[0].split(",").index("label")
    (tmp_path / "halo.csv").write_text("".join([lines[0], *(line for line in lines[1:] if line.split(",")[label] == "halo")]))
    masks, _ = read_protect_file(tmp_path / "halo.csv", found)
    for block, stack in found.rows():
        np.testing.assert_array_equal(masks[block.index], stack["label"][block.row] == 1)
    assert any(mask.any() for mask in masks.values())


@pytest.mark.parametrize("name", ["atlas", "experts"])
def test_what_is_written_is_read_back(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(name)
    random = np.random.default_rng(0)
    masks = {block.index: random.random(block.shape) < 0.2 for block in found.blocks[:-1]}
    write_protect_file(tmp_path / "p.json", found, masks)
    back, warnings = read_protect_file(tmp_path / "p.json", found)
    assert warnings == ()
    for block in found.blocks:
        np.testing.assert_array_equal(back[block.index], masks.get(block.index, np.zeros(block.shape, dtype=bool)))
    assert [path.name for path in tmp_path.iterdir()] == ["p.json"]


def test_a_layer_is_a_line(experts: Atlas, tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    masks = {block.index: np.zeros(block.shape, dtype=bool) for block in experts.blocks}
    write_protect_file(path, experts, masks)
    assert json.loads(path.read_text())["layers"] == {}
    masks[0][[3, 70]] = masks[2][1, 5] = True
    write_protect_file(path, experts, masks)
    before = path.read_text().splitlines()
    assert [line.strip() for line in before[4:6]] == ['"0": [3, 70],', '"2/1": [5]']
    masks[0][4] = True
    write_protect_file(path, experts, masks)
    assert [pair for pair in zip(before, path.read_text().splitlines(), strict=True) if pair[0] != pair[1]] == [
        ('  "0": [3, 70],', '  "0": [3, 4, 70],')
    ]


def test_ffns_that_share_a_layer_need_their_stack(tmp_path: Path) -> None:
    content = moe_content()
    shared = dataclasses.replace(content.stacks[0], name="decoder.shared", kind="shared")
    blocks = (*content.blocks, dataclasses.replace(content.blocks[0], index=4, stack="decoder.shared", module="shared"))
    write_atlas(dataclasses.replace(content, blocks=blocks, stacks=(*content.stacks, shared)), tmp_path / "a.h5")
    with Atlas.open(tmp_path / "a.h5") as atlas:
        mask = np.zeros(96, dtype=bool)
        mask[[2, 7]] = True
        write_protect_file(tmp_path / "p.json", atlas, {4: mask})
        assert json.loads((tmp_path / "p.json").read_text())["layers"] == {"decoder.shared/0": [2, 7]}
        assert marked(tmp_path / "p.json", atlas) == {(4, 2), (4, 7)}
        with pytest.raises(UsageError, match="layer 0 has several FFNs") as caught:
            read_protect_file(json_file(tmp_path / "q.json", atlas, {"0": [1]}), atlas)
        assert "decoder, decoder.shared" in str(caught.value.hint)


def test_a_failed_write_leaves_nothing(atlas: Atlas, tmp_path: Path) -> None:
    with pytest.raises(ChanfmtError, match="cannot write"):
        write_protect_file(tmp_path / "missing" / "p.json", atlas, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"1": [137]}, "no channel 137"),
        ({"1": [-1]}, "no channel -1"),
        ({"1": [4, 4]}, "channel 4 twice"),
        ({"3": [1]}, "no layer 3"),
        ({"x": [1]}, "'x' is not a layer"),
        ({"01": [1]}, "'01' is not a layer"),
        ({"²": [1]}, "not a layer"),
        ({"9" * 5000: [1]}, "not a layer"),
        ({"1": [1.0]}, "not a list"),
        ({"1": [True]}, "not a list"),
        ({"1": "12"}, "not a list"),
        ({"1": [10**40]}, "no channel"),
        ([], "not a protect"),
        ({"1/0": [1]}, "no experts"),
        ({"": [1]}, "not a layer"),
        ({"/1": [1]}, "no stack ''"),
        ({"1/": [1]}, "not an expert"),
        ({"decoder/1/2/3": [1]}, "not a layer"),
    ],
)
def test_json_that_cannot_be(atlas: Atlas, tmp_path: Path, layers: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        read_protect_file(json_file(tmp_path / "p.json", atlas, layers), atlas)
    assert "p.json" in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "[]",
        "{}",
        '{"format": "protect/2", "layers": {}}',
        "[" * 100_000,
        '{"format": "protect/1", "layers": {"1": [1], "1": [2]}}',
    ],
)
def test_json_that_is_none(atlas: Atlas, tmp_path: Path, text: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"p\.json"):
        read_protect_file(path, atlas)


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("1,3\n1,137\n", 2, "no channel 137"),
        ("1,3\n\n1,3\n", 3, "channel 3 twice"),
        ("1,3\n9,3\n", 2, "no layer 9"),
        ("1,3,4\n", 1, "has 3 columns"),
        ("1\n", 1, "has 1 columns"),
        ("1;3\n", 1, "separated by semicolons"),
        ("1,3\n1,x\n", 2, "not a channel"),
        ("1,-3\n", 1, "not a channel"),
        ("-1,3\n", 1, "neither a header"),
        ("layer,chanel\n1,3\n", 1, "neither a header"),
        ("layer,layer,channel\n1,1,3\n", 1, "neither a header"),
        ("layer,channel\n01,3\n", 2, "not a layer"),
        ("layer,channel,expert\n1,3,0\n", 2, "no experts"),
        ("layer,channel,stack\n1,3,other\n", 2, "no stack 'other'"),
        ("layer,channel\n1,3\nlayer,channel\n", 3, "not a layer"),
        ('1,"3\n', 1, "unexpected end"),
        ("1,1e0\n", 1, "not a channel"),
        ("1,3\n1,\0\n", 2, "not a channel|NUL"),
        ("1," + "3" * 200_000, 1, "field larger"),
        ("1,²\n", 1, "not a channel"),
    ],
)
@pytest.mark.parametrize("suffix", [".csv", ".txt"])
def test_lines_that_cannot_be(atlas: Atlas, tmp_path: Path, suffix: str, text: str, line: int, message: str) -> None:
    path = tmp_path / f"p{suffix}"
    path.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        read_protect_file(path, atlas)
    assert f"p{suffix}, line {line}:" in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("suffix", [".json", ".csv", ".txt"])
def test_files_that_cannot_be_read(atlas: Atlas, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"p{suffix}"
    with pytest.raises(UsageError, match=rf"cannot read .*p\{suffix}"):
        read_protect_file(path, atlas)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=rf"p\{suffix} is not text"):
        read_protect_file(path, atlas)
    with path.open("wb") as stream:
        stream.truncate((64 << 20) + 1)
    with pytest.raises(UsageError, match=rf"p\{suffix} is larger than 64 MB"):
        read_protect_file(path, atlas)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(UsageError, match="is not a file"):
        read_protect_file(path, atlas)
