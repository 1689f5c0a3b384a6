"""Work in a separate process: what the parent says when a disk fails there."""

from __future__ import annotations

import errno
import os
import sys

import pytest

from chanfmt.format.sandbox import Crashed, run_contained
from tests.support.refused import on_file_systems

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a separate process needs fork and limits, as Linux has them")


def test_an_error_of_the_disk_is_told_without_a_traceback(capfd):
    def work():
        os.stat("/nowhere/at all")

    with pytest.raises(Crashed, match="No such file or directory"):
        run_contained(work, size=0, cpu_seconds=5)
    assert capfd.readouterr().err == ""


@on_file_systems(broken={"write": errno.EIO})
def test_an_answer_that_does_not_arrive(capfd, kind):
    with pytest.raises(Crashed, match="without an answer"):
        run_contained(lambda: "answer", size=0, cpu_seconds=5)
    assert capfd.readouterr().err == ""


def test_a_mistake_of_ours_is_seen(capfd):
    with pytest.raises(Crashed, match="without an answer"):
        run_contained(lambda: [][0], size=0, cpu_seconds=5)
    assert "IndexError" in capfd.readouterr().err
