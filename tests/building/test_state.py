"""Partial atlases: their content, when they are written, and that a continued build equals an uninterrupted one."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import signal

import h5py
import numpy as np
import pytest
import torch

import chanfmt
from chanfmt.algebra.metrics import FORMULAS
from chanfmt.base.errors import AtlasError, ChanfmtError, UsageError
from chanfmt.building import build as build_module
from chanfmt.building import keeper, state
from chanfmt.building import plan as plan_module
from chanfmt.building.measure import measure
from chanfmt.cli.main import main
from chanfmt.data.tokens import canonical
from chanfmt.format import schema
from chanfmt.format.records import MEMORY_PREDICTION
from chanfmt.format.writer import write_atlas
from chanfmt.models.find.discover import find_ffns
from chanfmt.models.source import ModelSource
from tests.support.browsing import press, wait_until
from tests.support.builds import SEQUENCES, SETTINGS, assert_equal, build, request, stop_after
from tests.support.factory import random_atlas, random_content
from tests.support.heard import heard
from tests.support.repeated import repeated
from tests.support.tiny import tiny_model
from tui.app import AtlasApp
from tui.session.load import present_file, read_snapshot
from tui.session.session import Session
from tui.widgets.lines import Lines


@pytest.fixture
def options(tiny_checkpoint, tmp_path):
    return request(tiny_checkpoint("llama"), tmp_path / "a.h5", checkpoint_every=0)


@pytest.fixture
def said():
    """The lines that the build says."""
    with heard() as lines:
        yield lines


@pytest.fixture(scope="module")
def uninterrupted(tiny_checkpoint, tmp_path_factory):
    return build(request(tiny_checkpoint("llama"), tmp_path_factory.mktemp("whole") / "a.h5"), SETTINGS)


# The first batch, the second of the warm-up (which ends with an odd sequence), the first after it, the middle, the last.
@pytest.mark.parametrize("batches", [1, 2, 12, *repeated(3, 6)])
def test_a_continued_build_equals_an_uninterrupted_one(options, uninterrupted, monkeypatch, said, batches):
    stop_after(options, batches, monkeypatch)
    with chanfmt.open(options.partial) as atlas:
        done = atlas.calibration.sequences
    path = build(dataclasses.replace(options, resume=True, checkpoint_every=None), SETTINGS)
    assert f"continuing after {done} of {SEQUENCES} sequences" in "\n".join(said)
    assert_equal(path, uninterrupted)
    assert [item.name for item in path.parent.iterdir() if item.is_file()] == ["a.h5"]
    with chanfmt.open(path) as atlas:
        prediction, line = atlas.producer.history
        assert set(prediction) == {MEMORY_PREDICTION}
        assert line["resumed_at_sequence"] == done
        assert set(line) == {"command", "resumed_at_sequence", "time"}


@pytest.mark.parametrize("length", [248, 255, *repeated(200)])
def test_an_output_with_a_long_name_is_continued(options, uninterrupted, monkeypatch, length):
    """A name may have 255 bytes, and the partial atlas has a longer name than its output, if there is room."""
    options = dataclasses.replace(options, output=str(options.path.with_name("x" * (length - 3) + ".h5")))
    stop_after(options, 3, monkeypatch)
    assert present_file(options.path) == options.partial
    options.partial.write_bytes(b"no longer an atlas")
    build(dataclasses.replace(options, resume=True, checkpoint_every=None), SETTINGS)
    assert options.partial.with_name(options.partial.name + ".broken").read_bytes() == b"no longer an atlas"
    options.path.unlink()
    stop_after(options, 3, monkeypatch)
    assert_equal(build(dataclasses.replace(options, resume=True, checkpoint_every=None), SETTINGS), uninterrupted)
    assert not options.partial.exists()


def test_several_sessions_add_up(options, uninterrupted, monkeypatch):
    stop_after(options, 2, monkeypatch)
    with chanfmt.open(options.partial) as atlas:
        first = atlas.producer.seconds
    options = dataclasses.replace(options, resume=True)
    stop_after(options, 1, monkeypatch)
    stop_after(options, 4, monkeypatch)
    assert_equal(build(options, SETTINGS), uninterrupted)
    with chanfmt.open(options.path) as atlas:
        assert len(atlas.producer.history) == 1 + 3
        assert atlas.producer.seconds > first > 0


def test_a_checkpoint_is_an_atlas_of_what_was_measured(options, monkeypatch, capsys):
    stop_after(options, 6, monkeypatch)
    done = 10
    with chanfmt.open(options.partial, verify=True) as atlas:
        content = atlas.content()
    assert content.status == "partial"
    assert content.calibration.sequences == len(content.calibration.token_ids) == done
    tokens = canonical(content.calibration.token_ids)
    assert tokens.sha256 == content.calibration.sequence_sha256
    assert content.calibration.contributions[0].tokens == done * 32
    model = plan_module.load_model(ModelSource(options.model))
    ffns = find_ffns(model)
    direct = measure(model, ffns, dataclasses.replace(tokens, split_of=content.calibration.split_of), rho=0.03, batch_size=2)
    assert content.calibration.mean_loss == direct.mean_loss
    variables = content.stacks[0].variables
    assert "connectivity" not in variables
    for row, (statistics,) in enumerate(found.members for found in direct.statistics):
        assert variables["tokens"][row] == done * 32
        np.testing.assert_array_equal(variables["sum_q2"][row], statistics.sums["sum_q2"].numpy())
        np.testing.assert_array_equal(variables["sum_q2_split"][:, row], statistics.split_q2.numpy())
        lp = 0.5 * variables["sum_q2"][row] / (done * 32)
        np.testing.assert_allclose(variables["lp"][row], lp, rtol=1e-6)
        assert set(np.flatnonzero(variables["label"][row])) == set(np.argsort(-lp)[:2])
    assert set(np.unique(variables["label"])) == {schema.LABEL_NONE, schema.LABEL_SUPERNODE}
    assert all(variable.merge in ("", "drop") for group in content.extensions for variable in group.variables)
    snapshot = read_snapshot(options.partial)
    assert (snapshot.status, snapshot.calibration_tokens) == ("partial", done * 32)
    assert tuple(snapshot.metrics) == tuple(FORMULAS)
    assert main(["info", str(options.partial)]) == 0
    assert "partial" in capsys.readouterr().out


async def test_the_browser_follows_a_build_to_its_end(options, monkeypatch):
    stop_after(options, 2, monkeypatch)
    app = AtlasApp(Session(read_snapshot(options.path)))
    options = dataclasses.replace(options, resume=True)

    def title():
        return app.screen.query_one("#title", Lines).text

    async def polled(text):
        app.session.poll()
        app.session.poll()
        await wait_until(lambda: text in title())

    async with app.run_test(size=(100, 24)) as pilot:
        await pilot.pause()
        assert f"{options.partial.name}   PARTIAL: " in title()
        assert f" {3 * 32:,} tokens" in title()
        await press(pilot, "enter", "j", "space")
        await pilot.pause()
        stop_after(options, 3, monkeypatch)
        app.session.poll()
        app.session.poll()
        await wait_until(lambda: app.session.browser.snapshot.calibration_tokens > 3 * 32)
        assert app.session.marks.counts == [1, 0, 0]
        build(options, SETTINGS)
        await press(pilot, "q")
        await polled(f" {options.path.name}   ")
        assert "PARTIAL" not in title()
        assert app.session.browser.snapshot.status == "complete"
        assert app.session.marks.counts == [1, 0, 0]
        assert app.session.protect_file == options.path.with_name(f"{options.path.stem}.protect.json")


def test_without_tokens(options, tmp_path, monkeypatch):
    # Driving tokens need the tokens, so they would not be the same build.
    options = dataclasses.replace(options, columns="activity")
    stop_after(dataclasses.replace(options, no_store_tokens=True), 4, monkeypatch)
    whole = build(dataclasses.replace(options, output=str(tmp_path / "whole.h5")), SETTINGS)
    assert_equal(build(dataclasses.replace(options, resume=True), SETTINGS), whole)


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({"seq_len": 16}, {}, "--seq-len was 32 and is 16"),
        ({"sequences": 12}, {}, "the number of sequences was 20 and is 12"),
        ({"seed": 3}, {}, "--seed was 0 and is 3"),
        ({"columns": "peaks"}, {}, "--columns was peaks,positions,activity,drivers=8 and is peaks"),
        ({"dtype": "float64"}, {}, "--dtype was float32 and is float64"),
        ({"batch_size": "4"}, {}, "--batch-size was 2 and is 4"),
        ({}, {"rho": 0.05}, "--rho was 0.03 and is 0.05"),
        ({}, {"eta": 0.2, "gamma": 4.0}, "--eta was 0.1 and is 0.2; --gamma was 8.0 and is 4.0"),
    ],
)
def test_a_changed_request_is_refused_by_name(options, monkeypatch, changes, settings, message):
    stop_after(options, 3, monkeypatch)
    before = options.partial.read_bytes()
    with pytest.raises(UsageError) as caught:
        build(dataclasses.replace(options, resume=True, **changes), dataclasses.replace(SETTINGS, **settings))
    assert caught.value.message == f"{options.partial} cannot be continued: {message}"
    assert "leave out --resume" in caught.value.hint
    assert options.partial.read_bytes() == before


def test_a_changed_model_or_text_is_refused_by_name(options, monkeypatch, tmp_path):
    directory, text = tmp_path / "model", tmp_path / "t.txt"
    shutil.copytree(options.model, directory)
    words = np.random.default_rng(0).integers(97, 123, 2000).astype(np.uint8).tobytes()
    text.write_bytes(words)
    options = dataclasses.replace(options, model=str(directory), calib=str(text), resume=True)
    stop_after(options, 3, monkeypatch)

    def refused(what):
        with pytest.raises(UsageError) as caught:
            build(options, SETTINGS)
        assert caught.value.message == f"{options.partial} cannot be continued: {what}"

    text.write_bytes(words[::-1])
    refused("the calibration text changed")
    text.write_bytes(words)
    config = directory / "config.json"
    old = config.read_text()
    config.write_text(old.replace("1e-06", "1e-05"))
    refused("the model's config.json changed")
    config.write_text(old)
    tiny_model("llama", seed=1).save_pretrained(directory)
    refused("the model's weights changed")


def test_another_environment_is_noted(options, uninterrupted, monkeypatch, said):
    stop_after(options, 3, monkeypatch)
    real = build_module.environment_of
    monkeypatch.setattr(build_module, "environment_of", lambda model: real(model) | {"torch": "1.0", "threads": 99})
    build(dataclasses.replace(options, resume=True), SETTINGS)
    note = next(line for line in said if "last bits" in line)
    assert note.startswith(f"note: torch was {torch.__version__} and is 1.0; the number of threads was ")


def test_nothing_to_continue_and_starting_over(options, uninterrupted, monkeypatch, said):
    assert_equal(build(dataclasses.replace(options, resume=True), SETTINGS), uninterrupted)
    assert "there is no" in "\n".join(said)
    with pytest.raises(UsageError, match="exists"):
        build(dataclasses.replace(options, resume=True), SETTINGS)
    options.path.unlink()
    stop_after(options, 3, monkeypatch)
    said.clear()
    assert_equal(build(options, SETTINGS), uninterrupted)
    assert "holds an unfinished build, which --resume would continue" in "\n".join(said)
    assert not options.partial.exists()


# A flipped bit is found only if the whole file is read, and a build that starts over does not read it.
@pytest.mark.parametrize(
    ("damage", "resume"),
    [
        ("flipped", True),
        ("truncated", True),
        ("text", True),
        ("complete", True),
        ("truncated", False),
        ("directory", False),
    ],
)
def test_what_cannot_be_continued_is_moved_aside(options, uninterrupted, monkeypatch, said, damage, resume):
    kept = options.partial
    if damage == "directory":
        kept.mkdir()
    elif damage == "text":
        kept.write_text("my own notes")
    elif damage == "complete":
        random_atlas(kept)
    else:
        stop_after(options, 3, monkeypatch)
        image = bytearray(kept.read_bytes())
        image[len(image) // 2] ^= 1
        kept.write_bytes(image if damage == "flipped" else image[: len(image) // 2])
    before = kept.read_bytes() if kept.is_file() else None
    said.clear()
    assert_equal(build(dataclasses.replace(options, resume=resume), SETTINGS), uninterrupted)
    broken = kept.with_name("a.h5.partial.broken")
    assert f"moved to {broken}" in "\n".join(said)
    assert (broken.read_bytes() if broken.is_file() else None) == before
    assert not kept.exists()


def test_a_checkpoint_of_an_older_chanfmt_stays_where_it_is(options, monkeypatch):
    monkeypatch.setattr("chanfmt.building.state.LAYOUT", state.LAYOUT - 1)
    stop_after(options, 3, monkeypatch)
    left = options.partial.read_bytes()
    monkeypatch.setattr("chanfmt.building.state.LAYOUT", state.LAYOUT + 1)
    with pytest.raises(UsageError, match="begun by an older chanfmt"):
        build(dataclasses.replace(options, resume=True), SETTINGS)
    assert options.partial.read_bytes() == left


def test_a_checkpoint_left_by_a_finished_build_is_removed(options, monkeypatch):
    stop_after(options, 3, monkeypatch)
    left = options.partial.read_bytes()
    build(dataclasses.replace(options, resume=True), SETTINGS)
    options.partial.write_bytes(left)
    with pytest.raises(UsageError, match="exists"):
        build(dataclasses.replace(options, resume=True), SETTINGS)
    assert not options.partial.exists()
    random_atlas(options.path)
    options.partial.write_bytes(left)
    with pytest.raises(UsageError, match="exists"):
        build(options, SETTINGS)
    assert options.partial.read_bytes() == left


def test_a_checkpoint_that_cannot_be_written_is_said_once(options, uninterrupted, monkeypatch, said):
    real, calls = keeper.write_atlas, []

    def full_from_the_third_on(content, path, **options):
        calls.append(path)
        if len(calls) > 2:
            raise ChanfmtError("the disk is full")
        return real(content, path, **options)

    monkeypatch.setattr(keeper, "write_atlas", full_from_the_third_on)
    assert_equal(build(options, SETTINGS), uninterrupted)
    assert len(calls) == 12
    error = "\n".join(said)
    assert error.count("no partial atlas was written: the disk is full") == 1


@pytest.mark.parametrize("every", [0, math.inf])
def test_an_atlas_that_cannot_be_written_leaves_a_checkpoint(options, uninterrupted, monkeypatch, every):
    options = dataclasses.replace(options, checkpoint_every=every)

    def full(content, path, **options):
        raise ChanfmtError("the disk is full", hint="free some space")

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "write_atlas", full)
        with pytest.raises(ChanfmtError, match="the disk is full") as caught:
            build(options, SETTINGS)
    assert "free some space" in caught.value.hint
    assert "--resume" in caught.value.hint
    with chanfmt.open(options.partial) as atlas:
        assert atlas.calibration.sequences == SEQUENCES
    assert_equal(build(dataclasses.replace(options, resume=True), SETTINGS), uninterrupted)


def test_a_signal_waits_for_the_batch_and_the_second_does_not(options, uninterrupted, monkeypatch):
    options = dataclasses.replace(options, checkpoint_every=math.inf)
    real = keeper.Keeper.due

    def interrupt(count):
        def due(self, measurement):
            if measurement.sequences == 5:
                for _ in range(count):
                    os.kill(os.getpid(), signal.SIGINT)
            return real(self, measurement)

        return due

    with monkeypatch.context() as patch:
        patch.setattr(keeper.Keeper, "due", interrupt(2))
        with pytest.raises(KeyboardInterrupt) as caught:
            build(options, SETTINGS)
        assert str(caught.value) == ""
        assert not options.partial.exists()
        patch.setattr(keeper.Keeper, "due", interrupt(1))
        with pytest.raises(KeyboardInterrupt, match="--resume"):
            build(options, SETTINGS)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with chanfmt.open(options.partial) as atlas:
        assert atlas.calibration.sequences == 7
    assert_equal(build(dataclasses.replace(options, resume=True), SETTINGS), uninterrupted)


@pytest.mark.parametrize("stream", [False, True])
def test_a_continued_build_that_runs_out_of_memory_is_refused_and_loses_nothing(options, monkeypatch, said, stream):
    options = dataclasses.replace(options, batch_size="auto", stream=stream)
    limit = [100]

    def too_large(module, args):
        if torch.is_grad_enabled() and args[0].shape[0] > limit[0]:
            raise torch.OutOfMemoryError("this batch does not fit")

    def load(*arguments, **more):
        model = real(*arguments, **more)
        model.model.layers[1].mlp.register_forward_pre_hook(too_large)
        return model

    def opened(*arguments, **more):
        streamed = real_streamed(*arguments, **more)
        streamed.chain.model.model.layers[1].mlp.register_forward_pre_hook(too_large)
        return streamed

    real, real_streamed = plan_module.load_model, plan_module.open_streamed
    monkeypatch.setattr(plan_module, "load_model", load)
    monkeypatch.setattr(plan_module, "open_streamed", opened)
    monkeypatch.setattr("chanfmt.models.run.BATCH_TOKENS", {"cpu": 16 * 32})
    whole = build(dataclasses.replace(options, output=str(options.path.with_name("b.h5"))), SETTINGS)
    stop_after(options, 1, monkeypatch)
    # A batch has at most the three sequences of a split.
    limit[0] = 2
    with pytest.raises(ChanfmtError, match="out of memory with 16 sequences in a batch, and an unfinished build") as caught:
        build(dataclasses.replace(options, resume=True), SETTINGS)
    assert "start over without --resume, with --batch-size 8" in caught.value.hint
    assert not any("starting over" in line for line in said)
    limit[0] = 100
    assert_equal(build(dataclasses.replace(options, resume=True), SETTINGS), whole)
    assert sum(line.startswith("continuing after") for line in said) == 2


def test_reads_of_several_widths_keep_their_own():
    rows = [np.arange(3.0), np.arange(5.0)]
    stacked = state._stack_padded(rows)
    assert stacked.shape == (2, 5)
    np.testing.assert_array_equal(stacked[0, :3], rows[0])
    assert not stacked[0, 3:].any()


def test_a_partial_atlas_of_another_version_is_refused(tmp_path):
    content = dataclasses.replace(random_content(), status="partial")
    write_atlas(content, tmp_path / "a.h5.partial")
    with pytest.raises(AtlasError, match="is not a partial atlas of a build"):
        state.read_partial(tmp_path / "a.h5.partial")


def test_an_older_partial_atlas_says_whether_it_was_streamed(options, monkeypatch):
    stop_after(options, 2, monkeypatch)
    assert state.order_left(options.partial) == "whole"
    with h5py.File(options.partial, "r+") as file:
        attributes = file["x_chanfmt/resume"].attrs
        del attributes["memory"]
        attributes["stream"] = "yes"
    assert state.order_left(options.partial) == "stream"
    assert state.order_left(options.path) is None
