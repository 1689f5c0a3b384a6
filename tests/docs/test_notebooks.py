"""The notebooks of examples/ run from top to bottom in one process, without jupyter, and are kept without outputs."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def run(path: Path) -> tuple[dict[str, Any], list[Any]]:
    """Run the code cells in order. Returns the names, and the value that each cell shows."""
    names: dict[str, Any] = {}
    shown = []
    for cell in cells(path):
        if cell["cell_type"] != "code":
            continue
        source = "".join(cell["source"])
        tree = ast.parse(source, f"{path.name}, {cell['id']}")
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, f"{path.name}, {cell['id']}", "exec"), names)
        if last is not None:
            shown.append(eval(compile(ast.Expression(last.value), f"{path.name}, {cell['id']}", "eval"), names))
    return names, shown


@pytest.fixture
def agg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Figures without a screen; the examples can be imported, as from a notebook beside them."""
    matplotlib = pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    backend = matplotlib.get_backend()
    matplotlib.use("agg")
    yield
    from matplotlib import pyplot

    pyplot.close("all")
    matplotlib.use(backend)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, agg: None) -> None:
    names, shown = run(path)
    # What a notebook shows: a table or an array of numbers, and figures with named axes.
    figures = [item for item in shown if hasattr(item, "get_xlabel")]
    assert figures
    for axes in figures:
        assert axes.get_xlabel()
        assert axes.get_ylabel()
        assert axes.has_data()
        axes.figure.canvas.draw()
    assert any(hasattr(item, "columns") or hasattr(item, "median") for item in shown)
    for atlas in [names.get("atlas"), *names.get("atlases", {}).values()]:
        if atlas is not None:
            atlas.close()


def test_no_notebook_keeps_outputs() -> None:
    assert len(NOTEBOOKS) == 4
    for path in NOTEBOOKS:
        for cell in cells(path):
            assert cell["id"]
            if cell["cell_type"] == "code":
                assert (cell["outputs"], cell["execution_count"]) == ([], None), path.name
