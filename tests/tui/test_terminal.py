"""The command itself: bad input, imports, and a real terminal."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import h5py
import numpy as np
import pytest

from chanfmt import __version__
from tests.support import browsed as atlases
from tests.support.browsing import open_app, press, text_of
from tests.support.factory import random_atlas
from tests.support.repeated import repeated
from tui.cli import main
from tui.watchdog import PATIENCE

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

COMMAND = [sys.executable, "-m", "tui"]
ALTERNATE_ON, ALTERNATE_OFF = b"\x1b[?1049h", b"\x1b[?1049l"
COLOR = re.compile(rb"\x1b\[(?:[0-9;]*;)?(?:[34][0-8]|9[0-7]|10[0-7])(?:;[0-9;]*)?m")


def _modules_after(code: str) -> set[str]:
    program = f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    return {name.partition(".")[0] for name in json.loads(out.splitlines()[-1])}


@pytest.mark.parametrize("option", ["--help", "--version", "--wrong"])
def test_answers_without_loading_anything(option: str) -> None:
    code = f"import tui.cli\ntry:\n    tui.cli.main([{option!r}])\nexcept SystemExit:\n    pass"
    assert not _modules_after(code) & {"textual", "rich", "h5py", "numpy", "torch", "transformers"}


def test_the_browser_never_loads_torch_or_transformers(atlas: Path) -> None:
    code = f"""
import asyncio
from tui.app import AtlasApp
from tui.session.load import read_snapshot
from tui.session.session import Session

async def use():
    app = AtlasApp(Session(read_snapshot({str(atlas)!r})))
    async with app.run_test(size=(160, 50)) as pilot:
        await pilot.press("enter", "j", "m", "escape", "question_mark")

asyncio.run(use())
"""
    modules = _modules_after(code)
    assert "textual" in modules
    assert not modules & {"torch", "transformers", "scipy", "tqdm", "huggingface_hub"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"atlas-tui {__version__}\n"


def _bad_files(folder: Path) -> Iterator[tuple[Path, str]]:
    good = random_atlas(folder / "good.h5")
    whole = good.read_bytes()
    yield folder / "missing.h5", "does not exist"
    yield folder, "is a directory"
    for name, data, said in [
        ("empty.h5", b"", "is empty"),
        ("text.h5", b"hello\n" * 100, "not an importance atlas"),
        ("truncated.h5", whole[: len(whole) // 2], "damaged"),
        ("head.h5", whole[:64], "damaged"),
    ]:
        (folder / name).write_bytes(data)
        yield folder / name, said
    with h5py.File(folder / "other.h5", "w") as file:
        file["x"] = np.arange(3)
    yield folder / "other.h5", "HDF5 file but not an importance atlas"
    shutil.copy(good, folder / "newer.h5")
    with h5py.File(folder / "newer.h5", "r+") as file:
        file.attrs["format_version"] = "2.0"
    yield folder / "newer.h5", "this chanfmt reads 1.x"
    yield atlases.with_lp(folder / "nan.h5", np.full((4, 96), np.nan)), "every value is NaN"
    yield atlases.without(folder / "lacking.h5", "lp"), "'lp'"


def test_bad_files_are_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, said in _bad_files(tmp_path):
        assert main([str(path)]) == 2, path
        captured = capsys.readouterr()
        assert captured.out == ""
        first, *hints = captured.err.splitlines()
        assert first.startswith("atlas-tui: error: "), path
        assert said in first
        assert len(hints) <= 1
        assert all(hint.startswith("  ") for hint in hints)


def test_a_name_cannot_send_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path / "no\x1b[31msuch.h5")]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_no_terminal_is_said_with_the_way_out(atlas: Path) -> None:
    done = subprocess.run([*COMMAND, str(atlas)], capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "needs a terminal" in done.stderr
    assert "atlas info" in done.stderr
    assert "Traceback" not in done.stderr


class Terminal:
    """A program on a pseudo-terminal of 80 by 24 cells."""

    def __init__(self, arguments: list[str], **environment: str) -> None:
        self.output = b""
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            values = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "TMUX")}
            values |= {"TERM": "xterm-256color", "COLORTERM": "truecolor", **environment}
            os.execve(arguments[0], arguments, values)
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))

    def read(self, seconds: float) -> bytes:
        """What arrives within ``seconds``."""
        new, end = b"", time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not select.select([self.descriptor], [], [], left)[0]:
                break
            try:
                data = os.read(self.descriptor, 65536)
            except OSError:
                break
            if not data:
                break
            new += data
        self.output += new
        return new

    def read_until(self, text: bytes, seconds: float = 20.0) -> None:
        end = time.monotonic() + seconds
        while text not in self.output:
            assert time.monotonic() < end, self.output[-2000:]
            self.read(0.05)

    def settle(self) -> None:
        """Read until it has been quiet for a while."""
        while self.read(0.5):
            pass

    def write(self, keys: str) -> None:
        os.write(self.descriptor, keys.encode())

    def wait(self, seconds: float = 20.0) -> int:
        """The exit code."""
        end = time.monotonic() + seconds
        while True:
            self.read(0.05)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.pid = 0
                return os.waitstatus_to_exitcode(status)
            assert time.monotonic() < end, self.output[-2000:]


@contextmanager
def terminal(path: Path, command: Sequence[str] = COMMAND, **environment: str) -> Iterator[Terminal]:
    """``atlas-tui`` on its first screen; killed at the end if it still runs."""
    running = Terminal([*command, str(path)], **environment)
    try:
        running.read_until(b"help")
        running.settle()
        yield running
    finally:
        if running.pid:
            os.kill(running.pid, signal.SIGKILL)
            os.waitpid(running.pid, 0)
        os.close(running.descriptor)


def test_q_restores_the_terminal_and_idle_writes_nothing(atlas: Path) -> None:
    with terminal(atlas) as running:
        assert ALTERNATE_ON in running.output
        assert COLOR.search(running.output)
        assert running.read(4.5) == b""
        running.write("/")
        running.settle()
        assert running.read(1.2) == b""
        running.write("\x1b")
        running.settle()
        running.write("q")
        assert running.wait() == 0
        assert ALTERNATE_OFF in running.output
        assert b"\x1b[?25h" in running.output[running.output.index(ALTERNATE_OFF) - 200 :]


def test_bytes_a_key(atlas: Path) -> None:
    with terminal(atlas) as running:
        running.write("j")
        assert len(running.read(0.5)) <= 2048
        running.write("\x1b[6~")
        assert len(running.read(0.5)) <= 12288


@pytest.mark.parametrize("code", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_restore_the_terminal(atlas: Path, code: signal.Signals) -> None:
    with terminal(atlas) as running:
        os.kill(running.pid, code)
        assert running.wait() == 128 + code
        assert ALTERNATE_OFF in running.output


STARVED = """
import sys, time
from tui import app
from tui.__main__ import main

def starve(self):
    print("starved", file=sys.__stderr__, flush=True)
    while {busy}:
        pass
    time.sleep(600)

app.AtlasApp.action_help = starve
sys.exit(main())
"""
"""The command, with a key that never lets the event loop go on."""


@pytest.mark.parametrize(
    ("code", "busy"),
    [
        (signal.SIGTERM, False),
        (signal.SIGTERM, True),
        *repeated((signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGHUP, False), (signal.SIGHUP, True)),
    ],
)
def test_signals_end_a_program_whose_loop_does_not_answer(atlas: Path, code: signal.Signals, busy: bool) -> None:
    with terminal(atlas, command=[sys.executable, "-c", STARVED.format(busy=busy)]) as running:
        before = termios.tcgetattr(running.descriptor)
        running.write("?")
        running.read_until(b"starved")
        running.write("q")
        os.kill(running.pid, code)
        assert running.wait() == 128 + code
        assert ALTERNATE_OFF in running.output
        assert b"\x1b[?25h" in running.output
        after = termios.tcgetattr(running.descriptor)
        assert not before[3] & termios.ECHO
        assert after[3] & termios.ECHO


def test_a_second_signal_does_not_wait(atlas: Path) -> None:
    with terminal(atlas, command=[sys.executable, "-c", STARVED.format(busy=False)]) as running:
        running.write("?")
        running.read_until(b"starved")
        start = time.monotonic()
        os.kill(running.pid, signal.SIGTERM)
        time.sleep(0.2)
        os.kill(running.pid, signal.SIGTERM)
        assert running.wait() == 128 + signal.SIGTERM
        assert time.monotonic() - start < PATIENCE


@pytest.mark.parametrize("kind", ["dumb", "unknown", ""])
def test_a_terminal_without_a_cursor_is_refused(atlas: Path, kind: str) -> None:
    running = Terminal([*COMMAND, str(atlas)], TERM=kind)
    assert running.wait() == 2
    os.close(running.descriptor)
    said = running.output.decode()
    assert f"TERM is {kind or 'not set'}" in said
    assert "atlas info" in said
    assert ALTERNATE_ON not in running.output


@pytest.mark.parametrize("encoding", ["ascii", "utf-16", *repeated("latin-1")])
def test_a_terminal_of_another_encoding_is_refused(atlas: Path, encoding: str) -> None:
    running = Terminal([*COMMAND, str(atlas)], PYTHONIOENCODING=encoding)
    assert running.wait() == 2
    os.close(running.descriptor)
    # The terminal puts a byte before each newline, so UTF-16 cannot be decoded any more.
    assert b"PYTHONIOENCODING=utf-8" in running.output.replace(b"\0", b"")
    assert ALTERNATE_ON not in running.output


def test_ctrl_z_suspends_and_comes_back(atlas: Path) -> None:
    with terminal(atlas) as running:
        running.write("\x1a")
        end = time.monotonic() + 20
        while not os.waitpid(running.pid, os.WNOHANG | os.WUNTRACED)[0]:
            running.read(0.05)
            assert time.monotonic() < end
        running.settle()
        assert ALTERNATE_OFF in running.output
        assert termios.tcgetattr(running.descriptor)[3] & termios.ECHO
        shown = len(running.output)
        os.kill(running.pid, signal.SIGCONT)
        end = time.monotonic() + 20
        while ALTERNATE_ON not in running.output[shown:]:
            running.read(0.05)
            assert time.monotonic() < end
        running.settle()
        assert b"help" in running.output[shown:]
        running.write("q")
        assert running.wait() == 0


def test_a_stale_size_in_the_environment_is_ignored(atlas: Path) -> None:
    with terminal(atlas, COLUMNS="40", LINES="10") as running:
        # Rows and columns that a screen of 40 by 10 has not.
        assert re.search(rb"\x1b\[2[34];", running.output)
        running.write("q")
        assert running.wait() == 0


def test_no_color_writes_no_colour_and_uses_glyphs(atlas: Path) -> None:
    with terminal(atlas, NO_COLOR="1") as running:
        assert not COLOR.search(running.output)
        assert b"#" in running.output
        running.write("q")
        assert running.wait() == 0


async def test_no_color_glyph_ramp(atlas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    app = open_app(atlas)
    async with app.run_test(size=(80, 24)) as pilot:
        await press(pilot, "enter", "q")
        await pilot.pause()
        assert ".:-=+*#%@ 100%" in text_of(app)
        assert "▌" not in text_of(app)
        assert "▶" in text_of(app)


async def test_an_empty_no_color_means_nothing(atlas: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "")
    app = open_app(atlas)
    async with app.run_test(size=(80, 24)) as pilot:
        await pilot.pause()
        assert "▌" in text_of(app)
        assert not app.no_color


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_copy_reaches_tmux(atlas: Path, tmp_path: Path) -> None:
    tmux = ["tmux", "-S", str(tmp_path / "socket"), "-f", os.devnull]

    def run(*arguments: str) -> str:
        return subprocess.run([*tmux, *arguments], capture_output=True, text=True, check=False).stdout

    def wait_for(expected: str, *arguments: str) -> None:
        end = time.monotonic() + 20
        while expected not in (shown := run(*arguments)):
            assert time.monotonic() < end, shown
            time.sleep(0.05)

    run("new-session", "-d", "-x", "80", "-y", "24", " ".join([*COMMAND, str(atlas)]))
    try:
        wait_for("? help", "capture-pane", "-p")
        run("send-keys", "j", "y")
        wait_for("layer\tstack\tchannels", "show-buffer")
    finally:
        run("kill-server")
