"""The examples of docs/python.md run, import no deep path, and agree with the file."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import chanfmt
import surgery
from chanfmt.base.errors import AtlasError, MissingPackageError
from chanfmt.format import schema
from tests.support.factory import moe_atlas, random_atlas

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "python.md"
MODEL = "HuggingFaceTB/SmolLM2-135M"
VALID = sorted((ROOT / "spec" / "conformance" / "valid").glob("*.h5"))


def test_the_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    failed, tried = doctest.testfile(str(PAGE), module_relative=False)
    assert tried > 20
    assert not failed


def test_the_scripts_run(tiny_checkpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The blocks without ``>>>`` run one after the other, on a tiny model in place of the page's."""
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    backend = matplotlib.get_backend()
    matplotlib.use("agg")
    try:
        code = "\n".join(_scripts()).replace(MODEL, str(tiny_checkpoint("llama")))
        names: dict = {"chanfmt": chanfmt, "surgery": surgery}
        exec(compile(code, str(PAGE), "exec"), names)
    finally:
        from matplotlib import pyplot

        pyplot.close("all")
        matplotlib.use(backend)
    assert {path.name for path in tmp_path.iterdir()} >= {"half", "third", "half-in-memory", "sweep.png", "concentration.png"}
    assert len(names["table"]) == len(names["results"].rows) == 5
    assert names["evaluations"][1].parameters == names["evaluations"][2].parameters == names["narrowed"].parameters_after
    for atlas in (names["atlas"], names["other"], names["relabelled"]):
        atlas.close()


def test_no_deep_path_is_imported() -> None:
    code = "\n".join([*_scripts(), *(example.source for example in doctest.DocTestParser().get_examples(_text()))])
    imported = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"chanfmt", "surgery", "transformers", "pandas", "matplotlib"}


def test_reading_and_planning_import_no_torch() -> None:
    code = (
        "import sys, chanfmt, surgery\n"
        "with chanfmt.open('spec/conformance/valid/everything.h5') as atlas:\n"
        "    surgery.plan(atlas, sparsity=0.5)\n"
        "    unit = next(atlas.units())\n"
        "    chanfmt.analysis.concentration(unit.values('lp'))\n"
        "    chanfmt.compare(atlas, atlas)\n"
        "    chanfmt.report(atlas)\n"
        "assert not {'torch', 'transformers', 'matplotlib', 'pandas', 'xarray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def _text() -> str:
    return PAGE.read_text(encoding="utf-8")


def _scripts() -> list[str]:
    """The blocks of Python that are not sessions."""
    return [block for block in re.findall(r"```python\n(.*?)```", _text(), re.DOTALL) if not block.startswith(">>>")]


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_xarray_has_what_the_file_has(path: Path) -> None:
    import xarray

    with chanfmt.open(path) as atlas:
        for name, stack in atlas.stacks.items():
            dataset = stack.to_xarray()
            assert set(dataset.data_vars) >= set(stack.variables)
            with xarray.open_dataset(path, group=f"stacks/{name}", engine="h5netcdf", decode_times=False) as other:
                for variable in stack.variables:
                    np.testing.assert_array_equal(dataset[variable].values, other[variable].values)
                    assert dataset[variable].dims == other[variable].dims
                    for key in ("long_name", "units"):
                        assert dataset[variable].attrs[key] == other[variable].attrs[key]
                np.testing.assert_array_equal(dataset.layer, other.layer)


def test_frames_have_a_row_per_channel(tmp_path: Path) -> None:
    with chanfmt.open(moe_atlas(tmp_path / "a.h5")) as atlas:
        frame = atlas.to_pandas()
        dense, experts = atlas.stacks["decoder"], atlas.stacks["decoder.experts"]
        assert len(frame) == dense["lp"].size + experts["lp"].size
        one = frame[(frame["stack"] == "decoder.experts") & (frame.expert == 2) & (frame.layer == experts.layers[1])]
        np.testing.assert_array_equal(one.lp, experts["lp"][1, 2])
        np.testing.assert_array_equal(one.channel, np.arange(experts.n_channels))
        assert one.label.tolist() == [schema.LABELS[value] for value in experts["label"][1, 2].tolist()]
        assert (frame[frame["stack"] == "decoder"].expert == -1).all()
        with pytest.raises(AtlasError, match="no 'fame'"):
            atlas.to_pandas(["fame"])


def test_without_the_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    monkeypatch.setitem(sys.modules, "xarray", None)
    with chanfmt.open(random_atlas(tmp_path / "a.h5")) as atlas:
        with pytest.raises(MissingPackageError, match="xarray"):
            atlas.stacks["decoder"].to_xarray()
        with pytest.raises(MissingPackageError, match="pandas"):
            atlas.to_pandas()


@pytest.mark.parametrize(
    "name",
    [
        "chanfmt.algebra.labels",
        "chanfmt.algebra.compare",
        "chanfmt.analysis.mass",
        "chanfmt.analysis.association",
        "chanfmt.analysis.resample",
    ],
)
def test_the_docstrings_examples_run(name: str) -> None:
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried
    assert not failed
