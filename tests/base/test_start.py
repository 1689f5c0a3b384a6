"""The start of a command line."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

STUCK = """
import threading
def main():
    threading.Thread(target=threading.Event().wait).start()
    print("interrupted")
    return 130
"""


IMPORTING = """
import gc
def main():
    before = gc.get_stats()[2]["collections"]
    kept = [[] for _ in range(300_000)]
    print(gc.get_stats()[2]["collections"] - before, gc.get_stats()[0]["collections"] > 100)
    return 0
"""


def test_objects_that_stay_are_not_searched_again_and_again(tmp_path: Path) -> None:
    (tmp_path / "importing.py").write_text(IMPORTING)
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from chanfmt.base.start import start; start('importing')"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == "0 True\n", done.stderr


def test_an_interrupted_command_does_not_wait_for_a_thread_that_waits_for_ever(tmp_path: Path) -> None:
    (tmp_path / "stuck.py").write_text(STUCK)
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from chanfmt.base.start import start; sys.exit(start('stuck'))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (130, "interrupted\n")
