"""Atlases and apps that the tests of the browser share."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest

from tests.support.factory import random_atlas

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def atlas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty layers of 300 channels, so that both screens scroll."""
    return random_atlas(tmp_path_factory.mktemp("atlas") / "random.h5", layers=40, channels=300)


@pytest.fixture(scope="session")
def _four_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_atlas(tmp_path_factory.mktemp("small") / "a.h5")


@pytest.fixture
def small(_four_layers: Path, tmp_path: Path) -> Path:
    """Four layers of 96 channels, this test's own to change."""
    return shutil.copy(_four_layers, tmp_path / "a.h5")


@pytest.fixture(autouse=True)
def _coloured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("TMUX", raising=False)
