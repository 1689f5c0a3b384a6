"""`atlas cache list` and `atlas cache clear`."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from chanfmt.cli.main import main
from chanfmt.models import gguf_cache
from tests.support.hygiene import heavy_imports

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a cache of two files, and an entry of an older chanfmt."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_cache, "_held", {})
    for name in ("one", "two"):
        (tmp_path / f"{name}.gguf").write_text(name)
        gguf_cache.cached(tmp_path / f"{name}.gguf", lambda path, directory: (directory / "w").write_bytes(bytes(2000)) and None)
    while gguf_cache._held:
        os.close(gguf_cache._held.popitem()[1])
    home = tmp_path / "cache" / "chanfmt" / "gguf"
    (home / "SmolLM2-b179c9523d0e6a0f").mkdir()
    return home


def test_list(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "list"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["file", "size", "last", "used", "made", "by", "entry"]
    assert f"transformers {gguf_cache.converter()['transformers']}" in out
    assert "an older chanfmt" in out
    assert err == f"3 entries of 0.0 MB in {home}\n"
    assert main(["cache", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["directory"] == str(home)
    assert sorted(str((entry["conversion"] or {}).get("file")) for entry in listed["entries"]) == ["None", "one.gguf", "two.gguf"]
    assert listed["bytes"] == sum(entry["bytes"] for entry in listed["entries"]) > 4000
    assert {entry["state"] for entry in listed["entries"]} == {"ready", "unknown"}


def test_an_empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    assert main(["cache", "list"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "0 entries" in err
    assert main(["cache", "clear", "--all"]) == 0
    assert not (tmp_path / "none").exists()


def test_clear_by_name_and_all(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "clear", "one.gguf", "SmolLM2-b179c9523d0e6a0f", "--json"]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["removed"]) == 2
    assert json.loads(out)["kept"] == []
    assert "removed SmolLM2-b179c9523d0e6a0f: 0.0 MB" in err
    (left,) = gguf_cache.entries()
    assert left.conversion is not None
    assert left.conversion.file == "two.gguf"
    assert main(["cache", "clear", "--all", "--quiet"]) == 0
    assert gguf_cache.entries() == []
    assert (tmp_path / "one.gguf").is_file()


def test_what_is_in_use_stays(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf_cache.cached(tmp_path / "two.gguf", lambda path, directory: None)
    assert main(["cache", "clear", "--all"]) == 1
    assert "stays, because a process uses it" in capsys.readouterr().err
    assert len(gguf_cache.entries()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name what to remove"),
        (["--all", "one.gguf"], "not both"),
        (["oen.gguf"], "has no entry 'oen.gguf'; did you mean one.gguf?"),
        (["../gguf"], "has no entry"),
        (["."], "has no entry"),
    ],
)
def test_wrong_usage(home: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "clear", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert len(gguf_cache.entries()) == 3


def test_no_torch_is_loaded(home: Path) -> None:
    assert heavy_imports("chanfmt.cli.main", ["cache", "list"]) == set()
