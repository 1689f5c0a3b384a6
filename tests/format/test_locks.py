"""Readers take no lock, so neither a file system without locks nor another program's lock stops them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

import chanfmt
from chanfmt.algebra.validate.contained import validate_contained
from chanfmt.format.writer import write_atlas
from tests.support.factory import random_content

fcntl = pytest.importorskip("fcntl")

SCRIPT = """
import sys
from pathlib import Path

import chanfmt
from chanfmt.algebra.validate import validate
from chanfmt.format import writer
from tests.support.factory import random_content

path = Path(sys.argv[1])
for limit in (writer.IN_MEMORY, 0):
    writer.IN_MEMORY = limit
    content = random_content(seed=limit)
    writer.write_atlas(content, path)
    with chanfmt.open(path, verify=True) as atlas:
        assert atlas.content().stacks[0].variables["lp"].tobytes() == content.stacks[0].variables["lp"].tobytes()
    assert not validate(path), validate(path)
"""


@pytest.mark.parametrize("forced", [False, True])
@pytest.mark.parametrize("error", ["ENOLCK", "EOPNOTSUPP", "EROFS", "EIO", "EAGAIN"])
def test_a_file_system_without_locks(tmp_path, error, forced):
    """``forced``: the user's environment asks HDF5 for locks."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace")
    environment = os.environ | {"HDF5_USE_FILE_LOCKING": "TRUE"} if forced else os.environ
    # EAGAIN is the answer to a lock on what another process holds; our own temporaries are not among that.
    script = SCRIPT if error != "EAGAIN" else SCRIPT.replace("writer.write_atlas(content, path)", "pass")
    if error == "EAGAIN":
        write_atlas(random_content(seed=0), tmp_path / "a.h5")
        script = script.replace("(writer.IN_MEMORY, 0)", "(0,)")
    done = subprocess.run(
        [
            *(strace, "-f", "-o", str(tmp_path / "trace"), "-e", "trace=flock", "-e", f"inject=flock:error={error}"),
            *(sys.executable, "-c", script, str(tmp_path / "a.h5")),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if "strace:" in done.stderr and "ptrace" in done.stderr:
        pytest.skip("strace may not follow a process here")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("forced", [False, True])
def test_another_program_holds_a_lock(tmp_path, forced):
    path = tmp_path / "a.h5"
    write_atlas(random_content(), path)
    with open(path, "r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with chanfmt.open(path, verify=True, contained=True) as atlas:
            assert atlas.content().stacks
        assert validate_contained(path) == []
        environment = os.environ | ({"HDF5_USE_FILE_LOCKING": "TRUE"} if forced else {})
        done = subprocess.run(
            [sys.executable, "-m", "chanfmt", "validate", str(path)], env=environment, capture_output=True, text=True, check=False
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_a_reader_takes_no_lock(tmp_path):
    path = tmp_path / "a.h5"
    write_atlas(random_content(), path)
    with chanfmt.open(path), open(path, "r+b") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_what_the_system_refuses_is_not_damage(tmp_path):
    """No descriptors are left, for example: the sentence says so, and nobody is sent to rebuild the atlas."""
    path = tmp_path / "a.h5"
    write_atlas(random_content(), path)
    script = (
        "import resource, sys, chanfmt, os\n"
        "with chanfmt.open(sys.argv[1]): pass\n"
        "used = max(map(int, os.listdir('/proc/self/fd')))\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (used, used))\n"
        "try:\n    chanfmt.open(sys.argv[1])\n"
        "except chanfmt.AtlasError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert "Too many open files" in done.stdout, done.stderr
    assert "damaged" not in done.stdout


@pytest.mark.parametrize("error", ["EIO", "ESTALE"])
def test_a_disk_that_fails_does_not_make_a_file_damaged(tmp_path, error):
    """One of the reads fails. The program says so, and judges nothing."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("needs strace")
    path = tmp_path / "a.h5"
    write_atlas(random_content(layers=1, channels=8), path)
    log = tmp_path / "trace"
    for command in ("info", "validate"):
        seen = set()
        for nth in (1, 20, 100):
            done = subprocess.run(
                [
                    *(strace, "-f", "-o", str(log), "-P", str(path), "-e", "trace=read,pread64"),
                    *("-e", f"inject=read,pread64:error={error}:when={nth}"),
                    *(sys.executable, "-m", "chanfmt", command, str(path)),
                ],
                capture_output=True,
                text=True,
                check=False,
            )
            seen.add(done.returncode)
            assert "damaged" not in done.stdout + done.stderr, (command, nth)
            assert "Traceback" not in done.stderr
            assert "invalid" not in done.stdout, (command, nth)
        assert 2 in seen, "no read failed"
        assert not seen - {0, 2}
