"""A session without a terminal: what the screens would ask and tell, with a front that does its work at once."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import tui
from chanfmt.base.errors import ChanfmtError
from tests.support.factory import random_atlas
from tui.session.comparing import Comparing
from tui.session.load import read_snapshot
from tui.session.place import Opening, Place
from tui.session.registry import OF_TWO, REGISTRY, ROW_OF, SCREENS, path_to
from tui.session.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable

    from tui.session.front import Question

ROOT = Path(tui.__file__).parent


class Desk:
    """A front that works at once, answers every question with ``choice``, and records what it is told."""

    ramp: tuple[str, ...] = ()
    colourless = True

    def __init__(self, choice: str | None = None) -> None:
        self.choice = choice
        self.said: list[str] = []
        self.asked: list[Question] = []
        self.went: list[str] = []
        self.ended: list[str | None] = []

    def start(
        self,
        work: Callable[[], Any],
        then: Callable[[Any], object],
        *,
        refused: Callable[[str], object],
        group: str,
        exclusive: bool = True,
    ) -> None:
        try:
            result = work()
        except ChanfmtError as error:
            refused(error.message)
        else:
            then(result)

    def say(self, notice: str) -> None:
        self.said.append(notice)

    def ask(self, question: Question, answer: Callable[[str | None], None]) -> None:
        self.asked.append(question)
        answer(self.choice)

    def show_browser(self) -> None: ...

    def show_marks(self) -> None: ...

    def show_comparison(self) -> None: ...

    def copy(self, text: str) -> None: ...

    def open(self, name: str, opening: Opening) -> None:
        self.went.append(name)

    def visit(self, name: str) -> None:
        self.went.append(name)

    def leave(self, span: range) -> None: ...

    def exit(self, result: str | None = None) -> None:
        self.ended.append(result)


def opened(path: Path, desk: Desk, **more: Any) -> Session:
    session = Session(read_snapshot(path), **more)
    session.attach(desk)
    return session


def test_marks_are_written_read_and_undone(small: Path) -> None:
    desk = Desk()
    session = opened(small, desk)
    session.mark({1: np.array([3, 5])}, "two", on=True)
    session.marking.write()
    assert json.loads(session.protect_file.read_text())["layers"] == {"1": [3, 5]}
    session.marking.undo()
    session.marking.redo()
    session.marking.mark_rule("1:7", on=True, refused=session.say)
    session.marking.mark_rule("nothing like this", on=True, refused=session.say)
    assert session.marks.counts == [0, 3, 0, 0]
    session.marking.discard()
    assert np.flatnonzero(session.marks.of(1)).tolist() == [3, 5]
    assert desk.said[:5] == ["marked 2", "wrote a.protect.json", "undone: two", "redone: two", "marked 1"]
    assert not desk.asked


@pytest.mark.parametrize("choice", [None, "stay", "load", "write"])
def test_a_file_that_has_changed_is_not_written_over_unasked(small: Path, choice: str | None) -> None:
    desk = Desk(choice)
    session = opened(small, desk)
    session.mark({0: np.array([1])}, "one", on=True)
    theirs = '{"format": "protect/1", "layers": {"2": [9]}}'
    session.protect_file.write_text(theirs)
    session.marking.write()
    assert [question.title for question in desk.asked] == ["a.protect.json has changed on disk"]
    assert (session.protect_file.read_text() == theirs) == (choice != "write")
    assert session.marks.counts == ([0, 0, 1, 0] if choice == "load" else [1, 0, 0, 0])


@pytest.mark.parametrize(("choice", "ended", "written"), [("stay", 0, False), ("quit", 1, False), ("write", 1, True)])
def test_quitting_asks_about_unsaved_marks(small: Path, choice: str, ended: int, written: bool) -> None:
    desk = Desk(choice)
    session = opened(small, desk)
    session.mark({0: np.array([1])}, "one", on=True)
    session.quit("last words")
    assert desk.ended == ["last words"] * ended
    assert session.protect_file.exists() == written


def test_a_second_atlas_is_opened_compared_and_swapped(small: Path, tmp_path: Path) -> None:
    desk = Desk()
    session = opened(small, desk)
    session.compare_with(str(tmp_path / "none.h5"))
    session.compare_with(str(random_atlas(tmp_path / "wide.h5", channels=128)))
    assert session.other is None
    assert ["does not exist" in desk.said[0], "channels" in desk.said[1]] == [True, True]
    session.compare_with(str(random_atlas(tmp_path / "b.h5", calibration_seed=3)))
    assert desk.went == ["compare"]
    comparing = Comparing(session)
    comparing.compute("lp")
    assert comparing.comparison is not None
    shared = [row.supernodes_first for row in comparing.comparison.rows]
    comparing.swap("lp")
    assert [row.supernodes_second for row in comparing.comparison.rows] == shared
    comparing.compute("fame")
    assert comparing.comparison is None
    assert "fame" in comparing.refusal


def test_files_are_read_again(small: Path) -> None:
    desk = Desk()
    session = opened(small, desk)
    session.mark({3: np.array([2])}, "one", on=True)
    before = session.browser
    random_atlas(small.with_name("next.h5"), layers=5).replace(small)
    session.poll()
    assert session.browser is before
    session.poll()
    assert len(session.browser.snapshot.ffns) == 5
    assert session.marks.counts == [0, 0, 0, 1, 0]
    small.write_bytes(b"no atlas")
    session.reload()
    assert desk.said[-1].startswith("still shown as read at ")
    assert len(session.browser.snapshot.ffns) == 5


def test_the_table_of_screens_is_sound() -> None:
    keys = [row.key for row in REGISTRY if row.key]
    assert len(set(SCREENS)) == len(REGISTRY)
    assert len(set(keys)) == len(keys)
    for row in REGISTRY:
        assert bool(row.key) == bool(row.word) == bool(row.sentence)
        assert not row.on or row.on in ROW_OF
        assert not row.on or not ROW_OF[row.on].needs_other or row.needs_other
    assert [row.name for row in path_to("card")] == ["layer", "card"]
    assert [row.name for row in path_to("join")] == ["compare"]
    assert path_to("overview") == []
    assert OF_TWO == ("compare", "join")
    assert Place(SCREENS[0]) == Place()


def imports_of(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def test_screens_know_neither_the_app_nor_each_other() -> None:
    """No screen imports another screen, not even for types. Code that screens share is not a screen."""
    screens = {row.factory.partition(":")[0] for row in REGISTRY}
    for path in (ROOT / "screens").glob("*.py"):
        assert not imports_of(path) & {"tui.app", "tui.cli", "tui.picture", *screens}, path
    for folder in ("session", "widgets"):
        for path in (ROOT / folder).glob("*.py"):
            assert not {name for name in imports_of(path) if name.startswith(("tui.app", "tui.screens"))}, path


def test_a_session_needs_no_textual() -> None:
    modules = ", ".join(f"tui.session.{path.stem}" for path in (ROOT / "session").glob("*.py") if path.stem != "__init__")
    code = f"import sys, {modules}\nassert not {{'textual', 'torch', 'transformers'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
