"""Sweeps: the numbers of cut checkpoints without cutting any, rows that are kept, and a figure."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from chanfmt.base.errors import UsageError
from chanfmt.format.reader import Atlas
from surgery.cli.main import main
from surgery.evaluation.evaluate import evaluate
from surgery.experiments.sweep import COLUMNS, measure_runs
from surgery.experiments.sweep_plan import SweepOptions, plan_runs, removed_of
from surgery.experiments.sweep_plot import contenders, draw, draw_contenders, lines_of
from surgery.planning.grids import parse_names, parse_seeds, parse_shares
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from tests.support.measured import SEQ_LEN, TOKENS, Forwards, Tiny, make_tiny
from tests.support.repeated import repeated

if TYPE_CHECKING:
    from pathlib import Path

    from surgery.experiments.results import Results
    from surgery.experiments.subject import Subject


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("mixtral"), "mixtral")


def swept(atlas: Atlas, subject: Subject, directory: Path, overwrite: bool = False, **options: Any) -> Results:
    chosen = SweepOptions(**options)
    return measure_runs(atlas, subject, plan_runs(atlas, chosen)[0], chosen.shared(), directory, overwrite=overwrite)


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


@pytest.mark.parametrize("name", ["llama", *repeated("mixtral")])
def test_a_row_is_what_the_cut_checkpoint_gives(
    name: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case: Tiny = request.getfixturevalue(name)
    assert (
        main(
            [
                "sweep",
                *case.arguments(
                    tmp_path / "out",
                    "--methods",
                    "wanda,magnitude",
                    "--sparsity",
                    "0.25,0.5",
                    "--protections",
                    "none",
                    "--protections",
                    "supernodes",
                    "--json",
                ),
            ]
        )
        == 0
    )
    rows = {(row["method"], row["protect"], row["sparsity_asked"]): row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert len(rows) == 9
    cut = tmp_path / "cut"
    assert (
        main(
            [
                "prune",
                str(case.atlas),
                "--model",
                str(case.model),
                "--method",
                "magnitude",
                "--sparsity",
                "0.5",
                "--protect",
                "supernodes",
                "-o",
                str(cut),
                "--quiet",
            ]
        )
        == 0
    )
    found = evaluate((str(case.model), str(cut)), str(case.text), seq_len=SEQ_LEN, max_tokens=TOKENS)
    for evaluation, row in zip(found, (rows["dense", "none", 0.0], rows["magnitude", "supernodes", 0.5]), strict=True):
        assert row["nll"] == pytest.approx(evaluation.losses.mean, rel=1e-6)
        assert row["perplexity"] == pytest.approx(evaluation.losses.perplexity, rel=1e-5)
        assert row["tokens"] == evaluation.losses.predicted.sum() == TOKENS - 5
    report = json.loads((cut / "surgery.json").read_text())
    row = rows["magnitude", "supernodes", 0.5]
    assert row["sparsity_reached"] == pytest.approx(report["sparsity"]["reached"])
    assert row["supernodes_removed"] == 0
    assert row["lp_kept"] == pytest.approx(np.median([layer["lp_kept"] for layer in report["layers"]]))
    bare = rows["magnitude", "none", 0.5]
    assert bare["supernodes_removed"] > 0
    assert bare["hit_rate"] == bare["supernodes_removed"] / sum(layer["supernodes"] for layer in report["layers"])
    assert len({row["nll"] for row in rows.values()}) > 5


def test_sizes_take_the_place_of_sparsities(llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sweep", *llama.arguments(tmp_path / "out", "--methods", "wanda,magnitude", "--to", "85%,90%", "--json")]
    assert main(arguments) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    atlas = Atlas.open(llama.atlas)
    asked = {make_plan(atlas, PlanOptions(to=size)).sparsity for size in ("85%", "90%")}
    assert {row["sparsity_asked"] for row in rows} == {0.0, *asked}
    assert [row["method"] for row in rows] == ["dense", *["wanda"] * len(asked), *["magnitude"] * len(asked)]
    # A second run finds every row.
    before = (tmp_path / "out" / "results.json").read_bytes()
    assert main(arguments) == 0
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    for wrong in (["--to", "75%", "--sparsity", "0.5"], ["--to", "75"], ["--to", "1%"]):
        assert main(["sweep", *llama.arguments(tmp_path / "other", *wrong)]) == 2
        assert "--to" in capsys.readouterr().err


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.mark.parametrize(
    ("name", "recoveries"),
    [
        ("llama", "none,bias,lstsq,distill"),
        ("mixtral", "none,lstsq,block"),
        *repeated(("gpt2", "none,bias,lstsq,block")),
    ],
)
def test_a_recovered_row_is_that_of_the_recovered_checkpoint(
    name: str, recoveries: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Afterwards the loaded model has its own weights again, bit by bit."""
    case: Tiny = request.getfixturevalue(name)
    atlas, subject = case.subject(dtype="float32")
    before = {name: value.clone() for name, value in subject.model.state_dict().items()}
    results = swept(atlas, subject, tmp_path / "out", methods="scar-lp", sparsity="0.5", recover=recoveries)
    rows = {row["recover"]: row["nll"] for row in results.rows if row["method"] != "dense"}
    assert [row["recover"] for row in results.rows] == ["none", *recoveries.split(",")]
    assert all(torch.equal(value, before[name]) for name, value in subject.model.state_dict().items())
    found = {}
    for recover in rows:
        cut = tmp_path / recover
        assert (
            main(
                [
                    "prune",
                    str(case.atlas),
                    "--model",
                    str(case.model),
                    "--method",
                    "scar-lp",
                    "--sparsity",
                    "0.5",
                    "--recover",
                    recover,
                    "-o",
                    str(cut),
                    "--quiet",
                ]
            )
            == 0
        )
        found[recover] = evaluate(str(cut), str(case.text), seq_len=SEQ_LEN, max_tokens=TOKENS)[0].losses.mean
    assert found == pytest.approx(rows, rel=1e-5)
    assert len({round(value, 6) for value in rows.values()}) == len(rows)


def test_a_recovery_that_is_not_possible_is_refused_before_anything_runs(mixtral: Tiny) -> None:
    for name in ("bias", "distill"):
        with pytest.raises(UsageError, match=rf"scar-lp at 0.5 .*--recover {name} works on dense FFNs only"):
            plan_runs(Atlas.open(mixtral.atlas), SweepOptions(methods="scar-lp", sparsity="0.5", recover=name))
    with pytest.raises(UsageError, match="unknown recovery 'magic'"):
        plan_runs(Atlas.open(mixtral.atlas), SweepOptions(methods="scar-lp", sparsity="0.5", recover="magic"))


def test_files_say_the_same(llama: Tiny, tmp_path: Path) -> None:
    atlas, subject = llama.subject()
    results = swept(atlas, subject, tmp_path / "out", methods="random,scar-lp", sparsity="0.3,0.6", seeds="0-2")
    with (tmp_path / "out" / "results.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert tuple(table[0]) == COLUMNS
    assert stored["rows"] == results.rows
    assert stored["identity"]["atlas_sha256"] == atlas.content_sha256
    assert [row["method"] for row in table] == ["dense", *["random"] * 6, "scar-lp", "scar-lp"]
    assert [row["seed"] for row in table] == ["", "0", "1", "2", "0", "1", "2", "", ""]
    for line, row in zip(table, results.rows, strict=True):
        assert float(line["nll"]) == row["nll"] == pytest.approx(sum(row["block_nll"]) / sum(row["block_predicted"]))
        assert row["block_predicted"] == [47, 47, 47, 47, 7]
    random = [row["nll"] for row in results.rows if row["method"] == "random" and row["sparsity_asked"] == 0.3]
    assert len(set(random)) == 3


def test_finished_rows_are_not_measured_again(llama: Tiny, tmp_path: Path) -> None:
    atlas, subject = llama.subject()
    forwards = Forwards(subject)
    first = swept(atlas, subject, tmp_path / "out", methods="wanda", sparsity="0.3,0.5")
    every = forwards.count
    assert every > 0
    written = (tmp_path / "out" / "results.json").stat().st_mtime_ns
    again = swept(atlas, subject, tmp_path / "out", methods="wanda", sparsity="0.3,0.5")
    assert (forwards.count, again.rows) == (every, first.rows)
    assert (tmp_path / "out" / "results.json").stat().st_mtime_ns == written
    more = swept(atlas, subject, tmp_path / "out", methods="wanda,taylor", sparsity="0.5")
    assert forwards.count == every + every // 3
    assert more.rows[:3] == first.rows
    assert [row["method"] for row in more.rows] == ["dense", "wanda", "wanda", "taylor"]
    swept(atlas, subject, tmp_path / "out", methods="wanda", sparsity="0.5", overwrite=True)
    assert forwards.count == every + every // 3 + every // 3 * 2


def test_the_same_cut_is_measured_once(llama: Tiny, tmp_path: Path) -> None:
    atlas, subject = llama.subject()
    forwards = Forwards(subject)
    results = swept(atlas, subject, tmp_path / "out", methods="scar-lp", sparsity="0.5", protect=("none", "supernodes"))
    once = forwards.count
    assert [row["protect"] for row in results.rows] == ["none", "none", "supernodes"]
    assert results.rows[1]["nll"] == results.rows[2]["nll"]
    swept(atlas, subject, tmp_path / "other", methods="scar-lp", sparsity="0.5")
    assert forwards.count == 2 * once


def test_rows_of_other_channels_are_measured_again(llama: Tiny, tmp_path: Path) -> None:
    atlas, subject = llama.subject()
    chosen = tmp_path / "mine.txt"
    chosen.write_text("0,1\n0,2\n")
    options = {"methods": "magnitude", "sparsity": "0.5", "protect": (str(chosen),)}
    before = swept(atlas, subject, tmp_path / "out", **options)
    plan = make_plan(atlas, PlanOptions(0.5, "magnitude"))
    gone = plan.blocks[0].removed_of(0)[:8]
    chosen.write_text("".join(f"0,{channel}\n" for channel in gone))
    after = swept(atlas, subject, tmp_path / "out", **options)
    assert [row["protect"] for row in after.rows] == ["none", "mine.txt"]
    assert after.rows[1]["nll"] != before.rows[1]["nll"]


def test_ctrl_c_keeps_finished_rows(llama: Tiny, tmp_path: Path) -> None:
    options = {"methods": "wanda,taylor", "sparsity": "0.3,0.5"}
    atlas, subject = llama.subject()
    forwards = Forwards(subject)
    whole = swept(atlas, subject, tmp_path / "whole", **options)
    atlas, subject = llama.subject()
    Forwards(subject, stop_at=forwards.count // 5 * 3 + 2)
    with pytest.raises(KeyboardInterrupt, match=r"3 finished rows are in .*; run the same command to continue"):
        swept(atlas, subject, tmp_path / "out", **options)
    kept = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert timeless(kept) == timeless(whole.rows[:3])
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 4
    rest = swept(atlas, subject, tmp_path / "out", **options)
    assert timeless(rest.rows) == timeless(whole.rows)


def test_ctrl_c_on_the_command_line(llama: Tiny, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "surgery",
        "sweep",
        *llama.arguments(output, "--methods", "random", "--seeds", "0-99", "--sparsity", "0.3,0.4,0.5,0.6"),
    ]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len((output / "results.csv").read_text().splitlines() if (output / "results.csv").exists() else ()) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "finished rows are in" in err
    assert "Traceback" not in err
    rows = json.loads((output / "results.json").read_text())["rows"]
    assert 2 <= len(rows) < 401


def test_other_settings_are_refused(llama: Tiny, mixtral: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out"
    base = ["--methods", "wanda", "--sparsity", "0.5"]
    assert main(["sweep", *llama.arguments(output, *base)]) == 0
    for more, what in (
        (["--seq-len", "32"], "seq_len"),
        (["--max-tokens", "100"], "tokens_sha256, tokens"),
        (["--allocation", "global"], "allocation"),
        (["--dtype", "float64"], "dtype"),
    ):
        assert main(["sweep", *llama.arguments(output, *base, *more)]) == 2
        assert f"was measured with another {what}" in capsys.readouterr().err
    assert main(["sweep", *llama.arguments(output, *base, "--seq-len", "32", "--overwrite")]) == 0
    assert main(["ablate", "remove", *llama.arguments(output)]) == 2
    assert "holds 'sweep/1' and not 'ablation/1'" in capsys.readouterr().err
    (output / "results.json").write_text("{}")
    assert main(["sweep", *llama.arguments(output, *base)]) == 2
    assert "is not a results file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--methods", "magick"], "unknown method 'magick'"),
        (["--methods", ","], "--methods names no method"),
        (["--sparsity", "0.5:0.1:0.1"], "holds no number: LAST lies before FIRST"),
        (["--sparsity", "50"], "write 0.5 for 50%"),
        (["--sparsity", "half"], "is not a list of numbers"),
        (["--sparsity", "0,0.5"], "nothing would be cut"),
        (["--seeds", "x"], "not a seed"),
        (
            ["--methods", "wanda", "--protections", "top:lp=60%"],
            "wanda at 0.5 with top:lp=60% protected: the protected channels do not",
        ),
        (["--protections", "supernode"], "did you mean supernodes"),
        (["--data", "nowhere.txt"], "does not exist"),
        (["--seq-len", "1"], "--seq-len must be at least 2"),
        (["--max-tokens", "1"], "fewer than two tokens"),
        (["--model", "nowhere.gguf"], "does not exist"),
        (["-o", "no/where"], "does not exist"),
    ],
)
def test_what_cannot_be_is_one_line(
    llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any, more: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["sweep", *llama.arguments(tmp_path / "out", "--sparsity", "0.5", *more)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) <= 2
    assert not (tmp_path / "out" / "results.json").exists()


def test_another_model_is_refused(llama: Tiny, mixtral: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", *llama.arguments(tmp_path / "out", "--model", str(mixtral.model))]) == 2
    assert "is not the model of the atlas" in capsys.readouterr().err


def test_removed_masks_are_the_plans(mixtral: Tiny) -> None:
    atlas, _ = mixtral.subject()
    plan = make_plan(atlas, PlanOptions(0.3, "random", seed=7, layers="1"))
    removed = removed_of(atlas, plan)
    assert list(removed) == [1]
    for expert in range(4):
        assert np.flatnonzero(removed[1][expert]).tolist() == plan.blocks[1].removed_of(expert).tolist()


def row(
    method: str, sparsity: float, nll: float | None, hit: float | None = 0.0, protect: str = "none", recover: str = "none"
) -> dict[str, Any]:
    return {
        "method": method,
        "protect": protect,
        "recover": recover,
        "sparsity_reached": sparsity,
        "nll": 999.0 if nll is None else nll,
        "perplexity": None if nll is None else float(np.exp(nll)),
        "hit_rate": hit,
    }


def test_lines_of_a_figure() -> None:
    rows = [
        row("dense", 0, 2.0),
        row("random", 0.5, 4.0, 0.2),
        row("random", 0.5, 6.0, 0.4),
        row("random", 0.3, 3.0, None),
        row("wanda", 0.5, 3.0, 0.1),
        row("wanda", 0.5, 2.5, 0.0, "supernodes"),
        row("wanda", 0.7, None),
        row("wanda", 0.5, 2.2, recover="lstsq"),
    ]
    lines = lines_of(rows)
    start = (0.0, np.exp(2.0), 0.0, np.exp(2.0), np.exp(2.0))
    assert list(lines) == [(*line, "none") for line in (("random", "none"), ("wanda", "none"), ("wanda", "supernodes"))] + [
        ("wanda", "none", "lstsq")
    ]
    assert lines["random", "none", "none"] == [
        pytest.approx(start),
        pytest.approx((0.3, np.exp(3), 0, np.exp(3), np.exp(3))),
        pytest.approx((0.5, np.exp(5), 0.3, np.exp(4), np.exp(6))),
    ]
    assert [point[0] for point in lines["wanda", "none", "none"]] == [0.0, 0.5]
    assert lines["wanda", "supernodes", "none"][1] == pytest.approx((0.5, np.exp(2.5), 0, np.exp(2.5), np.exp(2.5)))


def test_the_contenders_have_a_panel_of_their_own() -> None:
    figures = pytest.importorskip("matplotlib.figure")

    def row(method: str, sparsity: float, nll: float) -> dict[str, Any]:
        return {
            "method": method,
            "protect": "none",
            "recover": "none",
            "sparsity_reached": sparsity,
            "nll": nll,
            "perplexity": float(np.exp(nll)),
            "hit_rate": 0.0,
        }

    rows = [row("dense", 0.0, 2.0)]
    # The last two are far behind, or do not reach the largest sparsity.
    for method, losses in {"wanda": (2.1, 2.4), "scar-lp": (2.2, 2.3), "magnitude": (4.0, 9.0), "taylor": (2.05,)}.items():
        rows += [row(method, sparsity, loss) for sparsity, loss in zip((0.3, 0.5), losses, strict=False)]
    assert [line[0] for line in contenders(rows)] == ["scar-lp", "wanda"]
    left, right = figures.Figure().subplots(1, 2)
    draw(left, rows)
    draw_contenders(right, rows)
    assert right.get_yscale() == "linear"
    drawn = {line.get_label(): line for line in right.lines}
    assert list(drawn) == ["scar-lp", "wanda", "dense"]
    assert drawn["wanda"].get_ydata() == pytest.approx([0.0, 0.1, 0.4])
    colors = {line.get_label(): line.get_color() for line in left.lines}
    assert all(colors[name] == drawn[name].get_color() for name in ("scar-lp", "wanda"))
    assert contenders(rows[1:]) == contenders(rows[:3]) == contenders([]) == []


def test_the_figure_is_drawn(llama: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert main(["sweep", *llama.arguments(tmp_path / "out", "--methods", "magnitude,wanda", "--sparsity", "0.3,0.5")]) == 0
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    svg = (tmp_path / "out" / "sweep.svg").read_text()
    assert "<svg" in svg
    for text in ("magnitude", "wanda", "perplexity", "share of FFN channels removed"):
        assert f"<!-- {text} -->" in svg
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.csv", "results.json", "sweep.png", "sweep.svg"]


def test_without_matplotlib_there_is_a_table(
    llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    arguments = llama.arguments(tmp_path / "out", "--methods", "wanda", "--sparsity", "0.5")
    arguments.remove("--quiet")
    assert main(["sweep", *arguments]) == 0
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if "no figure" in line]
    assert len(lines) == 1
    assert "pip install matplotlib" in lines[0]
    assert [line.split()[0] for line in captured.out.splitlines()] == ["method", "dense", "wanda"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.csv", "results.json"]


def test_grids() -> None:
    assert parse_shares("0.1:0.7:0.1", "-x") == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
    assert parse_shares("0:1:0.25", "-x") == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert parse_shares("0.1:0.35:0.1", "-x") == (0.1, 0.2, 0.3)
    assert parse_shares("0.5, 0.3,0.5", "-x") == (0.5, 0.3)
    assert parse_shares("0.5", "-x") == (0.5,)
    assert parse_seeds("3,0-2,1") == (3, 0, 1, 2)
    assert parse_names(" a,b,,a ") == ("a", "b")
    for text in ("", "0.1:0.5", "0.1:0.5:0", "0.1:0.5:-0.1", "nan", "inf", "0:1:1e-9", "-0.1", "1.5", "1:2:0.5"):
        with pytest.raises(UsageError):
            parse_shares(text, "-x")
    with pytest.raises(UsageError):
        parse_seeds("0-100000")


def test_the_option_for_alternatives_had_the_name_of_the_option_for_a_union(
    llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`surgery plan --protect A --protect B` protects both. In a sweep they are two runs, and the option says so."""
    found = []
    for name in ("--protect", "--protections"):
        output = tmp_path / name.strip("-")
        arguments = llama.arguments(output, "--methods", "wanda", "--sparsity", "0.5", name, "none", name, "halo")
        arguments.remove("--quiet")
        assert main(["sweep", *arguments]) == 0
        note = "--protect of surgery sweep is now called --protections"
        assert (note in capsys.readouterr().err) == (name == "--protect")
        with (output / "results.csv").open() as file:
            found.append([(row["method"], row["protect"], row["perplexity"]) for row in csv.DictReader(file)])
    assert [row[:2] for row in found[0]] == [("dense", "none"), ("wanda", "none"), ("wanda", "halo")]
    assert found[0] == found[1]


def test_a_device_map_needs_no_gpu(tmp_path):
    pytest.importorskip("accelerate")
    tiny = make_tiny(tmp_path, "llama")
    for name, program, arguments in (
        ("sweep", ("sweep",), ("--methods", "scar-lp", "--sparsity", "0.5", "--recover", "none,lstsq")),
        ("remove", ("ablate", "remove"), ("--select", "supernodes")),
    ):
        found = []
        for number, more in enumerate(((), ("--device-map", "auto"))):
            output = tmp_path / f"{name}{number}"
            assert main([*program, *tiny.arguments(output, *arguments, *more)]) == 0
            found.append([row["perplexity"] for row in json.loads((output / "results.json").read_text())["rows"]])
        assert found[0] == found[1]
    with pytest.raises(UsageError, match="unknown device map 'all'"):
        tiny.subject(device_map="all")
