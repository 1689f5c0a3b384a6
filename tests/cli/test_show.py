"""`atlas show` says in plain lines what the browser's screens say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from chanfmt.cli.main import main
from tests.support.factory import moe_atlas, moe_content, random_atlas
from tui.session.card import make_card
from tui.session.load import read_snapshot

VALID = sorted((Path(__file__).parents[2] / "spec" / "conformance" / "valid").glob("*.h5"))


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    assert main(["show", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("place", "ffn"), [(["--layer", 0], 0), (["--layer", 2, "--expert", 1], 6)])
def test_one_channel_is_the_browsers_card(place: list, ffn: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = moe_atlas(tmp_path / "a.h5")
    card = make_card(read_snapshot(path), ffn, 7)
    found = shown(capsys, path, *place, "--channel", 7)
    for key, value in dataclasses.asdict(card).items():
        assert len(found[key]) == len(value), key
    for mine, theirs in zip(found["metrics"], card.metrics, strict=True):
        assert (mine["name"], mine["rank"], mine["known"]) == (theirs.name, theirs.rank, theirs.known)
        np.testing.assert_allclose(np.nan if mine["value"] is None else mine["value"], theirs.value, rtol=1e-6)
    assert [row[0] for row in found["partners"]] == [other for other, _, _ in card.partners]
    assert [row["rank"] for row in found["splits"]] == [split.rank for split in card.splits]
    assert main(["show", str(path), *map(str, place), "--channel", "7"]) == 0
    text = capsys.readouterr().out
    for word in ("x median", "splits; LP varies by", "write support", "most redundant with", "writes to most"):
        assert word in text


def test_experts_and_one_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, variables = moe_atlas(tmp_path / "a.h5"), moe_content().stacks[1].variables
    rows = shown(capsys, path, "--layer", 2)["experts"]
    assert [row["tokens"] for row in rows] == variables["tokens"][1].tolist()
    assert rows[2]["mass"] == pytest.approx(float(variables["lp"][1, 2].sum()))
    assert main(["show", str(path), "--layer", "2"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)
    channels = shown(capsys, path, "--layer", 2, "--expert", 3, "--sort", "taylor", "--top", 4)["channels"]
    assert [row["channel"] for row in channels] == np.argsort(-variables["taylor"][1, 3])[:4].tolist()


def test_metrics_of_other_programs_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    path = next(path for path in VALID if path.stem == "extension")
    name, *_ = [name for name in shown(capsys, path, "--layer", 0)["channels"][0] if "/" in name]
    first = shown(capsys, path, "--layer", 0, "--sort", name)["channels"]
    assert first[0][name] == max(row[name] for row in first)


@pytest.mark.parametrize("path", VALID, ids=lambda path: path.stem)
def test_channels_of_every_conformance_file(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = main(["show", str(path), "--layer", "0", "--channel", "1"])
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert code == 0 or ("--stack" in said or "--expert" in said or "there is no layer 0" in said or path.stem == "partial")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--layer", "1", "--expert", "9"], "experts: 0 to 3"),
        (["--layer", "0", "--expert", "0"], "the layer has no experts"),
        (["--layer", "1", "--channel", "0"], "add --expert"),
        (["--layer", "0", "--channel", "96"], "channels: 0 to 95"),
        (["--layer", "1", "--sort", "taylor"], "add --expert"),
        (["--layer", "0", "--sort", "fame"], "has no fame"),
    ],
)
def test_refusals(arguments: list[str], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(moe_atlas(tmp_path / "a.h5")), *arguments]) == 2
    assert reason in capsys.readouterr().err


def test_a_dense_atlas_needs_no_expert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(shown(capsys, random_atlas(tmp_path / "a.h5"), "--layer", 1, "--top", 3)["channels"]) == 3


def test_tables_fit_a_terminal_of_80_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    # The path of a file cannot be broken.
    monkeypatch.chdir(tmp_path)
    path, other = (random_atlas(tmp_path / f"{name}.h5", channels=1500, seed=0).name for name in "ab")
    experts = moe_atlas(tmp_path / "e.h5").name
    metrics = ("lp", "redundancy_null", "up_norm")
    lines = [
        *(["show", path, "--layer", "0", "--sort", name, "--top", "5"] for name in metrics),
        ["show", experts, "--layer", "2"],
        ["compare", path, other],
        ["compare", experts, experts],
        ["info", experts],
        ["label", path, "--rho", "0.02", "-o", str(tmp_path / "l.h5")],
    ]
    for line in lines:
        assert main(line) == 0
        out = capsys.readouterr().out
        table = out.split("\n\n")[-1] if line[0] == "info" else out
        assert max(map(len, table.splitlines())) <= 80, (line, table)
    monkeypatch.setenv("COLUMNS", "200")
    assert main(lines[0]) == 0
    captured = capsys.readouterr()
    assert "left out" not in captured.err
    wide = captured.out.splitlines()[0].split("  ")
    monkeypatch.setenv("COLUMNS", "80")
    assert main(lines[0]) == 0
    captured = capsys.readouterr()
    narrow = captured.out.splitlines()[0].split("  ")
    missing = [
        name.strip() for name in wide if name.strip() and name not in narrow and name.strip() not in map(str.strip, narrow)
    ]
    assert f"left out to fit 80 columns: {', '.join(missing)}; --json prints everything" in captured.err
    # The metric of the order is never left out.
    assert main(lines[1]) == 0
    assert "red null" in capsys.readouterr().out.splitlines()[0]
