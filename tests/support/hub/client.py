"""Commands in processes of their own, with a test Hub as their Hub: the client reads its settings when it is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from tests.support.hub.server import Hub

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.support.hub.server import Hub

UNSET = (
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_HUB_CACHE",
    "HF_TOKEN_PATH",
    "HF_XET_CACHE",
    "HF_DEBUG",
)


def environment(hub: Hub, home: Path, token: str | None = None, **changes: str) -> dict[str, str]:
    """Environment of a process whose Hub is ``hub`` and whose cache is in ``home``."""
    values = {name: value for name, value in os.environ.items() if name not in UNSET}
    values |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
    }
    return values | ({"HF_TOKEN": token} if token else {}) | changes


def start(*arguments: object, env: dict[str, str]) -> subprocess.Popen[str]:
    """Start Python with ``arguments`` and return at once."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run(module: str, *arguments: object, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """``python -m module`` to its end, for two minutes at most."""
    process = start("-m", module, *arguments, env=env)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    return subprocess.CompletedProcess([module, *map(str, arguments)], process.returncode, out, err)


def script(text: str, *arguments: object, env: dict[str, str]) -> Any:
    """The output of a Python program, which must succeed."""
    done = subprocess.run(
        [sys.executable, "-c", text, *map(str, arguments)], env=env, text=True, capture_output=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


_SESSION = """
import contextlib, importlib, io, json, sys
done = []
for module, *arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = importlib.import_module(module).main(arguments)
    done.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""


def session(*commands: Sequence[object], env: dict[str, str]) -> list[subprocess.CompletedProcess[str]]:
    """Run command lines (module and arguments) one after the other in one process. Returns the outcome of each."""
    lines = [[*map(str, command)] for command in commands]
    results = json.loads(script(_SESSION, json.dumps(lines), env=env))
    return [subprocess.CompletedProcess(line, *result) for line, result in zip(lines, results, strict=True)]


PUBLISH = """
import json, logging, sys
from pathlib import Path
from chanfmt.base.narrate import LOGGER
from chanfmt.base.errors import ChanfmtError
from chanfmt.hub.publish import PublishOptions, publish_folder
folder, repo, options = Path(sys.argv[1]), sys.argv[2], PublishOptions(**{name: True for name in sys.argv[3:]})
notes = []
class Notes(logging.Handler):
    def emit(self, record):
        notes.append(record.getMessage())
LOGGER.addHandler(Notes())
LOGGER.setLevel(logging.INFO)
try:
    done = publish_folder(folder, repo, kind="model", message="numbers", options=options)
    print(json.dumps({"url": done.url, "commit": done.commit, "repo": done.repo, "notes": notes}))
except ChanfmtError as error:
    print(json.dumps({"error": error.message, "hint": error.hint, "kind": type(error).__name__, "notes": notes}))
"""
