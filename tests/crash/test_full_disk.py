"""A file system that is really full: the error is clear, nothing crashes, and existing files stay."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from chanfmt.format.writer import IN_MEMORY

SCRIPT = """
import dataclasses, json, os, sys
from pathlib import Path

from chanfmt.format import writer
from chanfmt.base.errors import ChanfmtError
from chanfmt.base.narrate import to_terminal
from tests.support.builds import build
from chanfmt.building.options import BuildOptions
from chanfmt.format.records import LabelSettings
from tests.support.crash.harness import content, same
from tests.support.factory import random_content

place, model, writer.IN_MEMORY = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
said = {}


def attempt(name, work):
    try:
        with to_terminal():
            work()
        said[name] = "done"
    except ChanfmtError as error:
        said[name] = str(error)


def fill():
    with open(place / "ballast", "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            pass


def free():
    (place / "ballast").unlink()


path = place / "a.h5"
writer.write_atlas(random_content(), path)
before = path.read_bytes()
fill()
new = random_content(seed=1)
attempt("checked", lambda: writer.write_atlas(new, path))
real, writer.check_space = writer.check_space, lambda directory, needed: None
attempt("unchecked", lambda: writer.write_atlas(new, path))
said["old stays"] = path.read_bytes() == before
said["left"] = sorted(item.name for item in place.iterdir())

options = BuildOptions(model, str(place / "b.h5"), calib="pydoc", sequences=8, seq_len=32, batch_size="2", checkpoint_every=0)
settings = LabelSettings(rho=0.03, support_size=8)
attempt("build", lambda: build(options, settings))
said["left by build"] = sorted(item.name for item in place.iterdir())
free()

# Full from the third batch on, when there is a checkpoint already.
from chanfmt.building.keeper import Keeper
save = Keeper.save
def save_and_fill(keeper, measurement):
    save(keeper, measurement)
    if measurement.sequences == 3:
        fill()
Keeper.save = save_and_fill
attempt("build 2", lambda: build(options, settings))
said["left by build 2"] = sorted(item.name for item in place.iterdir())
said["sequences kept"] = content(options.partial).calibration.sequences
Keeper.save = save
free()
attempt("resumed", lambda: build(dataclasses.replace(options, resume=True), settings))
attempt("whole", lambda: build(dataclasses.replace(options, output=str(place / "c.h5")), settings))
said["equal"] = same(content(place / "b.h5"), content(place / "c.h5"))
said["left in the end"] = sorted(item.name for item in place.iterdir())
print(json.dumps(said))
"""


@pytest.mark.parametrize("in_memory", [IN_MEMORY, 0])
def test_a_full_file_system(tiny_checkpoint, tmp_path, in_memory):
    if shutil.which("unshare") is None:
        pytest.skip("needs unshare")
    mount = 'mount -t tmpfs -o size=4m tmpfs "$1"'
    # In a mount namespace of its own the file system goes away with the process.
    inside = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if subprocess.run([*inside, mount, "sh", str(tmp_path)], capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system here")
    done = subprocess.run(
        [
            *inside,
            f'{mount} && exec "$2" -c "$3" "$1" "$4" "$5"',
            "sh",
            str(tmp_path),
            sys.executable,
            SCRIPT,
            str(tiny_checkpoint("llama")),
            str(in_memory),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert "are needed" in said["checked"]
    assert "No space left on device" in said["unchecked"]
    assert said["old stays"]
    assert said["left"] == ["a.h5", "ballast"]
    assert "No space left on device" in said["build"]
    assert said["left by build"] == ["a.h5", "ballast"]
    assert done.stderr.count("warning: no partial atlas was written") == 2
    assert "--resume" in said["build 2"]
    assert said["left by build 2"] == ["a.h5", "b.h5.partial", "ballast"]
    assert said["sequences kept"] == 3
    assert (said["resumed"], said["whole"], said["equal"]) == ("done", "done", True)
    assert said["left in the end"] == ["a.h5", "b.h5", "c.h5"]
