"""The functions of `chanfmt` and `surgery` from several threads, with paths of any kind, and in another directory."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest

import chanfmt
import surgery
from chanfmt.format.sandbox import Crashed, run_contained
from chanfmt.format.writer import atlas_image
from surgery.planning.file import load_plan, save_plan
from tests.support.factory import random_content

SETTINGS = {"sequences": 8, "seq_len": 32, "rho": 0.03, "support_size": 8}


def in_threads(work, count=4) -> None:
    """Run ``work`` in threads that start together, and raise the first of their errors."""
    errors, start = [], threading.Barrier(count)

    def run(number: int) -> None:
        try:
            start.wait()
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_threads_build_at_the_same_time(tiny_checkpoint, tmp_path) -> None:
    model = tiny_checkpoint("llama")
    in_threads(lambda number: chanfmt.build(model, tmp_path / f"{number}.h5", "pydoc", **SETTINGS).close())
    found = []
    for number in range(4):
        with chanfmt.open(tmp_path / f"{number}.h5", verify=True) as atlas:
            found.append(atlas.stacks["decoder"]["lp"])
    assert all(np.array_equal(found[0], other) for other in found)


def test_threads_write_atlases_at_the_same_time() -> None:
    contents = [random_content(layers=8, seed=number) for number in range(4)]
    in_threads(lambda number: [atlas_image(contents[number]) for _ in range(5)])


def test_weights_come_from_a_path_or_a_name(tiny_checkpoint, tiny_atlas, tmp_path) -> None:
    model, path = tiny_checkpoint("llama"), tiny_atlas("llama")
    other = chanfmt.build(model, tmp_path / "other.h5", "pydoc", seed=5, **SETTINGS | {"sequences": 16, "seq_len": 64})
    digests = []
    for number, named in enumerate((model, str(model))):
        with chanfmt.relabel(path, tmp_path / f"label-{number}.h5", rho=0.05, model=named) as atlas:
            digests.append(atlas.stacks["decoder"]["connectivity"])
        with chanfmt.merge([path, other], tmp_path / f"merge-{number}.h5", model=named) as atlas:
            assert "connectivity" in atlas.stacks["decoder"]
    np.testing.assert_array_equal(*digests)
    other.close()


def test_an_open_atlas_survives_a_change_of_the_directory(tiny_checkpoint, tiny_atlas, tmp_path, monkeypatch) -> None:
    model, path = tiny_checkpoint("llama"), tiny_atlas("llama")
    chanfmt.build(model, tmp_path / "other.h5", "pydoc", seed=5, **SETTINGS | {"sequences": 16, "seq_len": 64}).close()
    monkeypatch.chdir(path.parent)
    (tmp_path / "elsewhere").mkdir()
    with chanfmt.open(path.name) as atlas:
        monkeypatch.chdir(tmp_path / "elsewhere")
        result = surgery.prune(model, atlas, "half", verify=False)
        assert (Path("half") / "atlas.h5").read_bytes() == path.read_bytes()
        assert result.names
        chanfmt.merge([atlas, "../other.h5"], "both.h5").close()
        assert atlas.path == Path(path.name)


def test_any_seed_of_a_plan_can_be_checked(tiny_checkpoint, tiny_atlas, tmp_path) -> None:
    plan = surgery.plan(tiny_atlas("llama"), 0.5, method="random", seed=2**70)
    save_plan(plan, tmp_path / "p.plan")
    assert surgery.apply(load_plan(tmp_path / "p.plan"), tiny_checkpoint("llama"), tmp_path / "half").report.logits is not None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the function runs in this process")
def test_sigterm_ends_a_contained_reader_without_a_traceback(capfd) -> None:
    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with pytest.raises(Crashed, match="SIGTERM"):
            run_contained(lambda: os.kill(os.getpid(), signal.SIGTERM) or "", size=0, cpu_seconds=5)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capfd.readouterr().err == ""
