"""The model that a file names: looked up on the Hub and nowhere else, whatever the file says."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest

from chanfmt.algebra.validate import validate
from chanfmt.base.errors import ChanfmtError
from chanfmt.base.hub_ids import is_commit, is_hub_id
from chanfmt.format.reader import Atlas
from chanfmt.format.writer import write_atlas
from surgery.cli.main import main as surgery
from surgery.cut.source import find_model
from tests.support.cut_models import content_for, save_model
from tests.support.factory import random_content

if TYPE_CHECKING:
    from pathlib import Path

NOT_HUB_IDS = [
    "../t/tiny",
    "./tiny",
    "~",
    "~/tiny",
    "/tiny",
    "",
    ".",
    "tiny/",
    "a/b/c",
    "a--b",
    "a..b",
    "tiny.git",
    "a" * 97,
    "t\niny",
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model ``t/tiny``, which is also ``tiny`` and ``~``, and no Hub."""
    model = save_model("llama", tmp_path / "t" / "tiny")
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "tiny").symlink_to(model)
    (tmp_path / "w" / "t").symlink_to(tmp_path / "t")
    (tmp_path / "w" / "tiny.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path / "w")
    monkeypatch.setenv("HOME", str(model))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def atlas_named(here: Path, name: str, revision: str = "") -> Path:
    content = content_for("llama", here / "t" / "tiny")
    model = dataclasses.replace(content.model, source="hub", id=name, revision=revision)
    write_atlas(dataclasses.replace(content, model=model), here / "a.h5")
    return here / "a.h5"


@pytest.mark.parametrize("name", ["tiny", "t/tiny", "tiny.gguf", *NOT_HUB_IDS])
def test_an_id_of_a_file_opens_nothing_on_this_machine(here: Path, name: str) -> None:
    for spelt in (name, str(here / "t" / "tiny") if name == "/tiny" else name):
        path = atlas_named(here, spelt)
        with Atlas.open(path) as atlas, pytest.raises(ChanfmtError) as caught:
            find_model(atlas.model, None)
        assert "--model" in str(caught.value) or "offline" in str(caught.value).lower()
        assert surgery(["prune", str(path), "--sparsity", "0.5", "-o", str(here / "out"), "--no-verify"]) == 2
        assert not (here / "out").exists()


def test_a_revision_of_a_file_is_a_commit(here: Path) -> None:
    with Atlas.open(atlas_named(here, "ann/tiny", "../../x")) as atlas, pytest.raises(ChanfmtError, match="not a commit"):
        find_model(atlas.model, None)


def test_the_user_may_name_the_same_path(here: Path) -> None:
    with Atlas.open(atlas_named(here, "../t/tiny")) as atlas:
        assert find_model(atlas.model, "../t/tiny").source == "local"


@pytest.mark.parametrize("name", NOT_HUB_IDS)
def test_validate_finds_it(tmp_path: Path, name: str) -> None:
    content = random_content()
    write_atlas(dataclasses.replace(content, model=dataclasses.replace(content.model, id=name)), tmp_path / "local.h5")
    write_atlas(
        dataclasses.replace(content, model=dataclasses.replace(content.model, id=name, source="hub")), tmp_path / "hub.h5"
    )
    assert not [finding for finding in validate(tmp_path / "local.h5") if finding.code == "E109"]
    (found,) = [finding for finding in validate(tmp_path / "hub.h5") if finding.code == "E109"]
    assert found.path == "/model@id"


def test_ids_are_those_of_huggingface_hub() -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    for name in [*NOT_HUB_IDS, "gpt2", "meta-llama/Llama-3.1-8B", "a_b/c.gguf", "a/b_", "a.b/c"]:
        if is_hub_id(name):
            validate_repo_id(name)
    for name in ("gpt2", "meta-llama/Llama-3.1-8B", "a_b/c.gguf"):
        assert is_hub_id(name)
    with pytest.raises(HFValidationError):
        validate_repo_id("../t/tiny")
    assert is_commit("0123abc" * 5 + "01234")
    assert not is_commit("refs/pr/1")
