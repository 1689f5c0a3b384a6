"""An output that appeared meanwhile is not replaced, and what is replaced keeps its nature."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from chanfmt.base.errors import ChanfmtError, UsageError
from chanfmt.base.files import atomic_directory, atomic_file, check_target, output_path
from chanfmt.base.publishing import OutputAppearedError
from tests.support.refused import NEITHER, ONLY_LINK, on_file_systems

BOTH = pytest.mark.parametrize("context", [atomic_file, atomic_directory])
ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def inside(path: Path) -> Path:
    return path / "text" if path.is_dir() else path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def write(context, path: Path, text: str, disturb=lambda: None, **options) -> None:
    with context(path, **options) as temporary:
        inside(temporary).write_text(text)
        disturb()


def write_disturbed(context, path: Path, text: str, disturb, **options) -> Path:
    """Write while ``disturb()`` puts something in the way. Returns where the work is kept."""
    with pytest.raises(OutputAppearedError) as caught:
        write(context, path, text, disturb, **options)
    assert str(caught.value.kept) in str(caught.value)
    return caught.value.kept


def names(directory: Path) -> list[str]:
    return sorted(item.name for item in directory.iterdir())


with_every_call = on_file_systems(renameat2={}, link=ONLY_LINK, neither=NEITHER)


@BOTH
@with_every_call
def test_what_appeared_meanwhile_is_not_replaced(context, tmp_path, kind):
    path = tmp_path / "a.h5"
    for kept in ("a.h5.new", "a.h5.new-2"):
        found = write_disturbed(context, path, f"ours in {kept}", lambda: path.write_text("theirs"))
        assert (path.read_text(), found) == ("theirs", tmp_path / kept)
        assert inside(tmp_path / kept).read_text() == f"ours in {kept}"
        path.unlink()
    assert names(tmp_path) == ["a.h5.new", "a.h5.new-2"]
    write(context, path, "new")
    assert inside(path).read_text() == "new"


@pytest.mark.parametrize("appeared", ["link", "dangling", "directory", "full"])
@BOTH
@with_every_call
def test_whatever_appeared_meanwhile_stays(context, tmp_path, appeared, kind):
    path = tmp_path / "a"

    def disturb():
        if appeared in ("link", "dangling"):
            path.symlink_to(tmp_path if appeared == "link" else "nowhere")
        else:
            path.mkdir()
            if appeared == "full":
                (path / "theirs").touch()

    write_disturbed(context, path, "ours", disturb)
    assert inside(tmp_path / "a.new").read_text() == "ours"
    assert names(tmp_path) == ["a", "a.new"]
    assert path.is_symlink() == (appeared in ("link", "dangling"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_something_that_cannot_be_replaced_appeared(tmp_path, overwrite):
    """The work is not lost, whatever was asked for."""
    path = tmp_path / "a"
    write_disturbed(atomic_file, path, "ours", path.mkdir, overwrite=overwrite)
    assert (tmp_path / "a.new").read_text() == "ours"
    (tmp_path / "a.new").unlink()
    path.rmdir()
    write_disturbed(atomic_file, path, "ours", lambda: os.mkfifo(path), overwrite=overwrite)
    assert (tmp_path / "a.new").read_text() == "ours"
    assert stat.S_ISFIFO(path.stat().st_mode)


@pytest.mark.parametrize("length", [240, 241, 250, 255])
def test_long_names(tmp_path, length):
    """A temporary's name is longer than the target's, and a name may have 255 bytes."""
    path = tmp_path / ("x" * length)
    check_target(path, overwrite=False)
    for text in ("old", "new"):
        write(atomic_file, path, text, overwrite=True)
    with pytest.raises(OutputAppearedError) as caught:
        write(atomic_file, path, "ours")
    assert (path.read_text(), caught.value.kept.read_text()) == ("new", "ours")
    assert len(names(tmp_path)) == 2


@pytest.mark.parametrize("bits", [0o600, 0o640, 0o444, 0o755, 0o666])
def test_a_replaced_file_keeps_its_mode(tmp_path, bits):
    path = tmp_path / "a.h5"
    path.write_text("old")
    path.chmod(bits)
    with atomic_file(path, overwrite=True) as temporary:
        assert mode(temporary) & ~0o700 & ~bits == 0 or mode(temporary) == 0o600, "nobody may read it meanwhile"
        temporary.write_text("new")
    assert (path.read_text(), mode(path)) == ("new", bits)


@with_every_call
def test_a_replaced_directory_keeps_its_modes(tmp_path, kind):
    path = tmp_path / "model"
    path.mkdir()
    for name, bits in (("text", 0o600), ("other", 0o640)):
        (path / name).write_text("old")
        (path / name).chmod(bits)
    path.chmod(0o700)
    with atomic_directory(path, overwrite=True) as temporary:
        assert mode(temporary) == 0o700
        (temporary / "text").write_text("new")
        (temporary / "more").write_text("new")
    assert (mode(path), mode(path / "text"), names(path)) == (0o700, 0o600, ["more", "text"])
    previous = os.umask(0)
    os.umask(previous)
    assert mode(path / "more") == 0o666 & ~previous


@pytest.mark.skipif(not ROOT, reason="only root gives files away")
@BOTH
def test_what_is_replaced_keeps_its_owner(context, tmp_path):
    path = tmp_path / "a"
    write(context, path, "old")
    os.chown(path, 1234, 5678)
    os.chmod(path, 0o6750)
    write(context, path, "new", overwrite=True)
    assert (path.stat().st_uid, path.stat().st_gid, mode(path)) == (1234, 5678, 0o6750)


def test_a_new_file_has_the_mode_of_the_umask(tmp_path):
    previous = os.umask(0o027)
    try:
        write(atomic_file, tmp_path / "a", "new")
        write(atomic_directory, tmp_path / "b", "new")
    finally:
        os.umask(previous)
    assert (mode(tmp_path / "a"), mode(tmp_path / "b")) == (0o640, 0o750)


@BOTH
def test_a_link_is_followed(context, tmp_path):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "target", tmp_path / "link"
    link.symlink_to(target)
    for text in ("one", "two"):
        check_target(link, overwrite=True, directory=context is atomic_directory)
        write(context, link, text, overwrite=True)
        assert link.is_symlink()
        assert (inside(target).read_text(), inside(link).read_text()) == (text, text)
    assert (names(tmp_path), names(tmp_path / "disk")) == (["disk", "link"], ["target"])
    with pytest.raises(UsageError, match="exists"):
        check_target(link, overwrite=False, directory=context is atomic_directory)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_in_place_of_a_directory_is_said_before_overwriting_is_offered(tmp_path, overwrite):
    (tmp_path / "file").touch()
    for path, directory in ((tmp_path, False), (tmp_path / "file", True)):
        with pytest.raises(UsageError, match="exists and is not a") as caught:
            check_target(path, overwrite=overwrite, directory=directory)
        assert "--overwrite" not in str(caught.value)


def test_links_in_a_circle_and_into_nowhere(tmp_path):
    for name, target in (("a", "b"), ("b", "a"), ("c", "no/where")):
        (tmp_path / name).symlink_to(target)
    for name in ("a", "c"):
        with pytest.raises(UsageError):
            check_target(tmp_path / name, overwrite=True)
        with pytest.raises(ChanfmtError):
            write(atomic_file, tmp_path / name, "new", overwrite=True)
    assert names(tmp_path) == ["a", "b", "c"]


def test_the_names_of_outputs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert output_path("~/a.h5") == output_path(Path("~/a.h5")) == tmp_path / "a.h5"
    assert output_path("./-").absolute() == Path("-").absolute()
    with pytest.raises(UsageError, match="standard output"):
        output_path("-")
