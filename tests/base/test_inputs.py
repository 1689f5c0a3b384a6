"""Inputs that are pipes or devices: reading one might never end, so they are refused."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from chanfmt.base.errors import ModelError, UsageError
from chanfmt.base.inputs import file_size
from chanfmt.models.safetensors import CheckpointIndex
from chanfmt.models.source import ModelSource
from surgery.planning.file import load_plan
from surgery.result.evaluated import take_evaluation
from surgery.result.result import open_result
from tests.support.refused import in_child

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")


@pytest.mark.parametrize(
    ("name", "read", "error"),
    [
        ("plan", load_plan, UsageError),
        ("evaluation.json", lambda path: take_evaluation(path, "a", "b"), UsageError),
        ("surgery.json", lambda path: open_result(path.parent), UsageError),
        ("config.json", lambda path: ModelSource(path.parent).config_text, ModelError),
        ("model.safetensors", lambda path: CheckpointIndex.open(path.parent), ModelError),
        ("model.safetensors.index.json", lambda path: CheckpointIndex.open(path.parent), ModelError),
    ],
)
def test_a_pipe_that_nobody_writes_to_is_refused(
    tmp_path: Path, name: str, read: Callable[[Path], object], error: type[Exception]
) -> None:
    os.mkfifo(tmp_path / name)

    def work() -> None:
        signal.alarm(20)
        with pytest.raises(error):
            read(tmp_path / name)

    in_child(work, {})


def test_the_size_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "link").symlink_to("a")
    assert file_size(tmp_path / "a") == file_size(tmp_path / "link") == 3
    with pytest.raises(IsADirectoryError):
        file_size(tmp_path)
    with pytest.raises(FileNotFoundError):
        file_size(tmp_path / "missing")
