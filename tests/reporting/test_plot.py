"""Figures with axes: what they draw, from which numbers; and statistics over layers, numpy beside xarray."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from scipy import stats

import chanfmt
from chanfmt.base.errors import AtlasError, MissingPackageError, UsageError
from chanfmt.format import schema
from chanfmt.reporting import drawing
from tests.support.factory import moe_atlas, random_atlas

if TYPE_CHECKING:
    from pathlib import Path

plot, analysis = chanfmt.plot, chanfmt.analysis


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("atlases")
    return [random_atlas(folder / f"step{seed + 1}.h5", channels=200, seed=seed) for seed in (0, 1)]


@pytest.fixture
def ax() -> Any:
    return Figure().subplots()


def line(axes: Any, label: str) -> np.ndarray:
    return np.asarray(next(item for item in axes.lines if item.get_label() == label).get_ydata(), dtype=float)


def test_concentration_draws_a_line_for_each_atlas(paths: list[Path], ax: Any) -> None:
    assert plot.concentration({"a": paths[0], "b": paths[1]}, rho=0.02, ax=ax) is ax
    for label, path in zip("ab", paths, strict=True):
        with chanfmt.open(path) as atlas:
            lp = np.sort(atlas.stacks["decoder"]["lp"].astype(float))
        np.testing.assert_allclose(line(ax, label), lp[:, -4:].sum(axis=1) / lp.sum(axis=1))
    assert ax.get_ylabel() == "share of LP in the top 2%"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b"]


def test_atlases_of_different_depth_share_an_axis(paths: list[Path], tmp_path: Path, ax: Any) -> None:
    plot.concentration([paths[0], random_atlas(tmp_path / "deep.h5", layers=7)], ax=ax)
    ends = [item.get_xdata()[[0, -1]].tolist() for item in ax.lines[:2]]
    assert ends == [[0, 1], [0, 1]]


def test_cumulative_shares_end_at_one(paths: list[Path], ax: Any) -> None:
    plot.cumulative(paths, "activation_power", ax=ax)
    for name in ("step1", "step2"):
        assert line(ax, name)[-1] == pytest.approx(1)
        assert (np.diff(line(ax, name)) >= 0).all()


def test_supernodes_are_amber(paths: list[Path], ax: Any) -> None:
    plot.scatter(paths[0], "lp", "gate_norm", layer=2, ax=ax)
    with chanfmt.open(paths[0]) as atlas:
        lp, norm, labels = (atlas.stacks["decoder"][name][2] for name in ("lp", "gate_norm", "label"))
    drawn = {item.get_label(): item for item in ax.collections}
    points = np.asarray(drawn["supernodes"].get_offsets())
    chosen = labels == schema.LABEL_SUPERNODE
    np.testing.assert_allclose(points, np.stack([lp[chosen], norm[chosen]], axis=1))
    assert to_hex(drawn["supernodes"].get_facecolor()[0]).upper() == drawing.SUPERNODE
    assert (ax.get_xlabel(), ax.get_xscale(), ax.get_yscale()) == ("LP, nats²", "log", "log")
    assert f"{stats.spearmanr(lp, norm).statistic:.3g}" in ax.get_title()
    assert drawing.SUPERNODE not in drawing.COLOURS


def test_the_heat_map_has_a_row_for_each_unit(paths: list[Path], tmp_path: Path, ax: Any) -> None:
    plot.heat_map(paths[0], ax=ax)
    [mesh] = ax.collections
    with chanfmt.open(paths[0]) as atlas:
        lp = atlas.stacks["decoder"]["lp"].astype(float)
    largest = lp.max(axis=1) / lp.sum(axis=1)
    np.testing.assert_allclose(np.asarray(mesh.get_array())[:, 0], largest, rtol=1e-6)
    widths = Figure().subplots()
    plot.heat_map(moe_atlas(tmp_path / "moe.h5"), ax=widths)
    with chanfmt.open(tmp_path / "moe.h5") as atlas:
        units = len([unit for unit in atlas.units() if len(unit.known("lp"))])
    assert sorted(map(abs, widths.get_ylim())) == [0.5, units - 0.5]


def test_overlap_and_trajectory_are_those_of_compare(paths: list[Path], ax: Any) -> None:
    plot.overlap(*paths, ax=ax)
    rows = chanfmt.compare(*paths)
    np.testing.assert_array_equal(line(ax, "supernodes"), [row.supernode_jaccard for row in rows])
    np.testing.assert_array_equal(line(ax, "halo, by chance"), [row.halo_chance for row in rows])
    axes = plot.trajectory(paths, ax=Figure().subplots())
    assert line(axes, "with the last").tolist() == [np.median([row.supernode_jaccard for row in rows]), 1]
    assert axes.get_xlabel() == "training steps"


def test_ablation_shows_the_sign(ax: Any) -> None:
    lp, change = np.array([1e-3, 1e-2, 1e-1]), np.array([2e-3, -1e-2, 0.0])
    plot.ablation(lp, change, labels=[0, 2, 2], error=np.abs(change) / 2, tokens=100, ax=ax)
    shown = {}
    for item in ax.collections:
        if isinstance(item, PathCollection):
            [point], [face], [edge] = item.get_offsets(), item.get_facecolors(), item.get_edgecolors()
            shown[tuple(point)] = (bool(face[3]), to_hex(edge).upper())
    assert shown == {(1e-3, 2e-3): (True, drawing.GREY), (1e-2, 1e-2): (False, drawing.SUPERNODE)}
    np.testing.assert_allclose(line(ax, "standard deviation by chance")[[0, -1]], np.sqrt([2e-5, 2e-4]))
    with pytest.raises(UsageError, match=r"lp \(3,\), change \(2,\)"):
        plot.ablation(lp, change[:2], ax=ax)


def test_what_cannot_be_drawn_is_said(paths: list[Path], ax: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AtlasError, match="holds no fame"):
        plot.heat_map(paths[0], "fame", ax=ax)
    with pytest.raises(UsageError, match="no layer 9"):
        plot.scatter(paths[0], layer=9, ax=ax)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match="matplotlib") as raised:
        plot.heat_map(paths[0])
    assert "[plot]" in str(raised.value.hint)


def test_every_statistic_is_the_same_for_numpy_and_xarray(paths: list[Path]) -> None:
    with chanfmt.open(paths[0]) as atlas:
        data = atlas.stacks["decoder"].to_xarray().load()
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
        "concentration": ((data.lp,), {"rho": 0.02}),
        "cumulative_share": ((data.lp,), {"fractions": np.array([0.1, 1.0])}),
        "strip_shares": ((data.lp,), {"samples": 8, "log": True}),
        "top_overlap": ((data.lp, data.gate_norm), {"rho": 0.02}),
        "rank_correlation": ((data.lp, data.gate_norm), {}),
        "compare_channels": ((data.lp, data.gate_norm, data.label, data.label), {}),
        "halo_redundancy": ((data.lp, data.label, data.redundancy, data.redundancy_null), {}),
        "read_halo": ((data.lp, data.label, data.read_connectivity), {}),
        "matched_control": ((data.label == 2, data.label == 0, data.lp), {}),
        "random_control": ((data.label == 2, data.label == 0), {"generator": np.random.default_rng(0)}),
        "stability": ((data.sum_q2_split, data.tokens_split), {"rho": 0.02}),
    }
    assert set(calls) == set(analysis.__all__) - {"driving_tokens", "middle", "over_layers", "super_weights"}
    for name, (arrays, settings) in calls.items():
        function = getattr(analysis, name)
        found = analysis.over_layers(function, *arrays, **settings)
        assert found.sizes["layer"] == 4
        assert found.layer.values.tolist() == [0, 1, 2, 3]
        if name == "random_control":
            assert found.sum("channel").values.tolist() == arrays[0].sum("channel").values.tolist()
            continue
        own = function(*(array.isel(layer=2).values for array in arrays), **settings)
        one = function(*(array.isel(layer=2) for array in arrays), **settings)
        if isinstance(own, np.ndarray | float):
            np.testing.assert_array_equal(found.isel(layer=2), own)
            np.testing.assert_array_equal(one, own)
        else:
            assert repr(one) == repr(own)
            for key in found.data_vars:
                np.testing.assert_array_equal(found[key].isel(layer=2), getattr(own, key), err_msg=key)
        if "split" not in arrays[0].dims:
            plain = analysis.over_layers(function, *(array.values for array in arrays), **settings)
            for key, values in plain.items() if isinstance(plain, dict) else [(None, plain)]:
                np.testing.assert_array_equal(values, found.values if key is None else found[key].values)


def test_arrays_of_other_layers_are_refused(paths: list[Path]) -> None:
    with pytest.raises(UsageError, match="different layers"):
        analysis.over_layers(analysis.rank_correlation, np.ones((2, 5)), np.ones((3, 5)))
    with chanfmt.open(paths[0]) as atlas:
        lp = atlas.stacks["decoder"].to_xarray().lp
        with pytest.raises(UsageError, match="layer is 4 in one and 3"):
            analysis.over_layers(analysis.rank_correlation, lp, lp.isel(layer=slice(3)))
        with pytest.raises(UsageError, match="some are not"):
            analysis.over_layers(analysis.rank_correlation, lp, lp.values)


def test_a_legend_of_long_names_is_inside_the_figure() -> None:
    figure = Figure(figsize=(7.0, 3.0), layout="constrained")
    axes = figure.subplots()
    for number in range(5):
        axes.plot([0, 1], [0, number], label=f"a model with a rather long name, {number}")
    drawing.legend_below(figure)
    [legend] = figure.legends
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    assert 0 <= box.x0 < box.x1 <= figure.bbox.width
    assert len(legend.get_texts()) == 5
