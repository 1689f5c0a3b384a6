"""Shared fixtures: tiny checkpoints, and the real SmolLM2 where its file is at hand."""

from __future__ import annotations

import gc
import os
import signal
import tempfile
from pathlib import Path

import pytest

# Nothing in the suite may reach for the Hub; the client must say so at once instead of retrying.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Started in the background of a script, a process inherits that Ctrl-C is ignored; the tests send it on purpose.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    """Keep the report about changed screens out of the tree, unless the command line names a file."""
    if config.getoption("snapshot_report", None) == "snapshot_report.html":
        config.option.snapshot_report = str(Path(tempfile.gettempdir()) / "atlas-tui-screens.html")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, so that at the end no process waits for one of them."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    """Leave what the imports made out of every later search for unreachable objects, which it slows."""
    gc.collect()
    gc.freeze()


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The same for what a file's tests imported and keep."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """Function from a model type to a checkpoint directory of its tiny model, made once a session."""
    from tests.support.tiny import save_tiny

    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = save_tiny(tmp_path_factory.mktemp("checkpoint") / model_type, model_type)
        return made[model_type]

    return get


@pytest.fixture(scope="session")
def tiny_atlas(tiny_checkpoint, tmp_path_factory):
    """Function from a model type to an atlas of its tiny model, built once a session."""
    from chanfmt.building.options import BuildOptions
    from chanfmt.format.records import LabelSettings
    from tests.support.builds import build

    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            path = tmp_path_factory.mktemp("atlas") / f"{model_type}.h5"
            options = BuildOptions(str(tiny_checkpoint(model_type)), str(path), calib="pydoc", sequences=16, seq_len=64)
            made[model_type] = build(options, LabelSettings(rho=0.03, support_size=8))
        return made[model_type]

    return get


@pytest.fixture
def hub():
    """A running test Hub; see `tests.support.hub.client` for commands that talk to it."""
    from tests.support.hub.server import Hub

    with Hub() as server:
        yield server


@pytest.fixture(scope="session")
def smollm2():
    """Path of SmolLM2-135M-Instruct as GGUF; `make test` fetches it and names it."""
    path = os.environ.get("SMOLLM2_GGUF")
    if not path:
        pytest.skip("SMOLLM2_GGUF does not name the model file; run the suite with: make test")
    return Path(path)
