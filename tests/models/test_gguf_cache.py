"""Where dequantised GGUF files are kept, what they are known by, and what may remove them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from chanfmt.models import gguf_cache
from tests.support.heard import heard


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf_cache, "_held", {})
    return tmp_path / "cache" / "chanfmt" / "gguf"


def gguf(path: Path, content: bytes = b"weights") -> Path:
    path.write_bytes(content)
    return path


def copy(path: Path, directory: Path) -> None:
    """Convert as little as possible."""
    (directory / "copy").write_bytes(path.read_bytes())


def end_use() -> None:
    """Do what the end of the process does."""
    while gguf_cache._held:
        os.close(gguf_cache._held.popitem()[1])


def refuse(path: Path, directory: Path) -> None:
    raise AssertionError("it is in the cache already")


@pytest.mark.skipif(sys.platform != "linux", reason="the directory of another system")
@pytest.mark.parametrize(("variable", "expected"), [("/somewhere/else", "/somewhere/else"), ("", "~/.cache"), (None, "~/.cache")])
def test_the_cache_is_the_users(monkeypatch, variable, expected):
    if variable is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert gguf_cache.cache_directory() == Path(expected).expanduser() / "chanfmt" / "gguf"


def test_an_entry_is_known_by_content(home: Path, tmp_path: Path) -> None:
    """The same content under another name is one entry; other content under the same name is another."""
    with heard() as said:
        first = gguf_cache.cached(gguf(tmp_path / "a.gguf"), copy)
    assert said == [f"dequantising a.gguf to {first.parent} (once)"]
    assert (first / "copy").read_bytes() == b"weights"
    assert gguf_cache.cached(gguf(tmp_path / "b.gguf"), refuse) == first
    second = gguf_cache.cached(gguf(tmp_path / "a.gguf", b"others"), copy)
    assert second != first
    assert [entry.conversion.file for entry in gguf_cache.entries() if entry.conversion] == ["a.gguf", "a.gguf"]


def test_an_entry_is_known_by_what_converts(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = gguf_cache.cached(gguf(tmp_path / "a.gguf"), copy)
    monkeypatch.setattr(gguf_cache, "CONVERSION", gguf_cache.CONVERSION + 1)
    second = gguf_cache.cached(tmp_path / "a.gguf", copy)
    assert second != first
    now = gguf_cache.converter()
    assert now["transformers"] in second.parent.name
    monkeypatch.setattr(gguf_cache, "converter", lambda: now | {"transformers": "99.0"})
    assert "transformers99.0" in gguf_cache.cached(tmp_path / "a.gguf", copy).parent.name
    assert len(gguf_cache.entries()) == 3


def test_the_last_use_is_kept(home: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        gguf_cache.cached(gguf(tmp_path / f"{name}.gguf", name.encode()), copy)
    for entry in gguf_cache.entries():
        os.utime(home / entry.name / gguf_cache.RECORD_FILE, (1e9, 1e9))
    gguf_cache.cached(tmp_path / "a.gguf", refuse)
    first, second = gguf_cache.entries()
    assert first.conversion is not None
    assert first.conversion.file == "a.gguf"
    assert first.last_used > 1.7e9
    assert second.last_used == 1e9


def test_a_conversion_that_fails_leaves_nothing(home: Path, tmp_path: Path) -> None:
    def fail(path: Path, directory: Path) -> None:
        copy(path, directory)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gguf_cache.cached(gguf(tmp_path / "a.gguf"), fail)
    assert gguf_cache.entries() == []
    assert gguf_cache.cached(tmp_path / "a.gguf", copy).is_dir()


def test_two_at_once_convert_once(home: Path, tmp_path: Path) -> None:
    gguf(tmp_path / "a.gguf")
    converted = []

    def slow(path: Path, directory: Path) -> None:
        converted.append(path)
        started.set()
        threading.Event().wait(0.2)
        copy(path, directory)

    started = threading.Event()
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(gguf_cache.cached(tmp_path / "a.gguf", slow))) for _ in range(2)]
    threads[0].start()
    started.wait()
    threads[1].start()
    for thread in threads:
        thread.join()
    assert len(converted) == 1
    assert found[0] == found[1]


def test_an_entry_that_is_made_or_used_is_not_removed(home: Path, tmp_path: Path) -> None:
    """Each in another process, as locks are the process's own."""
    script = (
        "import sys; from pathlib import Path; from chanfmt.models import gguf_cache\n"
        "def convert(path, directory):\n"
        "    (directory / 'copy').write_bytes(b'x'); print('making', flush=True); sys.stdin.readline()\n"
        "gguf_cache.cached(Path(sys.argv[1]), convert); print('using', flush=True); sys.stdin.readline()\n"
    )
    gguf(tmp_path / "a.gguf")
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "a.gguf"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == "making\n"
    (entry,) = gguf_cache.entries()
    assert entry.state == "unfinished"
    assert not gguf_cache.remove(entry.name)
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "using\n"
    (entry,) = gguf_cache.entries()
    assert entry.state == "ready"
    assert not gguf_cache.remove(entry.name)
    assert (home / entry.name / "model" / "copy").is_file()
    process.communicate("\n")
    assert gguf_cache.remove(entry.name)
    assert os.listdir(home) == []


def test_what_a_killed_conversion_left_is_removed(home: Path, tmp_path: Path) -> None:
    left = home / ".name.0123456789ab.tmp"
    (left / "model").mkdir(parents=True)
    (left / "model" / "half").write_bytes(b"12345")
    (entry,) = gguf_cache.entries()
    assert (entry.name, entry.state, entry.bytes) == (left.name, "unfinished", 5)
    assert gguf_cache.remove(entry.name)
    assert os.listdir(home) == []


def test_links_are_not_followed(home: Path, tmp_path: Path) -> None:
    """Neither to the entry, nor to its parts, nor from inside it."""
    real = gguf_cache.cached(gguf(tmp_path / "a.gguf"), copy).parent
    end_use()
    outside = tmp_path / "outside"
    real.rename(outside)
    real.symlink_to(outside)
    (entry,) = gguf_cache.entries()
    assert entry.state == "unknown"
    assert entry.bytes < 1000
    made = gguf_cache.cached(tmp_path / "a.gguf", copy)
    assert not made.parent.is_symlink()
    (made / "link").symlink_to(outside)
    (home / "away").symlink_to(outside)
    end_use()
    for name in [entry.name for entry in gguf_cache.entries()]:
        gguf_cache.remove(name)
    assert (outside / "model" / "copy").read_bytes() == b"weights"


def test_records_of_unknown_origin(home: Path, tmp_path: Path) -> None:
    """An entry whose record is damaged is made again."""
    entry = gguf_cache.cached(gguf(tmp_path / "a.gguf"), copy).parent
    (entry / gguf_cache.RECORD_FILE).write_text(json.dumps({"file": 3}))
    (found,) = gguf_cache.entries()
    assert (found.state, found.conversion) == ("unknown", None)
    (entry / gguf_cache.RECORD_FILE).unlink()
    assert gguf_cache.cached(tmp_path / "a.gguf", copy).parent == entry
    (found,) = gguf_cache.entries()
    assert found.state == "ready"
