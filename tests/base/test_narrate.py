"""Notes on stderr."""

from __future__ import annotations

import threading

from tqdm import tqdm

from chanfmt.base.narrate import say, to_terminal


def test_without_bars_a_note_does_not_wait_for_their_lock() -> None:
    """An interrupt at the wrong moment leaves the lock of the bars taken. Later notes then waited for ever."""
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with tqdm.get_lock():
            taken.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait(60)
    try:
        with to_terminal():
            speaker = threading.Thread(target=say, args=["a note"], daemon=True)
            speaker.start()
            speaker.join(20)
            assert not speaker.is_alive()
    finally:
        done.set()
        holder.join()
