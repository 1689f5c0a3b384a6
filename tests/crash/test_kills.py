"""A few random SIGKILLs, and readers beside a writer. The full test is ``python -m tests.support.crash.run --kills 200``."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import chanfmt
from chanfmt.format.writer import write_atlas
from tests.support.crash.harness import child
from tests.support.factory import random_content


def test_random_kills():
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.crash.run", "--kills", "2"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for name, tally in json.loads(done.stdout).items():
        assert tally["kills"] == 2, name
        assert tally["ended equal"] >= 1, name


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_reader_beside_a_writer_sees_whole_files(tmp_path):
    path = tmp_path / "a.h5"
    # The atlases differ in size, so a reader that mixes both would notice.
    contents = [random_content(layers=layers, channels=48, seed=layers) for layers in (2, 3)]
    whole = {item.stacks[0].variables["sum_q2"].tobytes() for item in contents}
    write_atlas(contents[1], path)

    def rewrite():
        for number in range(60):
            write_atlas(contents[number % 2], path)

    writer = child(rewrite)
    reads, seen = 0, set()
    while os.waitpid(writer, os.WNOHANG) == (0, 0):
        with chanfmt.open(path, verify=True) as atlas:
            seen.add(atlas.stacks["decoder"]["sum_q2"].tobytes())
        reads += 1
    assert reads > 5
    assert seen == whole
    assert [item.name for item in tmp_path.iterdir()] == ["a.h5"]
