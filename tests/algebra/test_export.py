"""`chanfmt.algebra.export`: other programs' readers read back the same arrays, bit by bit."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors import safe_open
from safetensors.numpy import load_file

import chanfmt
from chanfmt.algebra.export import FORMATS, _texts, export
from chanfmt.base.errors import AtlasError, MissingPackageError, UsageError
from chanfmt.cli.main import main
from chanfmt.format import schema
from chanfmt.format.writer import write_atlas
from tests.support.factory import moe_atlas, random_atlas, random_content
from tests.support.hygiene import heavy_imports


@pytest.fixture
def atlas(tmp_path):
    """A dense layer and three of experts; one expert got no token."""
    with chanfmt.open(moe_atlas(tmp_path / "a.h5")) as opened:
        yield opened


def per_channel(stack):
    return [name for name in stack.variables if schema.STACK_VARIABLE_BY_NAME[name].dimensions == ("layer", "channel")]


def expected_column(atlas, name):
    """One value per channel, FFN by FFN, expert by expert."""
    return np.concatenate([stack[name][block.row].ravel() for block, stack in atlas.rows()])


def check_table(atlas, column):
    """``column(name)`` gives a table's column as a list of numbers; None or NaN for a missing value."""
    dense, experts, channels = 96, 4, 24
    assert column("stack") == ["decoder"] * dense + ["decoder.experts"] * (3 * experts * channels)
    assert column("block") == [0] * dense + np.repeat([1, 2, 3], experts * channels).tolist()
    assert column("layer") == column("block")
    assert column("expert") == [None] * dense + np.tile(np.repeat(np.arange(experts), channels), 3).tolist()
    assert column("channel") == [*range(dense), *(list(range(channels)) * (3 * experts))]
    assert column("label") == [schema.LABELS[code] for code in expected_column(atlas, "label").tolist()]
    for name in per_channel(atlas.stacks["decoder"]):
        if name != "label":
            values = expected_column(atlas, name)
            found = np.array([np.nan if value is None else value for value in column(name)], dtype=values.dtype)
            np.testing.assert_array_equal(found, values, name)


def test_parquet_is_read_back(atlas, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    assert export(atlas, tmp_path / "a.parquet") == 96 + 3 * 96
    table = parquet.read_table(tmp_path / "a.parquet")
    check_table(atlas, lambda name: table[name].to_pylist())
    assert [str(table.schema.field(name).type) for name in ("lp", "sum_q2", "expert")] == ["float", "double", "int32"]
    assert parquet.ParquetFile(tmp_path / "a.parquet").num_row_groups == 4
    metadata = table.schema.metadata
    assert metadata[b"content_sha256"].decode() == atlas.content_sha256
    assert (metadata[b"model_id"], metadata[b"format_version"]) == (b"tests/experts", b"1.0")
    assert json.loads(metadata[b"labels"])["rho"] == 0.01
    assert json.loads(metadata[b"atlas"])["ffns"][1]["module"] == "model.layers.1.mlp.experts"


def test_arrow_is_read_back(atlas, tmp_path):
    feather = pytest.importorskip("pyarrow.feather")
    assert export(atlas, tmp_path / "a.arrow") == 96 + 3 * 96
    table = feather.read_table(tmp_path / "a.arrow")
    check_table(atlas, lambda name: table[name].to_pylist())
    assert table.schema.metadata[b"content_sha256"].decode() == atlas.content_sha256
    with pytest.importorskip("pyarrow.ipc").open_file(tmp_path / "a.arrow") as file:
        assert file.num_record_batches == 4


def test_safetensors_is_read_back(atlas, tmp_path):
    count = export(atlas, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="np") as file:
        assert len(list(file.keys())) == count
        metadata = file.metadata()
        for stack in atlas.stacks.values():
            for name in ("layer", "channel", *stack.variables):
                found = file.get_tensor(f"{stack.name}/{name}")
                assert found.dtype == stack[name].dtype
                np.testing.assert_array_equal(found, stack[name], name)
    assert metadata["content_sha256"] == atlas.content_sha256
    assert json.loads(metadata["atlas"])["ffns"][1]["module"] == "model.layers.1.mlp.experts"
    export(atlas, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    # Every array is aligned to its numbers.
    content = (tmp_path / "a.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    sizes = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "U8": 1}
    offsets = [(item["data_offsets"][0], sizes[item["dtype"]]) for name, item in header.items() if name != "__metadata__"]
    assert all(offset % size == 0 for offset, size in offsets)


def test_csv_is_read_back(atlas, tmp_path):
    export(atlas, tmp_path / "a.csv")
    with open(tmp_path / "a.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))

    def column(name):
        convert = str if name in ("stack", "label") else int if name in ("block", "layer", "expert", "channel") else float
        return [None if row[name] == "" else convert(row[name]) for row in rows]

    check_table(atlas, column)


def test_csv_and_parquet_are_read_back_by_pandas(atlas, tmp_path):
    pandas = pytest.importorskip("pandas")
    export(atlas, tmp_path / "a.csv")
    frame = pandas.read_csv(tmp_path / "a.csv", float_precision="round_trip")
    for name in ("lp", "sum_q2"):
        values = expected_column(atlas, name)
        np.testing.assert_array_equal(frame[name].to_numpy().astype(values.dtype), values, name)
    assert frame.groupby("stack", sort=False).size().to_dict() == {"decoder": 96, "decoder.experts": 288}
    pytest.importorskip("pyarrow")
    export(atlas, tmp_path / "a.parquet")
    assert (pandas.read_parquet(tmp_path / "a.parquet")["label"] == "supernode").sum() == frame["label"].eq("supernode").sum()


def test_npz_is_read_back(atlas, tmp_path):
    export(atlas, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as archive:
        for stack in atlas.stacks.values():
            for name in (*stack.variables, "layer", "channel", "split"):
                values = archive[f"{stack.name}/{name}"]
                assert values.dtype == stack[name].dtype
                np.testing.assert_array_equal(values, stack[name], name)
        assert archive["decoder.experts/expert"].tolist() == [0, 1, 2, 3]
        described = json.loads(str(archive["atlas"]))
    assert described["model"]["id"] == "tests/experts"
    assert described["calibration"]["contributions"][0]["tokens"] == 512
    first = (tmp_path / "a.npz").read_bytes()
    export(atlas, tmp_path / "a.npz", overwrite=True)
    assert (tmp_path / "a.npz").read_bytes() == first


def test_json_is_read_back(atlas, tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    export(atlas, tmp_path / "a.json")
    data = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert data["labels"]["names"] == {"0": "none", "1": "halo", "2": "supernode"}
    for stack in atlas.stacks.values():
        found = data["stacks"][stack.name]
        assert found["layer"] == stack["layer"].tolist()
        assert {*found["variables"]} == {*stack.variables}
        for name, values in found["variables"].items():
            assert found["dimensions"][name] == list(schema.stack_dimensions(schema.STACK_VARIABLE_BY_NAME[name], stack.kind))
            # None becomes NaN.
            np.testing.assert_array_equal(np.array(values, dtype=float).astype(stack[name].dtype), stack[name], name)


def test_a_dense_atlas_has_no_expert_column(tmp_path):
    with chanfmt.open(random_atlas(tmp_path / "a.h5")) as atlas:
        export(atlas, tmp_path / "a.csv")
    assert (tmp_path / "a.csv").read_text().startswith("stack,block,layer,channel,label,sum_u,")


@given(arrays.arrays(np.float32, 50, elements=st.floats(width=32, allow_infinity=False)))
def test_any_float32_is_read_back(values):
    texts = _texts(values, missing=b"nan")
    # As a 64-bit reader does: parse to double, then narrow.
    np.testing.assert_array_equal(np.array([float(text) for text in texts]).astype(np.float32), values)


def test_random_float32_bits_are_read_back_and_short():
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    texts = _texts(values, missing=b"")
    np.testing.assert_array_equal(np.array(texts).astype(np.float64).astype(np.float32), values)
    assert _texts(np.float32([0.1, 1, np.nan]), missing=b"") == [b"0.1", b"1.0", b""]


@pytest.mark.parametrize("name", FORMATS)
def test_only_the_metrics_asked_for(atlas, tmp_path, name):
    if name in ("parquet", "arrow"):
        pytest.importorskip("pyarrow")
    path = tmp_path / f"a.{name}"
    export(atlas, path, metrics=["taylor", "lp"])
    found = {
        "csv": lambda: path.read_text().partition("\n")[0].split(",")[6:],
        "parquet": lambda: pytest.importorskip("pyarrow.parquet").read_schema(path).names[6:],
        "arrow": lambda: pytest.importorskip("pyarrow.ipc").open_file(path).schema.names[6:],
        "safetensors": lambda: sorted(
            key.partition("/")[2] for key in load_file(path) if key in ("decoder/lp", "decoder/taylor", "decoder/lp_factored")
        ),
        "npz": lambda: [key.partition("/")[2] for key in np.load(path) if key.startswith("decoder/")][6:],
        "json": lambda: list(json.loads(path.read_text())["stacks"]["decoder"]["variables"])[1:],
    }[name]()
    assert found == ["lp", "taylor"]


def test_what_a_stack_does_not_hold_is_missing(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    moe_atlas(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file["stacks/decoder/redundancy"]
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        export(atlas, tmp_path / "a.csv")
        export(atlas, tmp_path / "a.parquet")
    with open(tmp_path / "a.csv", newline="") as stream:
        assert [row["redundancy"] for row in csv.DictReader(stream)][:96] == [""] * 96
    assert parquet.read_table(tmp_path / "a.parquet")["redundancy"][:96].null_count == 96


@pytest.mark.parametrize("name", ["=cmd|' calc'!A0", "+1", "@SUM(A1)", "..", "-2", "a,b", "a\nb", "..\\..\\x"])
@pytest.mark.parametrize("kind", ["csv", "npz"])
def test_names_that_are_commands_elsewhere_are_refused(tmp_path, name, kind):
    content = random_content()
    write_atlas(
        dataclasses.replace(
            content,
            stacks=(dataclasses.replace(content.stacks[0], name=name),),
            blocks=tuple(dataclasses.replace(block, stack=name) for block in content.blocks),
        ),
        tmp_path / "a.h5",
    )
    with chanfmt.open(tmp_path / "a.h5") as atlas, pytest.raises(AtlasError, match="stack name"):
        export(atlas, tmp_path / f"out.{kind}")
    assert [item.name for item in tmp_path.iterdir()] == ["a.h5"]


def test_unknown_label_codes_are_no_label(tmp_path):
    content = random_content()
    content.stacks[0].variables["label"][0, 0] = 7
    write_atlas(content, tmp_path / "a.h5")
    with chanfmt.open(tmp_path / "a.h5") as atlas:
        export(atlas, tmp_path / "a.csv", metrics=["lp"])
    assert next(csv.DictReader(io.StringIO((tmp_path / "a.csv").read_text())))["label"] == ""


def test_archive_members_stay_inside(atlas, tmp_path):
    export(atlas, tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        names = archive.namelist()
    assert all(not name.startswith("/") and ".." not in name for name in names)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.xlsx"], ".parquet, .csv, .arrow, .npz, .json, .safetensors, .gguf"),
        (["a"], "cannot tell the format"),
        (["a.csv", "--metrics", "beauty"], "not in this atlas"),
        (["a.csv", "--metrics", "sum_q2_split"], "not per channel"),
        (["a.csv", "--metrics", ""], "--metrics"),
        (["a.csv", "--metrics", "lp,,taylor"], "--metrics"),
        (["there.csv"], "--overwrite"),
        (["no/a.csv"], "mkdir"),
        ([], "-o"),
    ],
)
def test_wrong_usage(tmp_path, capsys, arguments, message):
    path = random_atlas(tmp_path / "a.h5")
    (tmp_path / "there.csv").write_text("old")
    output = ["-o", str(tmp_path / arguments[0]), *arguments[1:]] if arguments else []
    assert main(["export", str(path), *output]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.h5", "there.csv"]
    assert (tmp_path / "there.csv").read_text() == "old"


def test_an_export_is_reported(tmp_path, capsys):
    path = random_atlas(tmp_path / "a.h5")
    (tmp_path / "a.CSV").write_text("old")
    assert main(["export", str(path), "-o", str(tmp_path / "a.CSV"), "--metrics", "lp, taylor", "--overwrite"]) == 0
    assert "384 rows" in capsys.readouterr().err
    assert (tmp_path / "a.CSV").read_text().startswith("stack,block,layer,channel,label,lp,taylor\n")


def test_the_atlas_is_not_its_own_export(tmp_path):
    path = random_atlas(tmp_path / "a.csv")
    before = path.read_bytes()
    with chanfmt.open(path) as atlas, pytest.raises(UsageError, match="the atlas that is exported"):
        export(atlas, path, overwrite=True)
    assert path.read_bytes() == before


def test_parquet_names_the_missing_package(atlas, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackageError, match="pyarrow") as caught:
        export(atlas, tmp_path / "a.parquet")
    assert "pip install pyarrow" in caught.value.hint
    assert [item.name for item in tmp_path.iterdir()] == ["a.h5"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_full_disk_leaves_the_old_file(tmp_path, name):
    if name in ("parquet", "arrow"):
        pytest.importorskip("pyarrow")
    path, target = random_atlas(tmp_path / "a.h5", layers=4, channels=2000), tmp_path / f"out.{name}"
    target.write_text("old")
    script = (
        "import resource, signal, sys; from chanfmt.cli.main import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "sys.exit(main(['export', sys.argv[1], '-o', sys.argv[2], '--overwrite']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path), str(target)], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert target.read_text() == "old"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.h5", target.name]


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_heavy_is_imported(tmp_path, name):
    if name in ("parquet", "arrow"):
        pytest.importorskip("pyarrow")
    assert not heavy_imports(
        "chanfmt.cli.main", ["export", str(random_atlas(tmp_path / "a.h5")), "-o", str(tmp_path / f"o.{name}")]
    )
