"""Which heavy packages a command line loads, seen from a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = {"torch", "transformers", "scipy", "textual"}

_SCRIPT = """
import importlib, json, sys
main = importlib.import_module(sys.argv[1]).main
try:
    code = main(sys.argv[2:])
except SystemExit as stop:
    code = stop.code
print(json.dumps(sorted(sys.modules)), file=sys.stderr)
sys.exit(code)
"""


def heavy_imports(module: str, arguments: list[str]) -> set[str]:
    """Packages of `HEAVY` in memory after ``module.main(arguments)``, which must succeed."""
    return HEAVY & modules_after(module, arguments)


def modules_after(module: str, arguments: list[str]) -> set[str]:
    """Modules in memory after ``module.main(arguments)``, which must succeed."""
    command = [sys.executable, "-c", _SCRIPT, module, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))
