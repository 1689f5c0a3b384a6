"""Keys that the user has chosen: the file, what it refuses, and what the screens then do and say."""

from __future__ import annotations

from pathlib import Path

import pytest

from chanfmt.base.errors import UsageError
from tests.support.browsing import in_layer, press, text_of, wait_until
from tui.app import AtlasApp
from tui.cli import main
from tui.screens.choice import ChoiceScreen
from tui.screens.help import HelpScreen
from tui.screens.rebinding import FIXED, _chain, keymap
from tui.session.keys import VARIABLE, keys_file, read_keys
from tui.session.load import read_snapshot
from tui.session.registry import REGISTRY
from tui.session.session import Session


def read(path: Path, text: str) -> dict[str, str]:
    path.write_text(text)
    return keymap(read_keys(path), path, AtlasApp)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('mrak = "z"', "unknown action 'mrak'; did you mean mark"),
        ('mark = "spaec"', "mark has the unknown key 'spaec'"),
        ('mark = "a,b"', "mark has the unknown key 'a,b'"),
        ('mark = "escape"', "mark cannot have the key 'escape', which is fixed"),
        ('mark = "7"', "fixed"),
        ('mark = "f"', "on the screen layer, filter and mark would have the same key f"),
        ('mark = "s"', "on the screen layer, mark and sort would have the same key s"),  # A key of the table.
        ('mark = "r"', "mark and reload would have the same key r"),  # A key of the program.
        ('mark = "z"\nfind = "z"', "find and mark would have the same key z"),
        ('next-layer = ","', "would have the same key comma"),
        ("mark = 3", "must be a key"),
        ("mark = []", "must be a key"),
        ("mark = ", "is not TOML"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason.replace("(", r"\(")):
        read(tmp_path / "keys.toml", text)


def test_where_the_file_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    assert keys_file(None) is None
    from tui.session.keys import default_file

    default_file().parent.mkdir(parents=True)
    default_file().write_text('[keys]\nmark = "m"\nmetric = "M"\n')
    assert keys_file(None) == default_file()
    assert read_keys(default_file()) == {"mark": ("m",), "metric": ("M",)}
    monkeypatch.setenv(VARIABLE, str(tmp_path / "other.toml"))
    assert keys_file(None) == tmp_path / "other.toml"
    assert keys_file("mine.toml").name == "mine.toml"  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="cannot be read"):
        read_keys(tmp_path / "other.toml")


def test_the_command_refuses_a_wrong_file(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "keys.toml").write_text('mark = "f"')
    picture = tmp_path / "a.svg"
    arguments = [str(small), "--keys", str(tmp_path / "keys.toml"), "--screenshot", "layer", "--export-svg", str(picture)]
    assert main(arguments) == 2
    assert "filter and mark would have the same key f" in capsys.readouterr().err
    assert not picture.exists()


def test_every_action_of_the_help_can_have_another_key(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "browsing.md").read_text()
    read(tmp_path / "keys.toml", page.partition("```toml\n")[2].partition("```")[0])
    names = " ".join(page.split())
    for row in REGISTRY:
        for binding in _chain(row.factory, AtlasApp):
            assert binding.id or binding.key in FIXED or not binding.tooltip, (row.name, binding)
            assert not binding.id or f"`{binding.id}` (" in names, f"docs/browsing.md does not name {binding.id}"


async def test_chosen_keys_work_and_are_shown(small: Path, tmp_path: Path) -> None:
    # Two actions that exchange their keys, a key of the table, two keys for one action, and a key of the program.
    text = 'mark = "x"\nscatter = "space"\ndown = "ctrl+n"\nfind = ["?", "&"]\nhelp = "f1"\nmetric = "v"\nmark-range = "m"'
    app = AtlasApp(Session(read_snapshot(small)), read(tmp_path / "keys.toml", text))
    async with app.run_test(size=(100, 30)) as pilot:
        layer = await in_layer(pilot, app)
        await press(pilot, "ctrl+n", "x", "ctrl+n", "down", "j")
        await pilot.pause()
        assert layer.table.cursor == 3, "j moves no more, and the arrow still does"
        assert app.session.marks.counts[0] == 1
        last = text_of(app).splitlines()[-1]
        assert "x mark" in last
        assert "␣ scatter" in last
        assert last.rstrip().endswith("f1 help")
        await press(pilot, "m", "ctrl+n", "x")
        await pilot.pause()
        assert app.session.marks.counts[0] == 3
        await press(pilot, "ampersand")
        await pilot.pause()
        assert layer.has_class("-finding")
        await press(pilot, "escape")
        await pilot.pause()
        await press(pilot, "n")
        await pilot.pause()
        assert "nothing to find: press ? first" in text_of(app)
        await press(pilot, "v")
        await wait_until(lambda: isinstance(app.screen, ChoiceScreen))
        await press(pilot, "escape", "f1")
        await wait_until(lambda: isinstance(app.screen, HelpScreen))
        await pilot.pause()
        shown = text_of(app)
        for line in ("x mark or unmark", "↓ ctrl+n down (12↓: twelve rows)", "? & find", "f1 this help"):
            assert line in shown, line
