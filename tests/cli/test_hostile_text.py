"""An atlas whose every text is made to harm: whatever a command prints or writes for people, it stays one harmless line."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import chanfmt
from chanfmt.cli.main import main as atlas
from chanfmt.format.reader import Atlas
from chanfmt.format.writer import write_atlas
from chanfmt.hub.atlases import atlas_card
from chanfmt.hub.names import HubFile
from surgery.cli.main import main as surgery
from tests.support.factory import random_content
from tests.support.hostile import HOSTILE, LONG, check_lines, check_markdown
from tui.cli import main as browser

if TYPE_CHECKING:
    from chanfmt.format.records import AtlasContent


def hostile_content(text: str) -> AtlasContent:
    """`random_content` with ``text`` in every text that the specification leaves to the writer."""
    content = random_content()
    (stack,) = content.stacks
    calibration = content.calibration
    rows = tuple(dataclasses.replace(row, source=text, revision=text) for row in calibration.contributions)
    model = dataclasses.replace(
        content.model, id=text, revision=text, model_type=text, architectures=(text,), dtype=text, fingerprint=text
    )
    tensors = {
        block: tuple(dataclasses.replace(item, tensor=text, parameter=text) for item in block.tensors) for block in content.blocks
    }
    return dataclasses.replace(
        content,
        title=text,
        model=model,
        calibration=dataclasses.replace(calibration, tokenizer=text, contributions=rows),
        blocks=tuple(
            dataclasses.replace(block, module=f"{block.index}{text}", tensors=tensors[block]) for block in content.blocks
        ),
        stacks=(dataclasses.replace(stack, activation=text),),
        producer=dataclasses.replace(
            content.producer, versions={text: text}, hardware=text, command=text, history=({"command": text},)
        ),
    )


def test_commands_print_through_the_framework_only() -> None:
    root = Path(chanfmt.__file__).parents[1]
    for path in [*root.glob("chanfmt/**/*.py"), *root.glob("surgery/**/*.py"), *root.glob("tui/**/*.py")]:
        name = path.relative_to(root).as_posix()
        if name in ("chanfmt/cli/framework/printing.py", "chanfmt/cli/framework/run.py", "chanfmt/base/narrate.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            assert not (isinstance(called, ast.Name) and called.id == "print"), f"{name} prints by itself"


@pytest.fixture(scope="module", params=[HOSTILE, LONG], ids=["forged", "long"])
def file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hostile") / "a.h5"
    write_atlas(hostile_content(request.param), path)
    return path


@pytest.mark.parametrize(
    ("main", "words"),
    [
        (atlas, "info FILE"),
        (atlas, "show FILE --layer 1 --top 3"),
        (atlas, "show FILE --layer 1 --channel 3"),
        (atlas, "show FILE --layer 77"),
        (atlas, "validate FILE"),
        (atlas, "compare FILE FILE"),
        (atlas, "compare FILE FILE FILE"),
        (atlas, "label FILE -o OUT.h5 --rho 0.02"),
        (atlas, "strip FILE -o OUT.h5"),
        (atlas, "merge FILE FILE -o OUT.h5"),
        (atlas, "export FILE -o OUT.csv"),
        (atlas, "report FILE -o OUT"),
        (atlas, "trajectory FILE FILE -o OUT"),
        (atlas, "push FILE someone/name"),
        (surgery, "plan FILE --sparsity 0.5 -o OUT.safetensors"),
        (surgery, "prune FILE --sparsity 0.5 -o OUT"),
        (surgery, "prune FILE --sparsity 0.5 -o OUT --model PLACE/missing.gguf"),
    ],
)
def test_no_command_prints_a_forged_line(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, main: Any, words: str
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    arguments = [
        word.replace("FILE", str(file)).replace("OUT", str(tmp_path / "out")).replace("PLACE", str(tmp_path))
        for word in words.split()
    ]
    assert main(arguments) in (0, 1, 2)
    said = capsys.readouterr()
    assert said.out or said.err
    check_lines(said.out)
    check_lines(said.err)


@pytest.mark.parametrize("name", ["no\nFORGED: valid atlas 1.0\n.h5", "n" * 250 + ".h5", "日本\n.h5"])
def test_a_name_of_a_file_forges_no_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    for words in (["info", str(tmp_path / name)], ["validate", str(tmp_path / name)], ["info", name, name]):
        atlas(words)
        said = capsys.readouterr()
        check_lines(said.out)
        check_lines(said.err)
    directory = tmp_path / "d\nFORGED: valid atlas 1.0"
    directory.mkdir()
    path = directory / "a.h5"
    write_atlas(random_content(), path)
    for words in (["validate", str(path)], ["strip", str(path), "-o", str(directory / "b.h5")], ["info", str(directory)]):
        atlas(words)
        said = capsys.readouterr()
        check_lines(said.out)
        check_lines(said.err)


def test_markdown_has_no_markup_of_the_file(file: Path, tmp_path: Path) -> None:
    for command, names in (("report", [file]), ("trajectory", [file, file])):
        assert atlas([command, *map(str, names), "-o", str(tmp_path / command)]) == 0
        check_markdown((tmp_path / command / "report.md").read_text())


@pytest.mark.parametrize("source", ["hub", "local"])
def test_the_card_of_an_atlas_has_no_markup_of_the_file(file: Path, source: str) -> None:
    with Atlas.open(file) as found:
        content = found.content()
        for name in ("id", "source"):
            object.__setattr__(found.model, name, {"id": content.model.id, "source": source}[name])
        check_markdown(atlas_card(found, HubFile("someone/name", file="a\n`b`.h5"), ([HOSTILE], [[HOSTILE]])))


@pytest.mark.parametrize("screen", ["overview", "layer", "scatter", "protect", "what-if"])
def test_the_browser_shows_no_character_that_a_terminal_obeys(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], screen: str
) -> None:
    picture = tmp_path / "a.svg"
    assert browser([str(file), "--screenshot", screen, "--export-svg", str(picture)]) == 0
    check_lines(capsys.readouterr().out)
    shown = picture.read_text()
    assert not [character for character in shown if not character.isprintable() and character not in "\n\xa0"]
    assert len(shown) < 1_000_000
