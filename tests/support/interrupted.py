"""Stops a build after a number of batches, to test what it leaves and how it continues."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from chanfmt.building.keeper import Keeper

if TYPE_CHECKING:
    from collections.abc import Iterator


class Killed(BaseException):
    """Stands in for a signal that nobody handles."""


@contextmanager
def killed_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stop the build in the body once ``batches`` batches are done and in a partial atlas."""
    left = [batches]
    save = Keeper.save

    def save_and_stop(keeper, measurement):  # type: ignore[no-untyped-def]
        save(keeper, measurement)
        left[0] -= 1
        if not left[0]:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Keeper, "save", save_and_stop)
        with pytest.raises(Killed):
            yield
