"""The conformance files get the same verdicts from the specification's reader and from chanfmt."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

SPEC = Path(__file__).parents[2] / "spec"
CONFORMANCE = SPEC / "conformance"
EXPECTED = json.loads((CONFORMANCE / "expected.json").read_text(encoding="utf-8"))
RULES = json.loads((SPEC / "atlas-1.0.json").read_text(encoding="utf-8"))["rules"]


def load(path: Path, name: str):
    """A module of spec/, which is not a package."""
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reader():
    return load(SPEC / "reader.py", "conformance_reader")


@pytest.fixture(scope="module")
def regenerated(tmp_path_factory):
    directory = tmp_path_factory.mktemp("conformance")
    load(CONFORMANCE / "generate.py", "conformance_generate").generate(directory)
    return directory


@pytest.mark.parametrize("name", EXPECTED)
def test_the_reader_of_the_specification(reader, name):
    codes = sorted({code for code, _, _ in reader.validate(CONFORMANCE / name)})
    assert {"valid": not any(code.startswith("E") for code in codes), "codes": codes} == EXPECTED[name]


@pytest.mark.parametrize("name", EXPECTED)
def test_chanfmt(name):
    from chanfmt.algebra.validate import validate

    codes = sorted({finding.code for finding in validate(CONFORMANCE / name)})
    assert {"valid": not any(code.startswith("E") for code in codes), "codes": codes} == EXPECTED[name]


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("special_tokens", None, "E103"),
        ("tokenizer_special_tokens", None, "E103"),
        ("special_tokens", '{"before": [101]}', "E110"),
        ("special_tokens", "[101, 102]", "E110"),
        ("tokenizer_special_tokens", '{"before": [-1], "after": []}', "E110"),
        ("tokenizer_special_tokens", '{"before": [101.5], "after": []}', "E110"),
        ("tokenizer_special_tokens", '{"before": [2147483648], "after": []}', "E110"),
        ("special_tokens", '{"before": [101], "after": [5]}', "E213"),
        ("special_tokens", '{"before": [101, 101, 101], "after": [102]}', "E213"),
        ("special_tokens", '{"before": [], "after": [], "more": 1}', "E401"),
    ],
)
def test_special_tokens_are_judged_alike(reader, tmp_path, name, value, code):
    from chanfmt.algebra.validate import validate

    path = tmp_path / "a.h5"
    shutil.copy(CONFORMANCE / "valid/special-tokens.h5", path)
    with h5py.File(path, "r+") as file:
        del file["calibration"].attrs[name]
        if value is not None:
            file["calibration"].attrs[name] = value
    # The digests are those of the old content, which shows only if nothing else is wrong.
    digests = {"E401", "E402"}
    assert {found for found, _, _ in reader.validate(path)} - digests == {code} - digests
    assert {finding.code for finding in validate(path)} - digests == {code} - digests


def test_the_reader_stops_the_loop_over_bad_bytes(reader, tmp_path):
    """Whatever the damage, it is a finding and never an exception."""
    image = (CONFORMANCE / "valid" / "names-no-tokens-stored.h5").read_bytes()
    random = np.random.default_rng(0)
    path = tmp_path / "damaged.h5"
    for _ in range(60):
        damaged = bytearray(image)
        # Texts and values: HDF5 itself crashes on some damage to its own structures, which E017 is for.
        where = image.index(b"GCOL") + int(random.integers(64, 4000))
        damaged[where] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        assert all(len(finding) == 3 for finding in reader.validate(path))


def test_every_error_has_a_file():
    shown = {code for verdict in EXPECTED.values() for code in verdict["codes"]}
    assert {code for code in RULES if code != "E017"} <= shown
    assert shown <= set(RULES)
    assert sum(verdict["valid"] for verdict in EXPECTED.values()) >= 12
    assert sum(not verdict["valid"] for verdict in EXPECTED.values()) >= 50


def test_the_files_are_the_ones_listed():
    files = {path.relative_to(CONFORMANCE).as_posix() for path in CONFORMANCE.rglob("*.h5")}
    assert files == set(EXPECTED)
    assert all(verdict["valid"] == name.startswith("valid/") for name, verdict in EXPECTED.items())
    assert sum((CONFORMANCE / name).stat().st_size for name in files) < 4_460_000


def test_regenerated_files_get_the_same_verdicts(reader, regenerated):
    assert json.loads((regenerated / "expected.json").read_text(encoding="utf-8")) == EXPECTED
    for name, verdict in EXPECTED.items():
        assert sorted({code for code, _, _ in reader.validate(regenerated / name)}) == verdict["codes"], name


def test_generating_twice_gives_the_same_bytes(regenerated, tmp_path):
    load(CONFORMANCE / "generate.py", "conformance_generate_again").generate(tmp_path)
    assert [name for name in EXPECTED if (tmp_path / name).read_bytes() != (regenerated / name).read_bytes()] == []


def test_the_readers_content_is_what_the_file_holds(reader):
    path = CONFORMANCE / "valid" / "experts.h5"
    content = reader.read(path)
    assert content["model"]["id"] == "conformance/tiny"
    assert content["calibration"]["token_ids"].shape == (4, 4)
    with h5py.File(path) as file:
        np.testing.assert_array_equal(content["stacks"]["decoder.experts"]["lp"], file["stacks/decoder.experts/lp"][...])
    with pytest.raises(ValueError, match="E016"):
        reader.read(CONFORMANCE / "invalid" / "E016-trailing.h5")


def test_the_readers_command_line():
    def run(*names: str):
        files = [str(CONFORMANCE / name) for name in names]
        done = subprocess.run([sys.executable, str(SPEC / "reader.py"), *files], capture_output=True, text=True, check=False)
        return done.returncode, [json.loads(line) for line in done.stdout.splitlines()]

    assert run("valid/minimal.h5")[0] == 0
    code, lines = run("valid/minimal.h5", "invalid/E210-config.h5")
    assert (code, [line["codes"] for line in lines]) == (1, [[], ["E210"]])
    assert run() == (2, [])
