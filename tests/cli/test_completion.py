"""Shell completion: the scripts, run by the shells that are here."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from chanfmt.cli.framework.completion import SHELLS
from chanfmt.cli.main import main as atlas
from surgery.cli.main import main as surgery
from tui.cli import main as browser

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

PROGRAMS = {"atlas": atlas, "surgery": surgery, "atlas-tui": browser}


def script(program: str, shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        PROGRAMS[program](["--completion", shell])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def completed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., set[str]]:
    """What bash offers for words of which the last is being typed."""

    def complete(program: str, words: Sequence[str]) -> set[str]:
        function = "_" + program.replace("-", "_")
        line = f"COMP_WORDS=({program} {' '.join(repr(word) for word in words)}); COMP_CWORD={len(words)}; {function}"
        text = f'{script(program, "bash", capsys)}\n{line}\nprintf "%s\\n" "${{COMPREPLY[@]}}"\n'
        done = subprocess.run(["bash", "-e", "-u", "-c", text], cwd=tmp_path, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        return set(done.stdout.split())

    return complete


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_options_values_and_files(completed: Callable[..., set[str]], tmp_path: Path) -> None:
    (tmp_path / "llama.h5").touch()
    assert completed("atlas", ["bu"]) == {"build"}
    assert {"prune", "plan", "push"} <= completed("surgery", ["p"])
    assert "--sparsity" in completed("surgery", ["prune", "llama.h5", "--s"])
    assert completed("surgery", ["plan", "llama.h5", "--allocation", ""]) == {"uniform", "global"}
    assert completed("surgery", ["plan", "lla"]) == {"llama.h5"}
    assert completed("atlas", ["cache", "cl"]) == {"clear"}
    assert "--all" in completed("atlas", ["cache", "clear", "--a"])
    assert completed("surgery", ["ablate", "hal"]) == {"halo"}
    assert "what-if" in completed("atlas-tui", ["llama.h5", "--screen", "w"])


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_valid(program: str, shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = script(program, shell, capsys)
    assert program in text
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    # bashcompinit needs an interactive zsh; -n reads a script without running it.
    subprocess.run([shell, "-n"], input=text, text=True, check=True, capture_output=True)


def test_zsh_keeps_its_own_variables(capsys: pytest.CaptureFixture[str]) -> None:
    """In zsh, path is the PATH, and words, commands and options belong to the completion."""
    text = script("surgery", "zsh", capsys)
    declared = next(line for line in text.splitlines() if line.startswith("  local "))
    assert not {"path", "words", "commands", "options"} & {part.partition("=")[0] for part in declared.split()}


def test_an_unknown_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert atlas(["--completion", "tcsh"]) == 2
    assert "unknown shell 'tcsh'; choose from bash, zsh, fish" in capsys.readouterr().err
