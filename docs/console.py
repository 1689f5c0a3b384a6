"""Run the commands of a page, and compare or replace the output that the page shows.

    python docs/console.py MODEL.gguf docs/commands.md            # compare
    python docs/console.py MODEL.gguf docs/commands.md --write    # replace what the page shows

A block ```console holds ``$ command`` lines, each followed by its stdout and stderr. All blocks of a page run in one fresh
directory that holds the model as SmolLM2.gguf. Machines round differently, so numbers may differ by a tenth, or by one in
their last decimal. Times, digests and rounding errors (1e-5 and less) may differ by any amount. The line about the
conversion of the model is left out, because it is printed only once on a machine. The Hub is the test Hub, with ann's token
in the environment. Its address is shown as the address of the real Hub.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from decimal import Decimal
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.support.hub.client import environment
from tests.support.hub.server import Hub

BLOCK = re.compile(r"^```console\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TOLERANCE = 0.1
TOKEN = "hf_TokenOfAnn"
_VARIES = re.compile(r"\b\d\.\d+e-0[5-9]\b|\b[0-9a-f]{12,64}\b|\d{4}-\d\d-\d\dT[\d:+]+|\b\d[\d.,]* (?:MB|GB|s|tok/s)\b")
_ONCE = re.compile(r"^(?:dequantising .* \(once\)|another process is dequantising .*)$")
_NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")


def commands(block: str) -> list[tuple[str, list[str]]]:
    """Commands of a block, each with the lines that follow it."""
    found: list[tuple[str, list[str]]] = []
    continued = False
    for line in block.splitlines():
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif continued:
            found[-1] = (f"{found[-1][0]}\n{line}", [])
        else:
            found[-1][1].append(line)
        continued = line.endswith("\\") and (line.startswith("$ ") or continued)
    return found


def run(command: str, directory: Path, hub: Hub) -> list[str]:
    """Output of ``command``, run in ``directory``. Raises `SystemExit` if it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    settings = environment(hub, directory / ".hf", TOKEN, PATH=path, COLUMNS="100", PYTHONWARNINGS="ignore", TMUX="")
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=directory,
        env=settings,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"$ {command}\n{done.stdout}\nended with {done.returncode}")
    printed = done.stdout.replace(hub.url, "https://huggingface.co")
    return [line.rstrip() for line in printed.rstrip("\n").splitlines() if not _ONCE.match(line)]


def alike(shown: str, printed: str) -> bool:
    """Whether two lines are equal, except for parts that may vary."""
    (words, numbers), (other_words, others) = map(_parts, (shown, printed))
    if words != other_words or len(numbers) != len(others):
        return False
    return all(
        abs(a - b) <= max(TOLERANCE * max(abs(a), abs(b)), slack) for (a, slack), (b, _) in zip(numbers, others, strict=True)
    )


def _parts(line: str) -> tuple[str, list[tuple[float, float]]]:
    """A line without its numbers, and its numbers, each with its tolerance: 1.5 units of its last decimal, 0 for an integer."""
    text = _VARIES.sub("VARIES", line)
    numbers = []
    for item in _NUMBER.findall(text):
        value = Decimal(item.replace(",", ""))
        last = value.as_tuple().exponent
        numbers.append((float(value), 1.5 * 10.0**last if "." in item and isinstance(last, int) else 0.0))
    return " ".join(_NUMBER.sub("#", text).split()), numbers


def check(page: Path, model: Path, *, write: bool = False) -> list[str]:
    """Run a page. Returns the differences; with ``write``, replaces the output in the page instead."""
    problems: list[str] = []
    text = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as directory, Hub() as hub:
        hub.add_user(TOKEN, "ann")
        (Path(directory) / "SmolLM2.gguf").symlink_to(model.resolve())

        def renewed(match: re.Match[str]) -> str:
            lines = []
            for command, shown in commands(match[1]):
                printed = run(command, Path(directory), hub)
                if len(shown) != len(printed) or not all(map(alike, shown, printed)):
                    problems.append(f"$ {command}\nthe page shows:\n" + "\n".join(shown) + "\nit prints:\n" + "\n".join(printed))
                lines += [f"$ {command}", *printed]
            return "```console\n" + "\n".join(lines) + "\n```"

        new = BLOCK.sub(renewed, text)
    if write:
        page.write_text(new, encoding="utf-8")
        return []
    return problems


def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--write"]
    if len(arguments) < 2:
        raise SystemExit(f"usage: {sys.argv[0]} MODEL.gguf PAGE... [--write]")
    write = "--write" in sys.argv
    problems = [problem for page in arguments[1:] for problem in check(Path(page), Path(arguments[0]), write=write)]
    if problems:
        raise SystemExit("\n\n".join(problems))


if __name__ == "__main__":
    main()
