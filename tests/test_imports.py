"""The import contracts of pyproject.toml hold, and each contract can fail; modules do not import each other in a circle."""

from __future__ import annotations

import graphlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

grimp = pytest.importorskip("grimp", reason="import-linter is not installed")

ROOT = Path(__file__).parents[1]
PACKAGES = ("chanfmt", "surgery", "tui")
LINT_IMPORTS = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"

# For each contract of pyproject.toml: its id and name, a module, an import there that breaks the contract, and what
# import-linter then says.
VIOLATIONS = [
    ("layers", "layers of chanfmt", "chanfmt.format.digest", "chanfmt.hub.names", "digest -> chanfmt.hub.names"),
    ("torch-free", "reading, planning and browsing without torch", "chanfmt.analysis.halo", "torch", "halo -> torch"),
    (
        "surgery-without-building",
        "surgery does not measure",
        "surgery.cut.stock",
        "chanfmt.building",
        "stock -> chanfmt.building",
    ),
    ("surgery-layers", "layers of surgery", "surgery.planning.width", "surgery.cut.stock", "width -> surgery.cut.stock"),
    (
        "browser",
        "the browser sees atlases and plans only",
        "tui.picture",
        "chanfmt.hub.publish",
        "picture -> chanfmt.hub.publish",
    ),
    ("front-door", "no module uses a front door", "chanfmt.base.text", "surgery", "text -> surgery"),
    ("circles", "no circles", "chanfmt.base.errors", "chanfmt.base.files", "No cycles are allowed in chanfmt.base."),
]
# Where an import can hide: imports are found everywhere.
PLACES = ["{}", "def late() -> None:\n    {}", "if TYPE_CHECKING:\n    {}"]


def lint_imports(root: Path, *arguments: str) -> tuple[int, str]:
    """Run import-linter on the packages in ``root``, with the contracts of the pyproject.toml there.

    Returns:
        The exit status, and what import-linter printed.
    """
    command = [sys.executable, "-c", LINT_IMPORTS, "--no-logo", "--no-cache", *arguments]
    environment = os.environ | {"PYTHONPATH": str(root), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def copied(tmp_path_factory) -> Path:
    """A copy of the packages and of pyproject.toml, for tests to break."""
    root = tmp_path_factory.mktemp("imports")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", root)
    return root


def test_the_contracts_hold() -> None:
    status, printed = lint_imports(ROOT)
    assert status == 0, printed


def test_each_contract_is_violated_below() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
    assert [(contract["id"], contract["name"]) for contract in contracts] == [row[:2] for row in VIOLATIONS]


@pytest.mark.parametrize(
    ("number", "contract", "name", "module", "imported", "said"),
    [(number, *row) for number, row in enumerate(VIOLATIONS)],
    ids=[row[0] for row in VIOLATIONS],
)
def test_a_violation_fails(copied: Path, number: int, contract: str, name: str, module: str, imported: str, said: str) -> None:
    path = copied.joinpath(*module.split(".")).with_suffix(".py")
    before = path.read_text(encoding="utf-8")
    added = PLACES[number % len(PLACES)].format(f"import {imported}")
    try:
        path.write_text(f"{before}\n\n{added}\n", encoding="utf-8")
        status, printed = lint_imports(copied, "--contract", contract)
    finally:
        path.write_text(before, encoding="utf-8")
    assert status == 1, printed
    assert f"{name} BROKEN" in printed
    assert said in printed


def circle_in(imports: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, in order, the first repeated at the end; an empty list if there are none."""
    try:
        graphlib.TopologicalSorter(imports).prepare()
    except graphlib.CycleError as error:
        return error.args[1][::-1]
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    """The contract on circles looks inside packages; this test looks at all modules at once, the packages' own included."""
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    circle = circle_in({module: graph.find_modules_directly_imported_by(module) for module in graph.modules})
    assert not circle, " -> ".join(circle)


def test_a_circle_is_found() -> None:
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert len(circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == 4


def test_the_tree_stays_small_at_the_top() -> None:
    """A newcomer sees the whole of a package at once: at most thirteen entries in chanfmt, nine in surgery."""
    for package, most in (("chanfmt", 13), ("surgery", 9)):
        entries = [path for path in (ROOT / package).iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()]
        assert len(entries) <= most, sorted(path.name for path in entries)


def test_tests_import_only_support() -> None:
    """A test module does not import another one: what several of them need lies in tests/support."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        found = re.findall(r"^\s*(?:from|import) (tests\.(?!support)[\w.]+)", path.read_text(encoding="utf-8"), re.MULTILINE)
        assert not found, f"{path.relative_to(ROOT)} imports {found}"
