"""The commands of docs/commands.md print what the page shows, and the comparison can fail."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests.support.hub.server import Hub

ROOT = Path(__file__).parents[2]
MODEL = os.environ.get("SMOLLM2_GGUF", "")

specification = importlib.util.spec_from_file_location("docs_console", ROOT / "docs" / "console.py")
assert specification is not None
assert specification.loader is not None
console = importlib.util.module_from_spec(specification)
specification.loader.exec_module(console)


@pytest.mark.slow
@pytest.mark.skipif(not MODEL, reason="set SMOLLM2_GGUF; make test does")
def test_the_commands_page_shows_what_is_printed() -> None:
    problems = console.check(ROOT / "docs" / "commands.md", Path(MODEL))
    assert not problems, "\n\n".join(problems)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("   11  48.8%  10.21", "   11  48.2%   10.5", True),
        ("   11  48.8%  10.21", "   11  40.8%  10.21", False),
        ("-0.4 points", "-0.5 points", True),
        ("-0.4 points", "-0.6 points", False),
        ("1.2e-3", "1.3e-3", True),
        ("1.2e-3", "1.5e-3", False),
        ("half: 3 FFNs", "half: 4 FFNs", False),
        ("half: 3 FFNs", "half: 3 layers", False),
        ("digest 0123456789abcdef0", "digest ffffffffffffffff0", True),
        ("wrote 4.0 MB in 3 s", "wrote 4.1 MB in 97 s", True),
        ("1 2", "1", False),
    ],
)
def test_what_counts_as_the_same(shown: str, printed: str, same: bool) -> None:
    assert console.alike(shown, printed) == same


def test_a_conversion_of_the_model_is_not_shown(tmp_path: Path) -> None:
    with Hub() as hub:
        assert console.run("echo 'dequantising m.gguf to /a (once)'; echo one", tmp_path, hub) == ["one"]


def test_a_page_is_compared_and_rewritten(tmp_path: Path) -> None:
    page, model = tmp_path / "page.md", tmp_path / "m.gguf"
    model.touch()
    page.write_text("text\n\n```console\n$ echo one; \\\n  echo 2\none\n3\n$ ls\nSmolLM2.gguf\n```\n")
    [problem] = console.check(page, model)
    assert "the page shows:\none\n3\nit prints:\none\n2" in problem
    assert console.check(page, model, write=True) == []
    assert console.check(page, model) == []
    assert page.read_text() == "text\n\n```console\n$ echo one; \\\n  echo 2\none\n2\n$ ls\nSmolLM2.gguf\n```\n"
    page.write_text("```console\n$ false\n```\n")
    with pytest.raises(SystemExit, match="ended with 1"):
        console.check(page, model)
