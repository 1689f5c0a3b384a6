"""The wheel that a clean clone builds works in an environment of its own. Slow: `make wheel-test` runs this file."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import chanfmt

ROOT = Path(__file__).parents[1]
MINIMAL = ROOT / "spec" / "conformance" / "valid" / "minimal.h5"
# Prints the files of all loaded modules after both command lines and the browser's have run.
LOADED = """
import contextlib, io, sys
import chanfmt.cli.main, surgery.cli.main, tui.cli
with contextlib.redirect_stdout(io.StringIO()):
    chanfmt.cli.main.main(["info", sys.argv[1]])
    for main in (surgery.cli.main.main, tui.cli.main):
        with contextlib.suppress(SystemExit):
            main(["--help"])
for module in list(sys.modules.values()):
    print(getattr(module, "__file__", None) or "")
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.environ.get("CHANFMT_WHEEL_TEST"), reason="set CHANFMT_WHEEL_TEST=1; make wheel-test does"),
]


def run(*command: object, cwd: Path) -> str:
    """Run a command without this process's import path, and return what it prints to stdout."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """A clean clone of the last commit."""
    path = tmp_path_factory.mktemp("clone") / "chanfmt"
    run("git", "clone", "--quiet", "--no-hardlinks", ROOT, path, cwd=path.parent)
    return path


@pytest.fixture(scope="module")
def dist(clone: Path) -> Path:
    """The directory of the source distribution, and of the wheel that was built from it."""
    run(sys.executable, "-m", "build", "--outdir", clone / "dist", clone, cwd=clone.parent)
    return clone / "dist"


@pytest.fixture(scope="module")
def installed(clone: Path, dist: Path, tmp_path_factory) -> Path:
    """The bin directory of a fresh environment with the wheel and the pinned versions."""
    venv = tmp_path_factory.mktemp("installed") / "venv"
    # The Makefile chooses the build of torch for this machine.
    run("make", f"PYTHON={sys.executable}", f"VENV={venv}", f"{venv}/torch", cwd=clone)
    [wheel] = dist.glob("*.whl")
    install = ("-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--constraint", ROOT / "constraints.txt")
    run(venv / "bin" / "python", *install, wheel, cwd=venv.parent)
    return venv / "bin"


def test_the_wheel_holds_the_packages_only(dist: Path) -> None:
    [wheel] = dist.glob("*.whl")
    assert wheel.name == f"chanfmt-{chanfmt.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"chanfmt", "surgery", "tui", f"chanfmt-{chanfmt.__version__}.dist-info"}
    packages = {
        path.relative_to(ROOT).as_posix() for name in ("chanfmt", "surgery", "tui") for path in (ROOT / name).rglob("*.py")
    }
    assert packages <= set(names)
    assert "surgery/planning/measured.json" in names
    assert {"chanfmt/py.typed", "surgery/py.typed", "tui/py.typed", "tui/app.tcss"} <= set(names)


def test_tests_run_from_the_source_distribution(dist: Path, tmp_path: Path) -> None:
    [archive] = dist.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    source = tmp_path / f"chanfmt-{chanfmt.__version__}"
    assert archive.name == f"{source.name}.tar.gz"
    for name in ("spec/conformance/valid/minimal.h5", "tests/conftest.py", "docs/commands.md", "Makefile", "constraints.txt"):
        assert (source / name).is_file(), name
    tests = ("tests/spec", "tests/format/test_conformance.py", "tests/docs/test_command_lines.py", "tests/cli/test_show.py")
    run(sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider", *tests, cwd=source)


def test_the_commands_run_outside_the_source(installed: Path, tmp_path: Path) -> None:
    for command in ("atlas", "atlas-tui"):
        assert run(installed / command, "--version", cwd=tmp_path) == f"{command} {chanfmt.__version__}\n"
    assert "channel-importance-atlas 1.0" in run(installed / "atlas", "info", MINIMAL, cwd=tmp_path)
    assert "prune" in run(installed / "surgery", "--help", cwd=tmp_path)


def test_no_module_of_the_source_is_imported(installed: Path, clone: Path, tmp_path: Path) -> None:
    run(installed / "python", "-c", "import chanfmt, surgery", cwd=tmp_path)
    files = [Path(line) for line in run(installed / "python", "-c", LOADED, MINIMAL, cwd=tmp_path).splitlines() if line]
    ours = [path for path in files if {"chanfmt", "surgery", "tui"} & set(path.parts[-4:])]
    assert len(ours) > 20
    # By place, not by name: the test's own directories may lie anywhere.
    assert all(path.is_relative_to(installed.parent / "lib") for path in ours)
    assert not [path for path in files if path.is_relative_to(ROOT / "chanfmt") or path.is_relative_to(clone)]


def test_a_model_is_measured_and_cut(installed: Path, tiny_checkpoint, tmp_path: Path) -> None:
    model = tiny_checkpoint("llama")
    build = ("build", model, "-o", "tiny.h5", "--calib", "pydoc", "--sequences", "4", "--seq-len", "32")
    run(installed / "atlas", *build, cwd=tmp_path)
    run(installed / "surgery", "prune", "tiny.h5", "--model", model, "--sparsity", "0.5", "-o", "half", cwd=tmp_path)
    assert (tmp_path / "half" / "model.safetensors").is_file()
