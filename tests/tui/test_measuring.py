"""Measuring marked channels from the browser: the process, its end, its errors, and the losses on the card."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from textual.widgets import Input

from chanfmt.algebra.columns import with_columns
from chanfmt.format.columns import ABLATION_LOSS
from chanfmt.format.reader import Atlas
from chanfmt.format.writer import write_atlas
from tests.support.browsed import last_layers
from tests.support.browsing import in_layer, open_app, press, text_of, wait_until
from tests.support.factory import random_content
from tui.screens.card import CardScreen
from tui.screens.choice import ChoiceScreen
from tui.screens.message import MessageScreen
from tui.session import measuring
from tui.session.load import read_snapshot
from tui.session.measuring import Process, Wish
from tui.session.session import Session

if TYPE_CHECKING:
    from pathlib import Path

    from textual.pilot import Pilot

    from tui.app import AtlasApp


async def answered(pilot: Pilot[None], model: str, data: str, tokens: str) -> None:
    """Ask for a measurement, and answer its three questions."""
    await press(pilot, "M")
    for answer in (model, data, tokens):
        await pilot.pause()
        pilot.app.screen.query_one("#find", Input).value = answer
        await press(pilot, "enter")
    await pilot.pause()


def _alive(process: int) -> bool:
    done = subprocess.run(["ps", "-o", "stat=", "-p", str(process)], capture_output=True, text=True, check=False)
    return bool(done.stdout.strip()) and not done.stdout.strip().startswith("Z")


def test_a_process_ends_with_what_it_has_started(tmp_path: Path) -> None:
    """A command that ignores ctrl+c, and its child, are killed; stopped before its start, a command never starts."""
    code = (
        "import os, signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); "
        "child = subprocess.Popen(['sleep', '60']); print(child.pid, file=sys.stderr, flush=True); time.sleep(60)"
    )
    process = Process()
    thread = threading.Thread(target=process.run, args=([sys.executable, "-c", code],))
    thread.start()
    end = time.monotonic() + 20
    while not process.lines and time.monotonic() < end:
        time.sleep(0.01)
    process.stop()
    thread.join(20)
    assert not thread.is_alive()
    # The child has ended too. A process that has ended and that nobody waits for is a zombie.
    while _alive(int(process.lines[0])):
        assert time.monotonic() < end
        time.sleep(0.01)
    never = Process()
    never.stop()
    assert never.run([sys.executable, "-c", f"open({str(tmp_path / 'a')!r}, 'w')"]) == 0
    assert not (tmp_path / "a").exists()


def test_a_process_ends_with_a_browser_that_is_killed(tmp_path: Path) -> None:
    """Nothing can ask the command to end when the browser itself is killed."""
    pid = tmp_path / "pid"
    inner = f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    code = (
        "import sys, threading, time; from tui.session.measuring import Process; "
        f"threading.Thread(target=Process().run, args=([sys.executable, '-c', {inner!r}],)).start(); time.sleep(60)"
    )
    browser = subprocess.Popen([sys.executable, "-c", code])
    end = time.monotonic() + 30
    while not (pid.exists() and pid.read_text()):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert _alive(int(pid.read_text()))
    browser.kill()
    browser.wait()
    while _alive(int(pid.read_text())):
        assert time.monotonic() < end
        time.sleep(0.01)


async def test_an_error_is_shown_in_full(small: Path, tmp_path: Path) -> None:
    """The real command refuses the model; the browser goes on, and the next question begins with the answer."""
    app = open_app(small)
    async with app.run_test(size=(80, 24)) as pilot:
        layer = await in_layer(pilot, app)
        await press(pilot, "M")
        await pilot.pause()
        assert "no channel is marked" in text_of(app)
        await press(pilot, "space", "j", "space")
        await answered(pilot, "/no/model.gguf", "pydoc", "64")
        assert app.session.measuring.running
        assert "measuring" in text_of(app)
        await press(pilot, "j")
        await pilot.pause()
        assert layer.table.cursor == 2, "the browser answers while the process runs"
        await wait_until(lambda: isinstance(app.screen, MessageScreen), 60)
        await pilot.pause()
        assert "the GGUF file /no/model.gguf does not exist" in text_of(app)
        assert "measuring" not in text_of(app)
        await press(pilot, "q")
        await wait_until(lambda: app.screen is layer)
        assert app.session.measuring.wish == Wish("/no/model.gguf", "pydoc", 32, 64)
        assert read_snapshot(small).signature == app.session.browser.snapshot.signature


async def test_quitting_stops_the_measurement(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "command", lambda *_, **__: ["sleep", "60"])
    app = open_app(small)
    async with app.run_test(size=(80, 24)) as pilot:
        await in_layer(pilot, app)
        await press(pilot, "space")
        await answered(pilot, "model", "pydoc", "0")
        process = app.session.measuring._process
        assert process is not None
        await press(pilot, "M")
        await wait_until(lambda: isinstance(app.screen, ChoiceScreen))
        await press(pilot, "j", "enter")
        await wait_until(lambda: not app.session.measuring.running)
        await pilot.pause()
        assert "stopped; a measurement of the same text goes on from here" in text_of(app)
        await answered(pilot, "model", "pydoc", "0")
        second = app.session.measuring._process
        await press(pilot, "q", "q")
        await wait_until(lambda: isinstance(app.screen, ChoiceScreen))
        await pilot.pause()
        assert "a measurement is running" in text_of(app)
        app.action_interrupt()
    assert second is not None
    assert second.stopped


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    partial = Session(read_snapshot(last_layers(tmp_path / "a.h5", 2)))
    assert partial.measuring.refusal()
    assert Wish("", "hf/data@test", 128, 0).directory == "-ablation-hf-data-test-all"


async def test_numbers_that_the_atlas_has_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The card shows a measured loss with its error, and the question before the next measurement tells both ways."""
    content = random_content()
    values = {
        name: np.full(content.stacks[0].variables["lp"].shape, np.nan, dtype=np.float32)
        for name in (ABLATION_LOSS, f"{ABLATION_LOSS}_error")
    }
    channel = int(content.stacks[0].variables["lp"][0].argmax())
    values[ABLATION_LOSS][0, channel], values[f"{ABLATION_LOSS}_error"][0, channel] = 0.125, 0.0625
    write_atlas(with_columns(content, {name: {"decoder": array} for name, array in values.items()}), tmp_path / "a.h5")
    asked: list[bool] = []
    monkeypatch.setattr(measuring, "command", lambda *_, replace, **__: asked.append(replace) or ["true"])
    app: AtlasApp = open_app(tmp_path / "a.h5")
    async with app.run_test(size=(80, 24)) as pilot:
        layer = await in_layer(pilot, app)
        await press(pilot, "enter")
        await wait_until(lambda: isinstance(app.screen, CardScreen))
        await pilot.pause()
        assert "set to 0: the loss changes by +0.125 ± 0.0625 nats per token" in text_of(app)
        await press(pilot, "q", "space", "j", "space")
        await wait_until(lambda: app.screen is layer)
        for choice in (1, 2):
            await answered(pilot, "model", "pydoc", "0")
            await wait_until(lambda: isinstance(app.screen, ChoiceScreen))
            await pilot.pause()
            assert "the atlas has numbers of 1 of the 2 channels" in text_of(app)
            await press(pilot, *["j"] * choice, "enter")
            await wait_until(lambda: not app.session.measuring.running)
            assert len(asked) == choice
        assert asked == [False, True]


@pytest.mark.repeated
async def test_a_measurement_ends_on_the_card(tmp_path: Path) -> None:
    from tests.support.measured import make_tiny  # It imports torch, which the other tests do not need.

    tiny = make_tiny(tmp_path, "llama")
    app = open_app(tiny.atlas)
    async with app.run_test(size=(80, 24)) as pilot:
        layer = await in_layer(pilot, app)
        await press(pilot, "space", "j", "space")
        marked = np.flatnonzero(app.session.marks.of(0))
        await answered(pilot, str(tiny.model), str(tiny.text), "64")
        await wait_until(lambda: not app.session.measuring.running, 120)
        await wait_until(lambda: ABLATION_LOSS in app.session.browser.snapshot.metrics)
        await pilot.pause()
        assert "the losses are on the cards" in text_of(app)
        losses = app.session.browser.snapshot.values(0, ABLATION_LOSS)
        assert np.flatnonzero(np.isfinite(losses)).tolist() == marked.tolist()
        with Atlas.open(tiny.atlas, verify=True):
            pass
        await wait_until(lambda: app.screen is layer)
        await press(pilot, "enter")
        await wait_until(lambda: isinstance(app.screen, CardScreen))
        await pilot.pause()
        assert "set to 0: the loss changes by" in text_of(app)
