"""An error while another error is handled: the user has to mend the first error, so its message is the one printed."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import traceback

import pytest
import torch

import chanfmt
from chanfmt.base.errors import AtlasError, ChanfmtError, UsageError
from chanfmt.base.publishing import OutputAppearedError
from chanfmt.building import build as build_module
from chanfmt.building import keeper
from chanfmt.building.keeper import Keeper
from chanfmt.format import writer
from chanfmt.models.distributed import LostProcessError, _Processes
from chanfmt.models.streaming.spool import Spool
from tests.support.builds import SETTINGS, assert_equal, build, request
from tests.support.heard import heard


def fail_with(error):
    def write(content, path, **options):
        raise error

    return write


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "second",
    [
        (ChanfmtError, "the disk is full again"),
        (OSError, 28, "No space left on device"),
        (MemoryError,),
        (RuntimeError, "HDF5 cannot write"),
        (ValueError, "of another library"),
        (KeyboardInterrupt,),
    ],
    ids=lambda error: error[0].__name__,
)
def test_the_first_error_is_told_if_saving_fails_too(tiny_checkpoint, tmp_path, monkeypatch, stream, second):
    options = request(tiny_checkpoint("llama"), tmp_path / "a.h5", stream=stream, checkpoint_every=None)
    monkeypatch.setattr(build_module, "write_atlas", fail_with(ChanfmtError("the disk is full", hint="free some space")))
    kind, *arguments = second
    monkeypatch.setattr(keeper, "write_atlas", fail_with(kind(*arguments)))
    with heard() as said, pytest.raises(ChanfmtError) as caught:
        build(options, SETTINGS)
    assert (caught.value.message, caught.value.hint) == ("the disk is full", "free some space")
    assert sum(line.startswith("no partial atlas was written") for line in said) == 1
    # No partial atlas, and no gradient that belongs to none.
    assert not list(tmp_path.glob("a.h5*"))


@pytest.mark.parametrize("stream", [False, True])
def test_an_earlier_partial_atlas_is_named_as_such(tiny_checkpoint, tmp_path, monkeypatch, stream):
    options = request(tiny_checkpoint("llama"), tmp_path / "a.h5", stream=stream, checkpoint_every=0)
    whole = build(dataclasses.replace(options, output=str(tmp_path / "whole.h5")), SETTINGS)
    with monkeypatch.context() as patch:
        original = keeper.write_atlas

        def full(content, path, **options):
            patch.setattr(keeper, "write_atlas", fail_with(RuntimeError("HDF5 cannot write")))
            raise ChanfmtError("the disk is full", hint="free some space")

        patch.setattr(build_module, "write_atlas", full)
        with pytest.raises(ChanfmtError, match="the disk is full") as caught:
            build(options, SETTINGS)
        assert caught.value.hint.startswith("free some space\n")
        assert f"{options.partial} holds an earlier part of what was measured" in caught.value.hint
        patch.setattr(keeper, "write_atlas", original)
    with chanfmt.open(options.partial) as atlas:
        assert atlas.status == "partial"
    assert_equal(build(dataclasses.replace(options, resume=True), SETTINGS), whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5", "whole.h5"]


def test_a_spool_that_cannot_be_closed_hides_no_error(tmp_path):
    class Closed:
        def __init__(self, file):
            self._file = file

        def __getattr__(self, name):
            return getattr(self._file, name)

        def close(self):
            self._file.close()
            raise OSError(5, "Input/output error")

    def fail():
        with Spool(0, tmp_path) as spool:
            spool.put("key", torch.ones(3))
            spool._file = Closed(spool._file)
            raise ChanfmtError("what the user has to mend")

    with pytest.raises(ChanfmtError, match="what the user has to mend"):
        fail()


def test_a_lost_process_hides_no_error_of_this_one():
    group = _Processes.__new__(_Processes)
    group.rank, group.size = 0, 2

    def exchange(value):
        raise LostProcessError("rank 1 of 2 was lost")

    def refuse():
        raise ChanfmtError("what the user has to mend", hint="mend it")

    group.exchange = exchange
    with pytest.raises(ChanfmtError) as caught:
        group.together(refuse)
    assert (caught.value.message, caught.value.hint) == ("what the user has to mend", "mend it")
    with pytest.raises(LostProcessError):
        group.together(lambda: None)


def test_a_build_in_a_worker_thread(tiny_checkpoint, tmp_path):
    options = request(tiny_checkpoint("llama"), tmp_path / "a.h5", checkpoint_every=0)
    done = []

    def work():
        try:
            done.append(build(options, SETTINGS))
        except BaseException as error:
            done.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [options.path]
    assert_equal(options.path, build(dataclasses.replace(options, output=str(tmp_path / "b.h5")), SETTINGS))


def test_a_notebook_records_no_command(tiny_checkpoint, tmp_path, monkeypatch):
    kernel = ["/usr/lib/python3/site-packages/ipykernel_launcher.py", "-f", "/home/someone/kernel-123.json"]
    monkeypatch.setattr("sys.argv", kernel)
    path = build(request(tiny_checkpoint("llama"), tmp_path / "a.h5"), SETTINGS)
    with chanfmt.open(path) as atlas:
        assert atlas.producer.command == ""
    assert b"kernel" not in path.read_bytes()
    assert b"someone" not in path.read_bytes()


def test_an_output_that_appeared_during_the_build(tiny_checkpoint, tmp_path, monkeypatch):
    """It stays, and so does what was measured: as a finished atlas under another name."""
    options = request(tiny_checkpoint("llama"), tmp_path / "a.h5", checkpoint_every=0)
    whole = build(dataclasses.replace(options, output=str(tmp_path / "whole.h5")), SETTINGS)
    save = Keeper.save

    def save_and_disturb(self, measurement):
        (tmp_path / "a.h5").write_text("theirs")
        return save(self, measurement)

    monkeypatch.setattr(Keeper, "save", save_and_disturb)
    with pytest.raises(OutputAppearedError) as caught:
        build(options, SETTINGS)
    assert str(tmp_path / "a.h5.new") in caught.value.hint
    assert (tmp_path / "a.h5").read_text() == "theirs"
    assert_equal(tmp_path / "a.h5.new", whole)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.h5", "a.h5.new", "whole.h5"]
    # With --overwrite it is replaced, as was asked for.
    build(dataclasses.replace(options, overwrite=True), SETTINGS)
    assert_equal(tmp_path / "a.h5", whole)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_build_to_the_same_output_leaves_the_first_alone(tiny_checkpoint, tmp_path, monkeypatch, overwrite):
    options = request(tiny_checkpoint("llama"), tmp_path / "a.h5", checkpoint_every=0, overwrite=overwrite)
    started, begun = os.pipe()
    waiting, done = os.pipe()
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        save = Keeper.save

        def save_and_wait(self, measurement):
            save(self, measurement)
            if measurement.sequences == 5:
                os.write(begun, b"x")
                os.read(waiting, 1)
            return True

        Keeper.save = save_and_wait
        try:
            build(options, SETTINGS)
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    os.close(begun)
    assert os.read(started, 1) == b"x"
    before = options.partial.read_bytes()
    try:
        for changes in ({}, {"resume": True}):
            with pytest.raises(UsageError, match=f"process {pid} on .* is writing"):
                build(dataclasses.replace(options, **changes), SETTINGS)
        assert options.partial.read_bytes() == before
    finally:
        os.write(done, b"x")
        assert os.waitpid(pid, 0)[1] == 0
    for descriptor in (started, waiting, done):
        os.close(descriptor)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.h5"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_killed_build_stands_in_nobodys_way(tiny_checkpoint, tmp_path):
    options = request(tiny_checkpoint("llama"), tmp_path / "a.h5", checkpoint_every=0)
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)
        save = Keeper.save

        def save_and_die(self, measurement):
            save(self, measurement)
            os.kill(os.getpid(), signal.SIGKILL)

        Keeper.save = save_and_die
        build(options, SETTINGS)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    build(dataclasses.replace(options, resume=True), SETTINGS)
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.h5"]


def test_what_was_measured_stays_if_nothing_can_be_read_back(tiny_checkpoint, tmp_path, monkeypatch):
    options = request(tiny_checkpoint("llama"), tmp_path / "a.h5", checkpoint_every=0)
    whole = build(dataclasses.replace(options, output=str(tmp_path / "whole.h5")), SETTINGS)
    with monkeypatch.context() as patch:

        def refuses(path, digest):
            raise AtlasError(f"{path} cannot be opened: Too many open files")

        patch.setattr(writer, "_read_back", refuses)
        with pytest.raises(ChanfmtError, match="Too many open files") as caught:
            build(options, SETTINGS)
    assert f"{options.partial} holds what was measured" in caught.value.hint
    build(dataclasses.replace(options, resume=True), SETTINGS)
    assert_equal(tmp_path / "a.h5", whole)
