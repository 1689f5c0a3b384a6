"""`chanfmt.algebra.compare` against scipy, against simulation, and as a user types it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

import chanfmt
from chanfmt.algebra.compare import compare, expected_jaccard, medians, rank_correlation
from chanfmt.base.errors import AtlasError
from chanfmt.cli.main import main
from chanfmt.format import schema
from chanfmt.format.writer import write_atlas
from tests.support.edited import with_metric
from tests.support.factory import moe_atlas, moe_content, random_atlas, random_content
from tests.support.hygiene import heavy_imports


@pytest.fixture
def pair(tmp_path):
    """Two atlases of one architecture, measured on different tokens."""
    return random_atlas(tmp_path / "a.h5"), random_atlas(tmp_path / "b.h5", seed=1)


@pytest.mark.parametrize("metric", ["lp", "redundancy", "gate_norm"])
def test_every_number_against_its_definition(pair, metric):
    with chanfmt.open(pair[0]) as a, chanfmt.open(pair[1]) as b:
        rows = compare(a, b, metric)
        assert [row.layer for row in rows] == [0, 1, 2, 3]
        for row in rows:
            x, y = (atlas.stacks["decoder"][metric][row.layer].astype(float) for atlas in (a, b))
            p, q = ({*np.flatnonzero(atlas.stacks["decoder"]["label"][row.layer] == 2)} for atlas in (a, b))
            h, k = ({*np.flatnonzero(atlas.stacks["decoder"]["label"][row.layer] == 1)} for atlas in (a, b))
            assert row.correlation == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)
            assert (row.supernodes_first, row.supernodes_second, row.supernodes_shared) == (len(p), len(q), len(p & q))
            assert row.supernode_jaccard == len(p & q) / len(p | q)
            assert row.halo_jaccard == len(h & k) / len(h | k)
            assert row.captured == pytest.approx(x[list(q)].sum() / x[list(p)].sum(), rel=1e-12)
            whole = np.nansum(x)
            assert row.captured_chance == pytest.approx(whole * len(q) / 96 / x[list(p)].sum(), rel=1e-12)
            if np.isfinite(x).all():
                u, v = ({*np.argsort(-values, kind="stable")[:1]} for values in (x, y))
                assert row.top_jaccard == len(u & v) / len(u | v)
                assert row.top_chance == pytest.approx(1 / 96)
            else:
                assert np.isnan(row.top_jaccard)
            assert (row.channels, row.stack, row.module) == (96, "decoder", f"model.layers.{row.layer}.mlp")


def test_an_atlas_agrees_with_itself(tmp_path):
    path = moe_atlas(tmp_path / "a.h5")
    with chanfmt.open(path) as a, chanfmt.open(path) as b:
        for row in compare(a, b):
            assert (row.correlation, row.supernode_jaccard, row.halo_jaccard, row.captured) == (1, 1, 1, 1)


def test_experts_count_together_and_one_without_tokens_does_not_count(tmp_path):
    moe_atlas(tmp_path / "a.h5")
    moe_atlas(tmp_path / "b.h5", seed=1)
    with chanfmt.open(tmp_path / "a.h5") as a, chanfmt.open(tmp_path / "b.h5") as b:
        row = compare(a, b)[1]
        x, y = (atlas.stacks["decoder.experts"]["lp"][0].astype(float) for atlas in (a, b))
    assert row.channels == 4 * 24
    assert row.supernodes_first == 3
    known = [0, 2, 3]
    assert row.correlation == pytest.approx(stats.spearmanr(x[known].ravel(), y[known].ravel()).statistic, rel=1e-12)


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, 2.0, 5.0, float("nan")])] * 2), min_size=2, max_size=40))
def test_rank_correlation_with_ties_and_gaps(values):
    x, y = np.array(values).T
    known = ~(np.isnan(x) | np.isnan(y))
    found = rank_correlation(x, y)
    if len({*x[known]}) < 2 or len({*y[known]}) < 2:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(stats.spearmanr(x[known], y[known]).statistic, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize(("channels", "first", "second"), [(40, [8], [5]), (12, [3, 0, 5], [4, 0, 1]), (9, [7, 8], [6, 9])])
def test_chance_by_simulation(channels, first, second):
    random = np.random.default_rng(0)
    found = np.zeros(20_000)
    for trial in range(len(found)):
        shared = sum(len({*random.permutation(channels)[:a].tolist()} & {*range(b)}) for a, b in zip(first, second, strict=True))
        found[trial] = shared / (sum(first) + sum(second) - shared)
    error = found.std() / np.sqrt(len(found))
    assert abs(expected_jaccard(channels, first, second) - found.mean()) < 5 * error


def test_chance_over_many_experts_is_quick_and_right():
    # 64 experts, a third of 768 channels each: independent draws, whose intersections are hypergeometric.
    random = np.random.default_rng(0)
    shared = random.hypergeometric(256, 512, 256, (100_000, 64)).sum(axis=1)
    jaccard = shared / (2 * 64 * 256 - shared)
    error = jaccard.std() / np.sqrt(len(jaccard))
    assert abs(expected_jaccard(768, [256] * 64, [256] * 64) - jaccard.mean()) < 5 * error


def test_chance_at_its_ends():
    assert np.isnan(expected_jaccard(10, [0], [0]))
    assert expected_jaccard(10, [3], [0]) == 0
    assert expected_jaccard(10, [10], [10]) == pytest.approx(1)
    # Of 14336 channels 143 and 143: the expected intersection is 1.43, about 0.5% of the union.
    assert expected_jaccard(14336, [143], [143]) == pytest.approx(1.43 / (286 - 1.43), rel=0.01)


def test_constant_and_unknown_layers_are_undefined(tmp_path, capsys):
    content = random_content()
    variables = content.stacks[0].variables
    variables["lp"][0] = 1.0
    variables["lp"][1] = np.nan
    variables["label"][1] = 0
    write_atlas(content, tmp_path / "a.h5")
    random_atlas(tmp_path / "b.h5", seed=1)
    arguments = ["compare", str(tmp_path / "a.h5"), str(tmp_path / "b.h5")]
    assert main([*arguments, "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert layers[0]["correlation"] is None
    assert layers[1]["correlation"] is None
    assert layers[1]["captured"] is None
    assert layers[2]["correlation"] is not None
    assert main(arguments) == 0
    table = capsys.readouterr().out.partition("\n\nrank r is Spearman's correlation of lp\n")[2].splitlines()
    assert table[1].split()[:2] == ["0", "-"]
    assert table[-1].startswith("median")


def test_medians_leave_out_what_is_undefined(pair):
    with chanfmt.open(pair[0]) as a, chanfmt.open(pair[1]) as b:
        rows = compare(a, b)
    rows[0] = dataclasses.replace(rows[0], correlation=float("nan"))
    assert medians(rows)["correlation"] == np.median([row.correlation for row in rows[1:]])
    assert np.isnan(medians(rows[:1])["correlation"])
    assert {*medians(rows)} == {
        "correlation",
        "supernode_jaccard",
        "supernode_chance",
        "halo_jaccard",
        "halo_chance",
        "captured",
        "captured_chance",
        "top_jaccard",
        "top_chance",
    }


def other_width(content):
    return random_content(channels=64)


def fewer_layers(content):
    return random_content(layers=3)


def renamed(content):
    blocks = tuple(dataclasses.replace(block, module=f"transformer.h.{block.index}.mlp") for block in content.blocks)
    return dataclasses.replace(content, blocks=blocks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_width, "96 channels in .* and 64 channels"),
        (fewer_layers, r"only .*a.h5 has an FFN model.layers.3.mlp"),
        (renamed, "and 3 others that the other atlas lacks"),
        (lambda content: moe_content(), "only"),
    ],
)
def test_other_architectures_are_refused(tmp_path, capsys, change, message):
    random_atlas(tmp_path / "a.h5")
    write_atlas(change(random_content()), tmp_path / "b.h5")
    with chanfmt.open(tmp_path / "a.h5") as a, chanfmt.open(tmp_path / "b.h5") as b, pytest.raises(AtlasError, match=message):
        compare(a, b)
    assert main(["compare", str(tmp_path / "a.h5"), str(tmp_path / "b.h5")]) == 2
    assert "one architecture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("status", "name", "message"),
    [
        ("partial", "lp", "unfinished build"),
        ("partial", "label", "holds no labels"),
        ("complete", "redundancy", "metrics it holds: lp,"),
    ],
)
def test_a_missing_array_is_named(tmp_path, capsys, status, name, message):
    write_atlas(dataclasses.replace(random_content(), status=status), tmp_path / "b.h5")
    with h5py.File(tmp_path / "b.h5", "r+") as file:
        del file[f"stacks/decoder/{name}"]
    metric = "lp" if name == "label" else name
    code = main(["compare", str(random_atlas(tmp_path / "a.h5")), str(tmp_path / "b.h5"), "--metric", metric])
    captured = capsys.readouterr()
    assert code == 2
    assert "b.h5 holds no" in captured.err
    assert message in captured.err
    assert captured.out == ""


def test_checkpoints_of_one_architecture_are_compared_with_a_note(tmp_path, capsys):
    content = random_content()
    model = dataclasses.replace(
        content.model, id="other\x1b[2J", revision="1234567890abcdef", fingerprint="0" * 64, dtype="bfloat16"
    )
    labels = dataclasses.replace(content.labels, rho=0.02)
    write_atlas(dataclasses.replace(content, model=model, labels=labels), tmp_path / "b.h5")
    assert main(["compare", str(random_atlas(tmp_path / "a.h5")), str(tmp_path / "b.h5")]) == 0
    captured = capsys.readouterr()
    assert "note: the weights differ" in captured.err
    assert "note: the models ran in float32 and bfloat16, and 16 bits change some labels" in captured.err
    assert "different settings: rho 0.01 and 0.02" in captured.err
    assert "16 of 16 calibration sequences are in both" in captured.err
    assert "at 1234567890ab in bfloat16, 16 x 32 tokens of random, rho 0.02" in " ".join(captured.out.split())
    assert "\x1b" not in captured.out


def test_one_file_twice_is_said(tmp_path, capsys):
    path = str(random_atlas(tmp_path / "a.h5"))
    assert main(["compare", path, path]) == 0
    assert "the same atlas" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A"], "two atlases or more"),
        ([], "FILE is missing"),
        (["A", "A", "--metric", "beauty"], "unknown metric 'beauty'"),
        (["A", "NOWHERE"], "does not exist"),
    ],
)
def test_wrong_usage(tmp_path, capsys, arguments, message):
    path = random_atlas(tmp_path / "a.h5")
    names = {"A": str(path), "NOWHERE": str(tmp_path / "no.h5")}
    assert main(["compare", *(names.get(argument, argument) for argument in arguments)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_several_atlases_are_a_matrix(pair, tmp_path, capsys):
    third = random_atlas(tmp_path / "c.h5", seed=2)
    assert main(["compare", *map(str, (*pair, third)), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [Path(atlas["file"]).name for atlas in data["atlases"]] == ["a.h5", "b.h5", "c.h5"]
    assert [(item["first"], item["second"]) for item in data["pairs"]] == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
    with chanfmt.open(third) as a, chanfmt.open(pair[0]) as b:
        expected = medians(compare(a, b))
    assert data["pairs"][4]["median"] == pytest.approx(expected)
    assert main(["compare", *map(str, (*pair, third)), "--metric", "taylor"]) == 0
    out = capsys.readouterr().out
    matrix = out.partition("Jaccard index of the largest by taylor")[2].splitlines()[1:5]
    assert [line.split()[0] for line in matrix] == ["A", "A", "B", "C"]
    assert all(line.split()[place] == "1" for place, line in enumerate(matrix[1:], start=1))


def test_nothing_heavy_is_imported(pair):
    assert not heavy_imports("chanfmt.cli.main", ["compare", *map(str, pair)])


def test_every_metric_is_offered(tmp_path):
    with chanfmt.open(moe_atlas(tmp_path / "a.h5")) as a, chanfmt.open(tmp_path / "a.h5") as b:
        for metric in schema.METRIC_BY_NAME:
            assert len(compare(a, b, metric)) == 4


def test_a_metric_of_another_program(tmp_path, capsys):
    content = random_content()
    shape = content.stacks[0].variables["lp"].shape
    random = np.random.default_rng(3)
    values = [random.random(shape) for _ in "ab"]
    for name, own in zip("ab", values, strict=True):
        with_metric(tmp_path / f"{name}.h5", content, "hessian", own).close()
    with chanfmt.open(tmp_path / "a.h5") as a, chanfmt.open(tmp_path / "b.h5") as b:
        found = [row.correlation for row in compare(a, b, "x_lab/hessian")]
    expected = [stats.spearmanr(one, other).statistic for one, other in zip(*values, strict=True)]
    assert found == pytest.approx(expected)
    files = [str(tmp_path / f"{name}.h5") for name in "ab"]
    assert main(["compare", *files, "--metric", "x_lab/hessian"]) == 0
    assert "rank r is Spearman's correlation of x_lab/hessian" in capsys.readouterr().out
    random_atlas(tmp_path / "plain.h5")
    assert main(["compare", files[0], str(tmp_path / "plain.h5"), "--metric", "x_lab/hessian"]) == 2
    assert "plain.h5 holds no 'x_lab/hessian'" in capsys.readouterr().err
