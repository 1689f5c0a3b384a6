"""Two commands with one output: the second one notices the first, and what a killed one left stands in nobody's way."""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import time
from pathlib import Path

import pytest

from chanfmt.base import claims
from chanfmt.base.claims import Owner, claim_path, claimed
from chanfmt.base.errors import UsageError
from tests.support.refused import NO_LOCKS, on_file_systems

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


with_and_without_locks = on_file_systems(locks={}, none=NO_LOCKS)


def holder(path, wait=30.0):
    """A process that holds the claim on ``path``. Returns its number."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        with claimed(path):
            os.write(writer, b"x")
            time.sleep(wait)
        os._exit(0)
    os.close(writer)
    assert os.read(reader, 1) == b"x"
    os.close(reader)
    return pid


@with_and_without_locks
def test_the_second_notices_the_first(tmp_path, kind):
    path = tmp_path / "a.h5"
    pid = holder(path)
    try:
        (tmp_path / "link").symlink_to(path)
        for name in (path, tmp_path / "link", tmp_path / "." / "a.h5"):
            with pytest.raises(UsageError, match=f"process {pid} on .* is writing") as caught, claimed(name):
                pass
            assert ("remove" in caught.value.hint) == (kind == "none")
        with claimed(tmp_path / "b.h5"):
            pass
        assert claim_path(path).exists()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    # It was killed, and left its file.
    assert claim_path(path).exists()
    with claimed(path):
        pass
    assert sorted(item.name for item in tmp_path.iterdir()) == ["link"]


@with_and_without_locks
def test_two_threads_or_two_calls_of_one_process(tmp_path, kind):
    with claimed(tmp_path / "a"), pytest.raises(UsageError), claimed(tmp_path / "a"):
        pass
    with claimed(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


@with_and_without_locks
def test_a_claim_ends_with_an_error(tmp_path, kind):
    with pytest.raises(KeyError), claimed(tmp_path / "a"):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("start", ["", "1"])
@with_and_without_locks
def test_a_later_process_of_the_same_number_holds_nothing(tmp_path, kind, start):
    """In a container, the number is the same every time."""
    place = claim_path(tmp_path / "a")
    place.write_text(f"{socket.gethostname()}\n{os.getpid() if start else 2**22 + 1}\n{start}\n")
    if start and not claims._start(os.getpid()):
        pytest.skip("this system does not say when a process started")
    with claimed(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


@with_and_without_locks
def test_another_machine_without_locks(tmp_path, kind):
    place = claim_path(tmp_path / "a")
    place.write_text("elsewhere\n17\n1\n")
    if kind == "locks":
        with claimed(tmp_path / "a"):
            pass
        return
    with pytest.raises(UsageError, match="process 17 on elsewhere") as caught, claimed(tmp_path / "a"):
        pass
    assert str(place) in caught.value.hint


@pytest.mark.parametrize("text", ["", "\n", "host\nnot a number\n", "\x00" * 5000, "host\n" + "9" * 500])
@with_and_without_locks
def test_a_claim_that_names_nobody(tmp_path, kind, text):
    place = claim_path(tmp_path / "a")
    place.write_text(text)
    if kind == "none":
        with pytest.raises(UsageError, match="another process"), claimed(tmp_path / "a"):
            pass
    os.utime(place, (0, 0))
    with claimed(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


@with_and_without_locks
def test_something_else_in_place_of_a_claim(tmp_path, kind):
    place = claim_path(tmp_path / "a")
    for make in (lambda: os.mkfifo(place), lambda: place.symlink_to("nowhere"), place.mkdir):
        make()
        with claimed(tmp_path / "a"):
            pass
        assert os.path.lexists(place)
        place.rmdir() if place.is_dir() else place.unlink()


def test_where_nothing_can_be_written(tmp_path):
    with claimed(tmp_path / "missing" / "a"):
        pass


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root becomes another user")
def test_the_claim_of_another_user():
    with tempfile.TemporaryDirectory() as text:
        path = Path(text) / "a"
        path.parent.chmod(0o777)

        def other_user() -> int:
            """0 if another user may work, 2 if somebody else does."""
            pid = os.fork()
            if pid == 0:
                os.setuid(1234)
                try:
                    with claimed(path):
                        os._exit(0)
                except UsageError:
                    os._exit(2)
                finally:
                    os._exit(1)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

        with claimed(path):
            assert other_user() == 2
        assert other_user() == 0
        claim_path(path).write_text("")
        assert other_user() == 0


@with_and_without_locks
def test_only_one_of_many_gets_it(tmp_path, kind):
    path, log = tmp_path / "a", os.open(tmp_path / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    Owner("elsewhere" if kind == "locks" else socket.gethostname(), 2**22 + 1, "").write(
        os.open(claim_path(path), os.O_CREAT | os.O_WRONLY)
    )

    def work():
        for _ in range(40):
            try:
                with claimed(path):
                    os.write(log, b"(")
                    time.sleep(0.001)
                    os.write(log, b")")
            except UsageError:
                time.sleep(0.0005)

    pids = []
    for _ in range(4):
        pid = os.fork()
        if pid == 0:
            work()
            os._exit(0)
        pids.append(pid)
    assert all(os.waitpid(pid, 0)[1] == 0 for pid in pids)
    taken = (tmp_path / "log").read_text()
    assert taken == "()" * (len(taken) // 2), "two held it at once"
    assert len(taken) > 40
    assert not claim_path(path).exists()
