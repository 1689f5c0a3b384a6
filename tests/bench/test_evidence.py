"""The bench behind docs/evidence.md: what it measures, that it goes on where it stopped, and that its page follows from its results."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import chanfmt
from bench import evidence as bench
from bench.evidence_page import Measured, by_size, read_state, rendered
from bench.evidence_paper import PLACE, PLACES, filled
from chanfmt.analysis.resample import Middle
from chanfmt.base.errors import UsageError
from chanfmt.cli.framework import make_parser
from chanfmt.cli.main import COMMANDS
from surgery.cli.main import COMMANDS as SURGERY
from tests.support.measured import SEQ_LEN, Tiny, make_tiny

ROOT = Path(__file__).parents[2]
MODEL = bench.Model("Tiny", "Q4_1", "user/tiny")


def understood(line: str) -> None:
    """Exit with an error if the command of ``line`` does not take its options."""
    program, *arguments = shlex.split(line)
    parser, commands = make_parser(program, "")
    for command in COMMANDS if program == "atlas" else SURGERY:
        command.add(commands)
    parser.parse_args(arguments)


def settings_in(directory: Path, **changes: Any) -> bench.Settings:
    texts = {"prose": "prose.txt", "code": "code.txt"}
    return bench.Settings(**{"state": directory, "texts": texts, "evaluate": ("other", "other.txt"), **changes})


def test_the_list_of_measurements_has_commands_that_a_user_can_type_and_their_costs(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, expect={"Tiny": tmp_path}, sequences=64, others=8, seq_len=512)
    found = {item.name: item for item in bench.measurements(MODEL, settings)}
    assert list(found)[:3] == ["atlas/prose", "statistics/prose", "atlas/code"]
    assert {"texts", "protection", "removal", "channels", "mean", "cuts"} <= set(found)
    assert {item.kind for item in found.values()} == set(bench.ACTIONS)
    for name, item in found.items():
        if name != "cuts":
            understood(item.command)
    assert found["atlas/prose"].work == 64 * 512 * 3
    assert found["atlas/code"].work == 8 * 512 * 3
    assert found["channels"].work == settings.tokens["channels"] * (1 + 3 * settings.channels)
    built = settings_in(tmp_path, atlases={("Tiny", "prose"): tmp_path / "a.h5"})
    assert {item.name: item for item in bench.measurements(MODEL, built)}["atlas/prose"].work == 0


def test_a_sentence_about_size_says_what_the_intervals_allow() -> None:
    def model(name: str, parameters: int) -> Measured:
        result = {"parameters": parameters, "widths": [8]}
        return Measured({"name": name, "weights": "", "texts": {"prose": "p"}}, {"atlas/prose": {"result": result}})

    models = [model("a", 1_000_000), model("b", 2_000_000), model("c", 3_000_000)]

    def said(*items: tuple[float, float, float]) -> str:
        found = [(one, Middle(3, middle, low, high, low, high)) for one, (low, middle, high) in zip(models, items, strict=False)]
        return by_size("It", found, lambda value: f"{value:g}")

    assert "rises with size, and the intervals of neighbours do not overlap" in said((0, 1, 2), (3, 4, 5), (6, 7, 8))
    assert "the median rises with size, but intervals" in said((0, 1, 2), (1, 3, 5), (6, 7, 8))
    assert "falls with size" in said((6, 7, 8), (3, 4, 5), (0, 1, 2))
    assert "does not follow size" in said((0, 1, 2), (6, 7, 8), (3, 4, 5))
    assert "says nothing about size" in said((0, 1, 2))
    assert said((0, 1, 2), (3, 4, 5)) == "It: 1 at 1M, 4 at 2M. The larger model has more, and the intervals do not overlap."


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture(scope="module")
def state(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of a whole run on a tiny model, and its page."""
    directory = tmp_path_factory.mktemp("state")
    (directory / "paper.md").write_text("before\n<!-- evidence: channels -->\nold\n<!-- end -->\nafter\n")
    assert bench.main(words_of(tiny, directory)) == 0
    return directory


def words_of(tiny: Tiny, directory: Path) -> list[str]:
    return [
        *(f"Tiny:Q4_1={tiny.model}", "-o", str(directory), "--text", "prose", str(tiny.text), "--text", "manual", "pydoc"),
        *("--evaluate", "more prose", str(tiny.text), "--atlas", "Tiny", "manual", str(tiny.atlas), "--seq-len", str(SEQ_LEN)),
        *("--sequences", "48", "--channels", "3", "--page", str(directory / "docs" / "evidence.md")),
        *("--paper", str(directory / "paper.md")),
        *(word for kind in bench.TOKENS for word in ("--tokens", f"{kind}={2 * SEQ_LEN}")),
    ]


def test_the_page_of_a_whole_run_says_what_an_atlas_says_and_names_no_path(state: Path, tiny: Tiny) -> None:
    page = (state / "docs" / "evidence.md").read_text()
    assert str(tiny.model.parent) not in page + "".join(path.read_text() for path in state.glob("Tiny/*.json"))
    with chanfmt.open(state / "Tiny" / "prose.h5") as atlas:
        shares = []
        for unit in atlas.units():
            lp = np.sort(unit.values("lp").astype(np.float64))[::-1]
            shares.append(lp[: max(1, len(lp) // 100)].sum() / lp.sum())
    assert f"| top 1% hold of LP | {np.median(shares):.1%} (" in page
    for heading in ("claims", "Concentration", "halo", "Protecting", "cost", "other texts", "more or less", "single channels"):
        assert any(line.startswith("## ") and heading in line for line in page.splitlines()), heading
    rows = json.loads((state / "Tiny" / "removal.json").read_text())["result"]["rows"]
    dense, core = (
        next(row for row in rows if (row["select"], row["control"]) == key) for key in ((None, None), ("supernodes", None))
    )
    assert f"| supernodes | {core['nll'] - dense['nll']:+.3f} (" in page
    paper = (state / "paper.md").read_text()
    assert paper.startswith("before\n<!-- evidence: channels -->\n| model |")
    single = json.loads((state / "Tiny" / "channels.json").read_text())["result"]["rows"]
    assert f"| Tiny | Spearman of LP with the size of the change, {len(single) - 1} channels: " in paper
    assert "old" not in paper
    for name in ("concentration", "texts", "channels"):
        assert f"images/evidence-{name}.svg" in page
        assert (state / "docs" / "images" / f"evidence-{name}.svg").stat().st_size > 1000


def test_what_is_there_is_not_measured_again_and_a_changed_atlas_is(
    state: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(session: bench.Session, measurement: bench.Measurement) -> dict[str, Any]:
        raise AssertionError(measurement.name)

    arguments = bench.parser().parse_args(words_of(tiny, state))
    with monkeypatch.context() as patched:
        patched.setattr(bench, "ACTIONS", dict.fromkeys(bench.ACTIONS, never) | {"cuts": bench.measure_cuts})
        bench.run(bench.model_of(arguments.models[0]), bench.settings_of(arguments), arguments)
    assert bench.main([*words_of(tiny, state), "--list"]) == 0
    said = capsys.readouterr().out
    # bench/expect.py has no rows of this model.
    assert said.count("s, measured") == len(bench.measurements(MODEL, settings_in(state))) - 1
    stored = json.loads((state / "Tiny" / "texts.json").read_text())
    session = bench.Session(bench.Model("Tiny", "", str(tiny.model)), settings_in(state, atlases={("Tiny", "code"): tiny.atlas}))
    texts = next(item for item in bench.measurements(session.model, session.settings) if item.name == "texts")
    assert bench.is_done(session, texts)
    (state / "Tiny" / "texts.json").write_text(json.dumps(stored | {"inputs": ["another"]}))
    assert not bench.is_done(session, texts)
    (state / "Tiny" / "texts.json").write_text(json.dumps(stored))


def test_the_page_of_the_paper_has_a_place_for_every_answer() -> None:
    page = bench.PAPER.read_text(encoding="utf-8")
    assert {name for _, name, _ in PLACE.findall(page)} == set(PLACES)
    with pytest.raises(UsageError, match="no question is called 'size'"):
        filled("<!-- evidence: size -->\n<!-- end -->", [])


def test_a_part_of_the_results_makes_a_page_that_names_what_is_missing(state: Path) -> None:
    [whole] = read_state(state)
    half = Measured(
        whole.about | {"name": "Half"}, {name: item for name, item in whole.results.items() if "atlas" in name or "stat" in name}
    )
    page = rendered([whole, half])
    assert page.count("Not measured: Half.") == 4
    assert "Two models are not a law of size" in page
    assert rendered([Measured(whole.about)]).startswith("# Evidence")


def test_cuts_come_from_the_rows_of_bench_expect_by_text_and_become_a_table() -> None:
    def row(method: str, recover: str, nll: list[float]) -> dict[str, Any]:
        blocks = {"block_nll": nll, "block_predicted": [9, 9, 4]}
        return {"method": method, "recover": recover, "sparsity_reached": 0.5 * (method != "dense"), **blocks}

    rows = [row("dense", "none", [9, 18, 4]), row("wanda", "none", [18, 36, 8]), row("wanda", "lstsq", [13.5, 22.5, 6])]
    content = {"identity": {"seq_len": 10, "texts": [{"tokens": 20}, {"tokens": 5}]}, "rows": rows}
    found = bench.rows_of_expect(content, ["first", "second"])
    plain, fitted = found["cuts"]
    np.testing.assert_allclose([item[0] for item in plain["above"]], [27 / 18, 4 / 4])
    np.testing.assert_allclose([item[0] for item in fitted["above"]], [9 / 18, 2 / 4])
    stored = {"name": "cuts", "command": "", "result": json.loads(json.dumps(bench.without_nan(found))), "machine": "m"}
    stored |= {"seconds": 1.0, "cpu_seconds": 1.0, "tokens": 0, "date": "d", "version": "v"}
    page = rendered([Measured({"name": "A", "weights": "", "texts": {"prose": "p"}, "evaluate": "other"}, {"cuts": stored})])
    # The second text is one block, which has no interval.
    assert "| wanda | 50.0% | +1.500 (+1.000 to +2.000) | +0.500 (+0.500 to +0.500) | +1.000 | +0.500 |" in page
    assert "the refit takes back 67% on first and 50% on second of the added loss" in page


def test_what_is_wrong_with_the_arguments_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usual = ["-o", str(tmp_path), "--text", "prose", "pydoc", "--evaluate", "more", "pydoc"]
    for words, expected in (
        ([], "-o is missing"),
        (["model", *usual], "model is not NAME=MODEL"),
        (["A=model", *usual, "--tokens", "none=1"], "--tokens none=1 is not KIND=N"),
        (["-o", str(tmp_path), "--render"], "holds no results"),
    ):
        assert bench.main(words) == 2
        assert expected in capsys.readouterr().err
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "model.json").write_text("{}")
    with pytest.raises(UsageError, match="not a result"):
        read_state(tmp_path)


def test_the_script_of_the_paper_runs_commands_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRY", "1")
    monkeypatch.setenv("REVISIONS", "step100,main")
    command = ["bash", str(ROOT / "examples" / "paper.sh"), "user/model", "wikitext2", "wikitext2"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.removeprefix("$ ") for line in said.splitlines() if line.startswith("$ ")]
    assert len(lines) >= 18
    for line in lines:
        understood(line)
    assert [line.partition(".")[0] for line in said.splitlines() if line[:1].isdigit()] == [
        str(number) for number in range(1, 12)
    ]
