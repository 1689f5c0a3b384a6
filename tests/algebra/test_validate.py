"""`atlas validate`: verdicts, exit codes, and what happens when HDF5 itself gives up."""

from __future__ import annotations

import faulthandler
import json
import os
import resource
import signal
import sys

import h5py
import numpy as np
import pytest

from chanfmt.algebra.validate import contained, validate
from chanfmt.algebra.validate.findings import LEVELS, RULES, Report
from chanfmt.cli.main import main
from chanfmt.format import reader as atlas_module
from tests.support import mutants
from tests.support.factory import moe_atlas, random_atlas

linux = pytest.mark.skipif(sys.platform != "linux", reason="work is contained on Linux only")


def test_every_rule_belongs_to_a_level_and_says_what_to_do():
    for code, rule in RULES.items():
        assert code[1] in LEVELS
        assert rule.code == code
        assert rule.meaning
        assert rule.fix
        assert rule.severity == ("error" if code[0] == "E" else "warning")


@pytest.mark.parametrize("make", [random_atlas, moe_atlas])
def test_what_we_write_is_valid(tmp_path, make):
    assert validate(make(tmp_path / "a.h5")) == []


def test_exit_codes_and_text(tmp_path, capsys):
    good, bad = random_atlas(tmp_path / "good.h5"), random_atlas(tmp_path / "bad.h5")
    with h5py.File(bad, "r+") as file:
        file["stacks/decoder/lp"][0, 3] *= 1.001
    assert main(["validate", str(good)]) == 0
    assert capsys.readouterr().out == f"{good}: valid atlas 1.0\n"
    assert main(["validate", str(good), str(bad)]) == 1
    shown = capsys.readouterr().out
    assert f"{bad}: invalid" in shown
    assert "error E305 /stacks/decoder/lp does not follow from the sums at [0, 3]" in shown
    assert main(["validate", str(tmp_path / "none.h5")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["validate", str(tmp_path)]) == 2
    assert main(["validate"]) == 2


def test_json(tmp_path, capsys):
    path = random_atlas(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file["stacks/decoder/label"][1] = 0
        del file["producer/file_sha256"]
    assert main(["validate", "--json", str(path)]) == 1
    document = json.loads(capsys.readouterr().out)
    (result,) = document["files"]
    assert (document["specification"], result["file"], result["valid"]) == ("1.0", str(path), False)
    assert [(finding["code"], finding["severity"]) for finding in result["findings"]] == [("E309", "error"), ("W504", "warning")]
    assert all(finding["path"].startswith("/") and finding["fix"] for finding in result["findings"])


def test_hostile_texts_do_not_reach_the_terminal(tmp_path, capsys):
    path = random_atlas(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        file.attrs["status"] = "\x1b[2Jdone"
    assert main(["validate", str(path)]) == 1
    assert "\x1b" not in capsys.readouterr().out


def test_a_rule_broken_a_thousand_times_is_told_a_few_times():
    report = Report()
    for index in range(1000):
        report.add("E209", "/", str(index))
    assert len(report.findings) == 20


@linux
def test_a_crash_inside_hdf5_is_a_finding(tmp_path, monkeypatch):
    path = random_atlas(tmp_path / "a.h5")

    def crash(path):
        # pytest's fault handler would print a stack that is of no interest here.
        faulthandler.disable()
        os.kill(os.getpid(), signal.SIGSEGV)

    monkeypatch.setattr(contained, "validate", crash)
    (finding,) = contained.validate_contained(path)
    assert finding.code == "E017"
    assert "SIGSEGV" in finding.message


@linux
def test_a_file_that_hangs_or_crashes_hdf5_is_an_error_of_every_command(tmp_path, monkeypatch, capsys):
    path = random_atlas(tmp_path / "a.h5")

    def crash(container):
        faulthandler.disable()
        os.kill(os.getpid(), signal.SIGBUS)

    monkeypatch.setattr(atlas_module, "_read_producer", crash)
    assert main(["info", str(path)]) == 2
    assert f"{path} cannot be read: it was ended by SIGBUS" in capsys.readouterr().err


@linux
def test_memory_is_limited(tmp_path, monkeypatch):
    path = random_atlas(tmp_path / "a.h5")
    monkeypatch.setattr(contained, "validate", lambda path: np.ones(3 << 30, dtype=np.uint8).sum())
    (finding,) = contained.validate_contained(path)
    assert finding.code == "E017"
    assert "memory" in finding.message
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


@linux
def test_mutants():
    outcomes, failures = mutants.tally(80, seed=3)
    assert not failures, failures[0]
    assert sum(outcomes.values()) == 80


@pytest.mark.parametrize("version", ["1.1", "1.9"])
def test_an_older_minor_is_judged_like_before(tmp_path, monkeypatch, version):
    """A reader of a later minor version gives the same verdicts on 1.0 files."""
    path = random_atlas(tmp_path / "a.h5")
    monkeypatch.setattr("chanfmt.format.schema.FORMAT_VERSION", version)
    assert validate(path) == []
