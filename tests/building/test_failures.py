"""An error while another error is handled: the user has to mend the first error, so its message is the one printed."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

import chanfmt
from chanfmt.base.errors import ChanfmtError
from chanfmt.building import build as build_module
from chanfmt.building import keeper
from chanfmt.building.distributed import LostProcessError, _Processes
from chanfmt.models.streaming.spool import Spool
from tests.support.builds import SETTINGS, assert_equal, build, request
from tests.support.heard import heard


def fail_with(error):
    def write(content, path):
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

        def full(content, path):
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
