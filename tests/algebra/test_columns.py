"""Columns of other programs: added by name, kept, merged by their rule, and written out again; other input is refused with a reason."""

from __future__ import annotations

import csv
import dataclasses
import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import chanfmt
from chanfmt.algebra.columns import About, check_name, stored, with_columns
from chanfmt.algebra.export import FORMATS, IMATRIX, export
from chanfmt.algebra.merge import merge
from chanfmt.algebra.validate import validate
from chanfmt.base.errors import UsageError
from chanfmt.cli.main import main
from chanfmt.format.columns import COLUMNS, OWNER
from chanfmt.format.writer import write_atlas
from surgery.planning.selectors import select
from tests.support.factory import moe_atlas, random_atlas, random_content

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

LAYERS, EXPERTS, CHANNELS = 3, 4, 24
DENSE = (4, 96)
NAME = "x_lab/hessian"


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return random_atlas(tmp_path / "dense.h5", layers=DENSE[0], channels=DENSE[1])


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    """A dense layer with 96 channels, and three layers of four experts with 24."""
    return moe_atlas(tmp_path / "experts.h5")


@pytest.fixture
def values() -> np.ndarray:
    found = np.random.default_rng(0).normal(size=DENSE).astype(np.float32)
    found[1, 5] = np.nan
    return found


@pytest.fixture
def run(dense: Path, tmp_path: Path) -> Callable[..., int]:
    def call(*words: object, atlas: Path = dense, output: str = "out.h5") -> int:
        return main(["import", str(atlas), *map(str, words), "-o", str(tmp_path / output)])

    return call


def column(path: Path, name: str = NAME, stack: str = "decoder") -> np.ndarray:
    with chanfmt.open(path, verify=True) as atlas:
        return atlas.stacks[stack][name]


def saved(path: Path, values: np.ndarray) -> Path:
    """``values`` in a file of the kind that the suffix of ``path`` names."""
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".npz":
        np.savez(path, values=values)
    elif path.suffix == ".safetensors":
        save_file({"values": values}, path)
    else:
        rows = [
            {"layer": layer, "channel": channel, "values": float(values[layer, channel])} for layer, channel in np.ndindex(DENSE)
        ]
        if path.suffix == ".csv":
            with open(path, "w", newline="") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows[::-1])
        else:
            arrow = pytest.importorskip("pyarrow")
            table = arrow.Table.from_pylist(rows[::-1]).set_column(2, "values", arrow.array(values.ravel()[::-1]))
            module = pytest.importorskip("pyarrow.parquet" if path.suffix == ".parquet" else "pyarrow.feather")
            (module.write_table if path.suffix == ".parquet" else module.write_feather)(table, str(path))
    return path


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".safetensors", ".csv", ".parquet", ".arrow"])
def test_a_column_from_any_file(suffix: str, run: Any, values: np.ndarray, tmp_path: Path) -> None:
    path = saved(tmp_path / f"values{suffix}", values)
    assert run("--column", f"{NAME}={path}", "--units", "nats", "--description", "diagonal Hessian", "--merge", "sum") == 0
    found = column(tmp_path / "out.h5")
    # A table in text has no type, so its numbers are stored with every digit.
    assert found.dtype == (np.float64 if suffix == ".csv" else np.float32)
    np.testing.assert_array_equal(found.astype(np.float32), values)
    with chanfmt.open(tmp_path / "out.h5") as atlas:
        [metric] = atlas.stacks["decoder"].extension_metrics
        assert (metric.long_name, metric.units, metric.merge) == ("diagonal Hessian", "nats", "sum")
        assert atlas.producer.history[-1]["columns"] == {NAME: path.name}
    assert not [item for item in validate(tmp_path / "out.h5") if item.code.startswith("E")]


def test_everything_else_stays(run: Any, dense: Path, values: np.ndarray, tmp_path: Path) -> None:
    before = dense.read_bytes()
    assert run("--column", f"{NAME}={saved(tmp_path / 'a.npy', values)}") == 0
    assert run("--column", f"x_other/n={saved(tmp_path / 'b.npy', -values)}", atlas=tmp_path / "out.h5", output="two.h5") == 0
    assert dense.read_bytes() == before
    with chanfmt.open(dense) as first, chanfmt.open(tmp_path / "two.h5") as second:
        for name in first.stacks["decoder"].variables:
            np.testing.assert_array_equal(first.stacks["decoder"][name], second.stacks["decoder"][name])
        assert second.stacks["decoder"].extension_names == [NAME, "x_other/n"]
        np.testing.assert_array_equal(second.stacks["decoder"][NAME], values)


def test_a_column_is_shown_selected_and_validated(run: Any, values: np.ndarray, tmp_path: Path, capsys: Any) -> None:
    assert run("--column", f"{NAME}={saved(tmp_path / 'a.npy', values)}") == 0
    out = str(tmp_path / "out.h5")
    capsys.readouterr()
    assert main(["show", out, "--layer", "2", "--sort", NAME, "--top", "3", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    order = np.argsort(-values[2])[:3]
    assert [row["channel"] for row in shown["channels"]] == order.tolist()
    with chanfmt.open(out) as atlas:
        masks, _ = select(f"top:{NAME}=3", atlas)
    assert np.flatnonzero(masks[2]).tolist() == sorted(order.tolist())
    assert main(["validate", out]) == 0


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "json"])
def test_an_export_imports_again(name: str, experts: Path, tmp_path: Path) -> None:
    """Both stacks, by the names that an export gives: the same bits come back."""
    generator = np.random.default_rng(1)
    found = {
        "decoder": generator.normal(size=(1, 96)).astype(np.float32),
        "decoder.experts": generator.normal(size=(LAYERS, EXPERTS, CHANNELS)).astype(np.float32),
    }
    found["decoder.experts"][0, 1, 2] = np.nan
    with chanfmt.open(experts) as atlas:
        write_atlas(with_columns(atlas.content(), {NAME: found}), tmp_path / "a.h5")
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        export(atlas, tmp_path / f"a.{name}")
    assert main(["import", str(experts), "--column", f"{NAME}={tmp_path / f'a.{name}'}", "-o", str(tmp_path / "b.h5")]) == 0
    for stack, expected in found.items():
        np.testing.assert_array_equal(column(tmp_path / "b.h5", stack=stack).astype(np.float32), expected)


def test_json_holds_columns_too(dense: Path, values: np.ndarray, tmp_path: Path) -> None:
    with chanfmt.open(dense) as atlas:
        write_atlas(with_columns(atlas.content(), {NAME: {"decoder": values}}), tmp_path / "a.h5")
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        export(atlas, tmp_path / "a.json", metrics=["lp", NAME])
    stack = json.loads((tmp_path / "a.json").read_text())["stacks"]["decoder"]
    assert list(stack["variables"]) == ["label", "lp", NAME]
    assert stack["dimensions"][NAME] == ["layer", "channel"]
    assert stack["variables"][NAME][1][5] is None


def test_names_that_no_table_can_hold_are_left_out(dense: Path, tmp_path: Path, capsys: Any) -> None:
    from tests.support.edited import with_metric

    with_metric(tmp_path / "a.h5", random_content(layers=4, channels=96), "a,b\n=1", np.zeros(DENSE)).close()
    assert main(["export", str(tmp_path / "a.h5"), "-o", str(tmp_path / "a.csv")]) == 0
    assert "left out" in capsys.readouterr().err
    assert "x_lab" not in (tmp_path / "a.csv").read_text().partition("\n")[0]


@pytest.mark.parametrize("rule", ["sum", "max", "equal", "drop", None])
def test_a_merge_follows_the_rule(rule: str | None, tmp_path: Path) -> None:
    from tests.support.factory import with_other_tokens

    first = random_content(layers=4, channels=96)
    second = with_other_tokens(first)
    parts = [np.full(DENSE, 2.0), np.full(DENSE, 3.0)]
    same = np.arange(np.prod(DENSE)).reshape(DENSE)
    about = About(merge=rule)
    found = {}
    for number, content in enumerate((first, second)):
        added = with_columns(content, {NAME: {"decoder": parts[number]}, "x_lab/same": {"decoder": same}}, about)
        write_atlas(added, tmp_path / f"{number}.h5")
    with chanfmt.open(tmp_path / "0.h5") as one, chanfmt.open(tmp_path / "1.h5") as other:
        for group in merge([one, other]).extensions:
            found |= {item.name: item.values for item in group.variables}
    expected = {"sum": 5.0, "max": 3.0}.get(rule or "")
    assert ("hessian" in found) == (expected is not None)
    if expected is not None:
        np.testing.assert_array_equal(found["hessian"], np.full(DENSE, expected))
    # Without a rule, a column stays if the atlases agree.
    assert ("same" in found) == (rule != "drop")


def test_a_well_known_column_has_the_units_and_the_type_of_the_registry(run: Any, tmp_path: Path, capsys: Any) -> None:
    ids = np.arange(np.prod(DENSE)).reshape(DENSE)
    path = saved(tmp_path / "ids.npy", ids)
    assert run("--column", f"{OWNER}/sae_feature={path}", "--json") == 0
    [row] = json.loads(capsys.readouterr().out)["columns"]
    assert (row["type"], row["units"], row["merge"], row["known"]) == ("i4", "1", "equal", ids.size)
    assert run("--column", f"{OWNER}/sae_feature={path}", "--units", "nats", output="b.h5") == 2
    assert "must be 1, not nats" in capsys.readouterr().err
    assert run("--column", f"{OWNER}/sae_feature={saved(tmp_path / 'f.npy', ids / 2)}", output="b.h5") == 2
    assert "type i4, and the values are f8" in capsys.readouterr().err
    assert run("--column", f"{OWNER}/sae_featur={path}", output="b.h5") == 2
    assert "did you mean x_common/sae_feature?" in capsys.readouterr().err
    assert not (tmp_path / "b.h5").exists()


def test_the_registry_itself_can_be_written() -> None:
    for item in COLUMNS:
        check_name(item.name)
        assert stored(np.zeros(DENSE, item.dtype), item.name).dtype == np.dtype(item.dtype)
        About(item.units, item.long_name, item.merge).check()
    assert len({item.name for item in COLUMNS}) == len(COLUMNS)


def test_a_column_is_not_replaced_unasked(run: Any, values: np.ndarray, tmp_path: Path, capsys: Any) -> None:
    word = f"{NAME}={saved(tmp_path / 'a.npy', values)}"
    assert run("--column", word) == 0
    assert run("--column", word, atlas=tmp_path / "out.h5", output="two.h5") == 2
    assert "has x_lab/hessian already" in capsys.readouterr().err
    other = f"{NAME}={saved(tmp_path / 'b.npy', -values)}"
    assert run("--column", other, "--replace", atlas=tmp_path / "out.h5", output="two.h5") == 0
    np.testing.assert_array_equal(column(tmp_path / "two.h5"), -values)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("hessian", "is not the name of a column"),
        ("x_Lab/hessian", "is not the name of a column"),
        ("x_lab/a b", "is not the name of a column"),
        ("x_lab/../b", "is not the name of a column"),
        ("x_chanfmt/tokens", "owner of unfinished builds"),
        ("x_lab/layer", "the name of a dimension"),
    ],
)
def test_a_name_that_is_not_possible_is_refused(
    name: str, reason: str, run: Any, values: np.ndarray, tmp_path: Path, capsys: Any
) -> None:
    assert run("--column", f"{name}={saved(tmp_path / 'a.npy', values)}") == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out.h5").exists()


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((4, 95)), "shape (4, 95), and no stack of the atlas has it"),
        (np.zeros(96), "shape (96)"),
        (np.zeros(DENSE, complex), "the type complex128"),
        (np.full(DENSE, np.inf), "infinite value at [0, 0]"),
        (np.full(DENSE, 2**63, np.uint64), "more than an integer of 64 bits"),
        (np.full(DENSE, "a"), "the type <U1"),
        (np.array([{}] * 4, dtype=object), "is not an array"),
    ],
)
def test_an_array_that_does_not_fit_is_refused(array: np.ndarray, reason: str, run: Any, tmp_path: Path, capsys: Any) -> None:
    assert run("--column", f"{NAME}={saved(tmp_path / 'a.npy', array)}") == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out.h5").exists()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("layer,value\n0,1\n", "no column 'channel'"),
        ("layer,channel\n0,1\n", "no column x_lab/hessian of values"),
        ("layer,channel,a,b\n0,1,2,3\n", "no column x_lab/hessian of values: 'a', 'b'"),
        ("layer,channel,a\n", "has no row"),
        ("layer,channel,a\n0,1\n", "line 2 has 2 cells"),
        ("layer,channel,a\n0,1,1.5\n0,x,2\n", "line 3: 'x' in the column 'channel' is not a whole number"),
        ("layer,channel,a\n0,1,much\n", "line 2: 'much' in the column 'a' is not a number"),
        ("layer,channel,a\n0,1,1.5\n0,1,2.5\n", "a channel that two rows name"),
        ("layer,channel,a\n0,96,1.5\n", "layer 0 has no channel 96"),
        ("layer,channel,a\n0,-1,1.5\n", "layer 0 has no channel -1"),
        ("layer,channel,a\n9,1,1.5\n", "no FFN without experts in layer 9"),
        ("layer,expert,channel,a\n0,1,1,1.5\n", "no FFN with experts in layer 0"),
        ("stack,layer,channel,a\nencoder,0,1,1.5\n", "no stack 'encoder'"),
        ("layer,channel,a\n0,1,3\n", "383 channels of decoder have no row"),
        ("layer,channel,a\n0,1,inf\n", "infinite value"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(text: str, reason: str, run: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.csv").write_text(text)
    assert run("--column", f"{NAME}={tmp_path / 'a.csv'}") == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out.h5").exists()


def test_rows_that_a_table_leaves_out_are_unknown(run: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.csv").write_text("channel,layer,a\n5,1,0.5\n7,1,\n")
    assert run("--column", f"{NAME}={tmp_path / 'a.csv'}", "--json") == 0
    assert json.loads(capsys.readouterr().out)["columns"][0]["known"] == 1
    found = column(tmp_path / "out.h5")
    assert found[1, 5] == 0.5
    assert np.isnan(found).sum() == found.size - 1


def test_a_file_of_several_arrays_names_the_column(run: Any, values: np.ndarray, tmp_path: Path, capsys: Any) -> None:
    save_file({"a": values, "b": -values}, tmp_path / "a.safetensors")
    assert run("--column", f"{NAME}={tmp_path / 'a.safetensors'}") == 2
    assert "none of the 2 arrays is x_lab/hessian: a, b" in capsys.readouterr().err
    for key in ("hessian", NAME, "decoder/hessian", f"decoder/{NAME}"):
        save_file({"a": -values, key: values}, tmp_path / "a.safetensors")
        assert run("--column", f"{NAME}={tmp_path / 'a.safetensors'}", "--overwrite") == 0
        np.testing.assert_array_equal(column(tmp_path / "out.h5"), values)


@pytest.mark.parametrize("name", ["a.npy", "a.npz", "a.safetensors", "a.csv", "a.parquet", "a.arrow"])
def test_a_file_that_is_something_else_is_refused(name: str, run: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe nonsense")
    assert run("--column", f"{NAME}={tmp_path / name}") == 2
    assert name in capsys.readouterr().err
    assert not (tmp_path / "out.h5").exists()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--column", "x_lab/a"], "names no file"),
        (["--column", "x_lab/a=there.txt"], "cannot tell the format"),
        (["--column", "x_lab/a=not-there.npy"], "cannot be read: No such file"),
        (["--column", "x_lab/a=a.npy", "--column", "x_lab/a=b.npy"], "twice"),
        (["--column", "x_lab/a=a.npy", "--merge", "mean"], "unknown merge rule 'mean'"),
        (["--column", "x_lab/a=a.npy", "--units", "a\nb"], "--units must be one line"),
        ([], "--column"),
    ],
)
def test_wrong_usage(words: list[str], reason: str, run: Any, capsys: Any) -> None:
    assert run(*words) == 2
    assert reason in capsys.readouterr().err


def test_an_unfinished_build_gets_no_column(values: np.ndarray) -> None:
    from chanfmt.base.errors import AtlasError

    content = dataclasses.replace(random_content(layers=4, channels=96), status="partial")
    with pytest.raises(AtlasError, match="unfinished"):
        with_columns(content, {NAME: {"decoder": values}})


def test_two_stacks_of_one_shape_need_a_name() -> None:
    from chanfmt.algebra.columns import placed

    content = random_content(layers=4, channels=96)
    other = dataclasses.replace(content.stacks[0], name="encoder")
    with pytest.raises(UsageError, match="several stacks have: decoder, encoder"):
        placed(np.zeros(DENSE), NAME, (content.stacks[0], other))
    assert IMATRIX not in FORMATS


def test_a_column_that_is_replaced_leaves_no_scales_behind() -> None:
    """The first column is one of two stacks, and the second one of the first stack only."""
    content = random_content(layers=4, channels=96)
    other = dataclasses.replace(content.stacks[0], name="encoder")
    content = dataclasses.replace(content, stacks=(*content.stacks, other))
    values = np.ones((4, 96), dtype=np.float32)
    both = with_columns(content, {NAME: {"decoder": values, "encoder": values}})
    again = with_columns(both, {NAME: {"decoder": values}}, replace=True)
    assert {group.path.rpartition("/")[2] for group in both.extensions} == {"decoder", "encoder"}
    assert {group.path.rpartition("/")[2] for group in again.extensions} == {"decoder"}
