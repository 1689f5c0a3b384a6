"""Every selector against plain numpy, and texts that are not selectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from chanfmt.base.errors import AtlasError, UsageError
from chanfmt.format import schema
from chanfmt.format.reader import Atlas
from surgery.planning.protect import protect_list
from surgery.planning.selectors import file_name, select
from tests.support.edited import edited, with_metric
from tests.support.factory import moe_atlas, random_atlas, random_content

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    return Atlas.open(random_atlas(tmp_path_factory.mktemp("atlas") / "a.h5", layers=3, channels=137))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Atlas:
    """Layer 0 is dense, layers 1 to 3 have four experts of 24 channels; no token reached expert 1 of layer 1."""
    return Atlas.open(moe_atlas(tmp_path_factory.mktemp("atlas") / "e.h5"))


def rows(atlas: Atlas, variable: str) -> dict[tuple[int, int], np.ndarray]:
    """``variable`` of every FFN, or of every expert of it."""
    found = {}
    for block, stack in atlas.rows():
        for number, values in enumerate(np.atleast_2d(stack[variable][block.row])):
            found[block.index, number] = values
    return found


def chosen(atlas: Atlas, selector: str) -> dict[tuple[int, int], set[int]]:
    """Channels that ``selector`` names, of every FFN or expert."""
    masks, warnings = select(selector, atlas)
    assert warnings == ()
    assert masks.keys() == {block.index for block in atlas.blocks}
    for block in atlas.blocks:
        assert masks[block.index].shape == block.shape
        assert masks[block.index].dtype == bool
    return {
        (index, number): set(np.flatnonzero(row).tolist())
        for index, mask in masks.items()
        for number, row in enumerate(np.atleast_2d(mask))
    }


@pytest.mark.parametrize("name", ["atlas", "experts"])
def test_labels(name: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(name)
    expected = {"supernodes": {2}, "halo": {1}, "supernodes+halo": {1, 2}, "none": set()}
    for selector, labels in expected.items():
        assert chosen(found, selector) == {
            key: {channel for channel, label in enumerate(values) if label in labels}
            for key, values in rows(found, "label").items()
        }
    assert any(chosen(found, "halo").values())


def ranked(values: np.ndarray) -> list[int]:
    """Channels from the largest value down, without channels that have no value; if values are equal, the lowest index is first."""
    return sorted(
        (channel for channel in range(len(values)) if not np.isnan(values[channel])),
        key=lambda channel: (-values[channel], channel),
    )


@pytest.mark.parametrize("name", ["atlas", "experts"])
@pytest.mark.parametrize("metric", [metric.name for metric in schema.METRICS])
def test_metrics(name: str, metric: str, request: pytest.FixtureRequest) -> None:
    found = request.getfixturevalue(name)
    values = rows(found, metric)
    order = {key: ranked(row) for key, row in values.items()}
    assert chosen(found, f"top:{metric}=7") == {key: set(ids[:7]) for key, ids in order.items()}
    assert chosen(found, f"top:{metric}=5%") == {
        key: set(ids[: max(1, int(0.05 * len(values[key])))]) for key, ids in order.items()
    }
    assert chosen(found, f"rank:{metric}=3-9") == {key: set(ids[2:9]) for key, ids in order.items()}
    assert chosen(found, f"rank:{metric}=24") == {key: set(ids[23:24]) for key, ids in order.items()}
    limit = float(np.nanmedian(np.concatenate(list(values.values()))))
    above, below = chosen(found, f"above:{metric}={limit!r}"), chosen(found, f"below:{metric}={limit!r}")
    assert above == {key: {channel for channel, value in enumerate(row) if value > limit} for key, row in values.items()}
    assert below == {key: {channel for channel, value in enumerate(row) if value < limit} for key, row in values.items()}
    assert any(chosen(found, f"top:{metric}=7").values())


def test_the_top_by_lp_at_rho_are_the_supernodes(atlas: Atlas) -> None:
    assert chosen(atlas, f"top:lp={100 * atlas.labels.rho:g}%") == chosen(atlas, "supernodes")


def test_equal_values_go_to_the_lowest_index(tmp_path: Path) -> None:
    lp = np.array([[1, 5, 1, 5, 5, 1, 1, 1, 1, 1, 9]], dtype=np.float32)
    with edited(tmp_path / "a.h5", random_content(layers=1, channels=11), lp=lp) as atlas:
        assert chosen(atlas, "top:lp=3")[0, 0] == {10, 1, 3}
        assert chosen(atlas, "rank:lp=3-5")[0, 0] == {3, 4, 0}
        assert chosen(atlas, "above:lp=5")[0, 0] == {10}
        assert chosen(atlas, "top:lp=100%")[0, 0] == set(range(11))


def test_ids(atlas: Atlas, experts: Atlas) -> None:
    assert chosen(atlas, "1:3,10-12,136") == {(0, 0): set(), (1, 0): {3, 10, 11, 12, 136}, (2, 0): set()}
    assert chosen(atlas, "decoder/2:0") == {(0, 0): set(), (1, 0): set(), (2, 0): {0}}
    for key in ("2/3", "decoder.experts/2/3"):
        found = chosen(experts, f"{key}:23,1-2")
        assert found.pop((2, 3)) == {1, 2, 23}
        assert not any(found.values())
    found = chosen(experts, "0:95")
    assert found.pop((0, 0)) == {95}
    assert not any(found.values())


@pytest.mark.parametrize("selector", ["halo", "top:taylor=4", "below:lp=1e9", "1:3-5", "supernodes+halo"])
def test_layers_restrict_any_selector(atlas: Atlas, selector: str) -> None:
    whole, part = chosen(atlas, selector), chosen(atlas, f"{selector}@0-1")
    assert part == {key: ids if key[0] < 2 else set() for key, ids in whole.items()}
    assert not any(chosen(atlas, "1:3@0,2").values())


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("superodes", "unknown selector 'superodes'"),
        ("", "unknown selector"),
        ("top", "unknown selector"),
        ("top:=3", "unknown metric ''"),
        ("top:lpp=3", "unknown metric 'lpp'"),
        ("top:sum_u=3", "unknown metric 'sum_u'"),
        ("top:lp=", "not a count or a percentage"),
        ("top:lp=0", "start at 1"),
        ("top:lp=-1", "not a count"),
        ("top:lp=1.5", "not a count"),
        ("top:lp=138", "no rank 138: an FFN has 137"),
        ("top:lp=0%", "above 0%"),
        ("top:lp=101%", "at most 100%"),
        ("top:lp=nan%", "not a number"),
        ("top:lp=x%", "not a number"),
        ("rank:lp=0-3", "start at 1"),
        ("rank:lp=5-3", "backwards"),
        ("rank:lp=1-3,7", "more than one range"),
        ("rank:lp=130-138", "no rank 138"),
        ("rank:lp=x", "not a rank"),
        ("above:lp=inf", "not a number"),
        ("below:lp=", "not a number"),
        ("1:", "not a channel"),
        ("1:3,", "not a channel"),
        ("1:5,5", "channel 5 twice"),
        ("1:3-9,7", "channel 7 twice"),
        ("1:9-3", "backwards"),
        ("1:137", "no channel 137: the FFN has 137"),
        ("1:0-999999999", "no channel 999999999"),
        ("1:9999999999", "not a channel"),
        ("1:²", "not a channel"),
        ("3:1", "no layer 3"),
        ("01:1", "not a layer"),
        ("1/0:1", "has no experts"),
        ("encoder/1:1", "no stack 'encoder'"),
        ("a/b/1:1", "not a layer"),
        ("halo@3", "no layer 3"),
        ("halo@", "not a layer"),
        ("halo@2-1", "backwards"),
        ("halo@x", "not a layer"),
        ("1:3@0-9", "no layer 9"),
        ("p.yaml", "unknown selector"),
    ],
)
def test_what_is_no_selector(atlas: Atlas, selector: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        select(selector, atlas)
    assert len(caught.value.message) < 200


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("2:1", "layer 2 has experts"),
        ("2/4:1", "no expert 4: it has 4"),
        ("2/3:24", "no channel 24"),
        ("0/1:3", "has no experts"),
        ("decoder/1:1", "no layer 1"),
        ("decoder.experts/0:1", "no layer 0"),
    ],
)
def test_ids_that_no_expert_has(experts: Atlas, selector: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        select(selector, experts)


def test_close_names_and_lists_are_hints(atlas: Atlas) -> None:
    for selector, hint in {
        "superodes": "did you mean supernodes?",
        "top:conectivity=3": "did you mean connectivity?",
        "top:zzz=3": "activation_power",
        "zzz": "rank:METRIC=A-B",
    }.items():
        with pytest.raises(UsageError) as caught:
            select(selector, atlas)
        assert hint in str(caught.value), selector


def test_a_metric_that_the_atlas_lacks(tmp_path: Path) -> None:
    with (
        edited(tmp_path / "a.h5", random_content(layers=1, channels=11), redundancy=None, redundancy_null=None) as atlas,
        pytest.raises(AtlasError, match="no 'redundancy'"),
    ):
        select("top:redundancy=2", atlas)


def test_union_and_unprotect(atlas: Atlas) -> None:
    found = protect_list(["supernodes", "1:3-6", "1:5-8", "none"], atlas, ["1:4-5", "halo"])
    core = chosen(atlas, "supernodes")
    halo = chosen(atlas, "halo")[1, 0]
    for index, ids in ((0, core[0, 0]), (1, (core[1, 0] | {3, 4, 5, 6, 7, 8}) - {4, 5} - halo), (2, core[2, 0])):
        assert set(np.flatnonzero(found.masks[index])) == ids
    assert found.count == sum(int(mask.sum()) for mask in found.masks.values())
    assert found.released == len({3, 4, 5, 6, 7, 8} & ({4, 5} | halo))
    names = [(selection.name, selection.selected) for selection in found.selections]
    assert names == [("supernodes", sum(map(len, core.values()))), ("1:3-6", 4), ("1:5-8", 4), ("none", 0)]
    for number, ids in ((1, {3, 4, 5, 6}), (2, {7, 8})):
        assert set(np.flatnonzero(found.selections[number].new[1])) == ids - {4, 5} - halo - core[1, 0]


def test_unprotect_reaches_what_a_method_protects(atlas: Atlas) -> None:
    found = protect_list(["supernodes"], atlas, ["supernodes@0"])
    assert [bool(found.masks[index].any()) for index in range(3)] == [False, True, True]
    assert found.released == len(chosen(atlas, "supernodes")[0, 0])


@pytest.mark.parametrize(
    ("selector", "name"),
    [
        ("halo@0-3", "halo@0-3"),
        ("/home/me/p.json", "p.json"),
        ("a/b@2/p.csv@1", "p.csv@1"),
        ("a@b/p.txt", "p.txt"),
        ("decoder/1:3", "decoder/1:3"),
        ("top:lp=2%", "top:lp=2%"),
    ],
)
def test_plans_name_files_without_their_directory(selector: str, name: str) -> None:
    assert file_name(selector) == name


def test_metrics_of_other_programs_select_channels(tmp_path: Path) -> None:
    content = random_content(layers=3, channels=137)
    values = np.random.default_rng(5).random((3, 137))
    with with_metric(tmp_path / "x.h5", content, "hessian", values) as atlas:
        found = chosen(atlas, "top:x_lab/hessian=10%")
        assert found == {(layer, 0): set(ranked(values[layer])[:13]) for layer in range(3)}
        with pytest.raises(UsageError, match="unknown metric 'hessian'; did you mean x_lab/hessian") as caught:
            select("top:hessian=10%", atlas)
        assert "x_lab/hessian" in str(caught.value.hint)
    with Atlas.open(random_atlas(tmp_path / "a.h5")) as other, pytest.raises(UsageError, match="unknown metric 'x_lab/hessian'"):
        select("top:x_lab/hessian=10%", other)
