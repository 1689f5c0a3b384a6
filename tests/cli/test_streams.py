"""Streams of every kind: one line or nothing, never a traceback, and the exit code that says what happened."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from chanfmt.format.writer import write_atlas
from tests.support.factory import random_content

NAME = "日本/é😀"
FULL = Path("/dev/full")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streams") / "a.h5"
    content = random_content()
    write_atlas(dataclasses.replace(content, model=dataclasses.replace(content.model, id=NAME)), path)
    return path


def run(*words: object, shell: str = "", **options: Any) -> subprocess.CompletedProcess[bytes]:
    """``python -m chanfmt`` with ``words``, and with the redirections ``shell``."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON") or name == "PYTHONPATH"}
    environment |= options.pop("env", {})
    command = [sys.executable, "-m", "chanfmt", *map(str, words)]
    if shell:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    done = subprocess.run(command, env=environment, check=False, timeout=120, **pipes)
    assert b"Traceback" not in (done.stderr or b""), done.stderr
    assert b"Exception ignored" not in (done.stderr or b""), done.stderr
    return done


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8", "utf-8-sig", "utf-16", "utf-32-be"])
def test_every_encoding_shows_results_and_valid_json(file: Path, encoding: str) -> None:
    env = {"PYTHONIOENCODING": encoding}
    done = run("info", file, "--quiet", env=env)
    assert (done.returncode, done.stderr) == (0, b"")
    shown = done.stdout.decode(encoding)
    assert "96" in shown
    assert "\ufeff" not in shown, "one mark of the byte order is enough"
    done = run("info", file, "--json", env=env)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout.decode(encoding))["model"]["id"] == NAME
    done = run("info", f"{file}{NAME}", env=env)
    assert done.returncode == 2
    assert done.stderr.decode(encoding).count("error") == 1


def test_a_name_that_no_encoding_has(file: Path, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\xfe.h5"
    os.link(file, path)
    done = run("info", os.fsdecode(path), "--json")
    assert (done.returncode, done.stderr) == (0, b"")
    assert os.fsencode(json.loads(done.stdout)["file"]) == path
    done = run("compare", os.fsdecode(path), file)
    assert done.returncode == 0
    done = run("trajectory", os.fsdecode(path), file, "-o", tmp_path / "out")
    assert (done.returncode, done.stdout == b"") == (0, False), done.stderr
    assert json.loads((tmp_path / "out" / "report.json").read_text())


@pytest.mark.parametrize("words", [["info"], ["info", "--json"], ["validate"], ["compare"]])
def test_closed_streams(file: Path, tmp_path: Path, words: list[str]) -> None:
    files = [file] * (2 if words == ["compare"] else 1)
    whole = run(*words, *files)
    assert run(*words, *files, shell=">&-").stderr == whole.stderr
    assert run(*words, *files, shell=">&-").returncode == 0
    for shell in ("2>&-", "<&-", "<&- 2>&-"):
        done = run(*words, *files, shell=shell)
        assert (done.returncode, done.stdout) == (0, whole.stdout), shell
    assert run(*words, tmp_path / "missing.h5", shell=">&- 2>&-").returncode in (1, 2)
    assert run(*words, *files, shell=">&- 2>&- <&-").returncode == 0


def test_notes_of_a_closed_stderr_end_up_nowhere(file: Path, tmp_path: Path) -> None:
    done = run("strip", file, "-o", tmp_path / "b.h5", "--json", shell="2>&-")
    assert done.returncode == 0
    assert json.loads(done.stdout)
    assert run("validate", tmp_path / "b.h5").returncode == 0
    done = run("strip", file, "-o", tmp_path / "c.h5", shell=">&- 2>&-")
    assert done.returncode == 0
    assert (tmp_path / "c.h5").stat().st_size == (tmp_path / "b.h5").stat().st_size


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    "words", [["info"], ["info", "--json"], ["validate"], ["show", "--layer", "1"], ["--help"], ["info", "--help"]]
)
def test_a_full_stdout(file: Path, words: list[str]) -> None:
    with FULL.open("wb") as full:
        done = run(*words, *([] if "--help" in words else [file]), stdout=full, env={"COLUMNS": "200"})
    assert done.returncode == 1
    assert done.stderr == b"atlas: error: cannot write to stdout: No space left on device\n"


@pytest.mark.skipif(not FULL.exists(), reason="no device that is always full")
def test_a_full_stderr_changes_nothing(file: Path, tmp_path: Path) -> None:
    with FULL.open("wb") as full:
        done = run("strip", file, "-o", tmp_path / "b.h5", "--json", stderr=full)
        assert (done.returncode, json.loads(done.stdout)["file"]) == (0, str(tmp_path / "b.h5"))
        assert run("info", tmp_path / "missing.h5", stderr=full).returncode == 2


def test_a_stdout_that_may_not_grow(file: Path, tmp_path: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    with (tmp_path / "out").open("wb") as out:
        done = run("info", file, "--json", stdout=out, preexec_fn=limited)
    assert done.returncode == 1
    assert done.stderr == b"atlas: error: cannot write to stdout: File too large\n"


def test_a_reader_that_goes_away_is_no_error(file: Path) -> None:
    for words in (["info", file, "--json"], ["--help"]):
        read, write = os.pipe()
        os.close(read)
        try:
            done = run(*words, stdout=write)
            assert (done.returncode, done.stderr) == (0, b"")
            done = run("info", file, stderr=write)
            assert (done.returncode, done.stdout != b"") == (0, True)
        finally:
            os.close(write)


def test_a_write_that_fails(file: Path) -> None:
    """EIO and EDQUOT, as a terminal that is gone and a quota give them."""
    for name in ("EIO", "EDQUOT"):
        code = (
            "import errno, os, sys\n"
            "class Broken:\n"
            "    encoding, errors = 'utf-8', 'strict'\n"
            f"    def write(self, text): raise OSError(errno.{name}, os.strerror(errno.{name}))\n"
            "    def flush(self): pass\n"
            "sys.stdout = Broken()\n"
            "from chanfmt.cli.main import main\n"
            f"code = main(['info', {str(file)!r}])\n"
            "sys.stdout = sys.__stdout__\n"
            "sys.exit(code)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        assert done.stderr.startswith("atlas: error: cannot write to stdout: ")
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("module", ["chanfmt", "surgery", "tui"])
def test_ctrl_c_while_modules_are_imported(module: str, file: Path) -> None:
    words = {"chanfmt": ["info", str(file)], "surgery": ["plan", str(file), "--sparsity", "0.5"], "tui": [str(file)]}[module]
    command = [
        sys.executable,
        "-c",
        f"from {module}.__main__ import main; print('here', flush=True); raise SystemExit(main())",
        *words,
    ]
    for delay in [0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3]:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"here\n"
        time.sleep(delay)
        # A terminal interrupts the children too.
        os.killpg(process.pid, signal.SIGINT)
        _, error = process.communicate(timeout=60)
        assert b"Traceback" not in error, (delay, error)
        assert len(error.splitlines()) <= 2, (delay, error)
        assert process.returncode in (0, 2, 130, -signal.SIGINT), (delay, process.returncode)
