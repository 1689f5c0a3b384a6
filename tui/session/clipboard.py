"""The clipboard of tmux. By default tmux drops what a program in it sends to the terminal's clipboard."""

from __future__ import annotations

import os
import subprocess

from chanfmt.base.errors import ChanfmtError


def in_tmux() -> bool:
    """Whether the program runs in tmux."""
    return bool(os.environ.get("TMUX"))


def copy_to_tmux(text: str) -> None:
    """Put ``text`` into tmux's newest buffer and on the clipboard of tmux's terminal.

    Raises:
        ChanfmtError: tmux is missing, refused, or did not answer within five seconds.
    """
    try:
        subprocess.run(["tmux", "load-buffer", "-w", "-"], input=text.encode(), capture_output=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        raise ChanfmtError("tmux did not take the copy") from None
