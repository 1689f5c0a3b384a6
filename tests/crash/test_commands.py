"""Calls of whole commands interrupted. The full test is ``python -m tests.support.crash.commands``."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.support.crash.trace import STRACE

pytestmark = [
    pytest.mark.skipif(STRACE is None or sys.platform != "linux", reason="needs strace, which only Linux has"),
    pytest.mark.slow,
    # tests/crash/test_outputs.py interrupts every call of the same writes.
    pytest.mark.repeated,
]


@pytest.mark.parametrize("name", ["plan", "push"])
def test_a_command_leaves_the_old_output_or_the_new_one(name, tmp_path):
    words = ["--commands", name, "--every", {"plan": "16", "push": "8"}[name]]
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.crash.commands", *words],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    if "strace may not follow" in done.stderr:
        pytest.skip("strace may not follow a process here")
    assert done.returncode == 0, done.stderr
    for part, seen in json.loads(done.stdout).items():
        assert seen["wrong"] == [], part
        assert seen["interruptions"] > 0, part
