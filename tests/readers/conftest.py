"""One atlas with a dense stack and a stack of experts, for every reader."""

from __future__ import annotations

import pytest

import chanfmt
from tests.support.factory import moe_atlas


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    return moe_atlas(tmp_path_factory.mktemp("readers") / "a.h5")


@pytest.fixture(scope="session")
def content(path):
    """What it holds; the file is closed, for HDF5 wants a file opened twice in one process to be locked alike."""
    with chanfmt.open(path) as atlas:
        return atlas.content()


@pytest.fixture(scope="session")
def stacks(content):
    return {stack.name: stack for stack in content.stacks}
