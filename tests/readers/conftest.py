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
    """The content of the file. The file is closed, because HDF5 wants the same lock each time one process opens a file."""
    with chanfmt.open(path) as atlas:
        return atlas.content()


@pytest.fixture(scope="session")
def stacks(content):
    return {stack.name: stack for stack in content.stacks}
