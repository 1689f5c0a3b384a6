"""``surgery shrink``: its steps as data, what it refuses, and a whole run that is killed and goes on."""

from __future__ import annotations

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import transformers

from chanfmt.base.errors import UsageError
from chanfmt.cli import main as atlas_program
from chanfmt.cli.framework import make_parser
from chanfmt.format.reader import Atlas
from chanfmt.models.source import ModelSource
from surgery.cli import main as surgery_program
from surgery.cli.main import main
from surgery.cli.shrinking.estimate import estimate, ffn_parameters
from surgery.cli.shrinking.journal import Journal
from surgery.cli.shrinking.options import CutsOptions, JudgeOptions, MeasureOptions, Request, ShrinkOptions
from surgery.cli.shrinking.run import Runner, StepError
from surgery.cli.shrinking.shrink import possible
from surgery.cli.shrinking.steps import PROMPTS, Places, Step, cut_step, evaluate_steps, measure_step, next_commands, try_steps
from surgery.cli.shrinking.texts import choose_texts, split_file
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from surgery.result.result import open_result
from surgery.result.verdict import LIMITS, TextLoss, judged

LINES = [f"The quick brown fox no. {number} jumps over {number * number} lazy dogs!" for number in range(300)]


def request_of(tmp_path: Path, *, atlas: str | None = None, calib: str | None = "pydoc", **changes: Any) -> Request:
    model, to = changes.pop("model", "model"), changes.pop("to", "75%")
    shrink = ShrinkOptions(model, to, str(tmp_path / "small"), format=changes.pop("format", None))
    judge = JudgeOptions(changes.pop("held_out", None), changes.pop("other", None))
    return Request(shrink, MeasureOptions(calib, atlas), CutsOptions(**changes), judge)


def understood(command: str) -> None:
    """Parse ``command`` as its program does."""
    program, *words = shlex.split(command.partition(" > ")[0])
    parser, commands = make_parser(program, "")
    for each in atlas_program.COMMANDS if program == "atlas" else surgery_program.COMMANDS:
        each.add(commands)
    parser.parse_args(words)


# Steps as data


@pytest.mark.parametrize("format", ["gguf", "safetensors"])
def test_the_steps_are_commands_that_their_programs_understand(tmp_path: Path, format: str) -> None:
    request = request_of(tmp_path, allocations="uniform,global", other="pydoc", model="SmolLM2.gguf", format=format)
    places = Places(tmp_path / "small")
    texts = choose_texts(request.measure, request.judge, places.work)
    first = measure_step(request, texts, places)
    assert first is not None
    steps = [
        first,
        *try_steps(request, texts, places, "75%", "lstsq"),
        cut_step(request, places, "wanda", "global", "block"),
        *evaluate_steps(request, texts, places),
    ]
    assert [step.words[1] for step in steps] == ["build", "sweep", "sweep", "prune", "eval", "eval"]
    for step in steps:
        understood(step.command)
        assert shlex.split(step.command.partition(" > ")[0]) == list(step.words)
    assert len({step.name for step in steps}) == len(steps)
    # A quantised file would become four times as large in float32.
    assert ("--format gguf" if format == "gguf" else "--dtype bfloat16") in steps[3].command
    assert all(prompt in steps[4].words for prompt in PROMPTS)
    for command in next_commands(request, texts, places, "distill").values():
        if command.startswith("surgery"):
            understood(command)


def test_one_cut_is_not_tried(tmp_path: Path) -> None:
    request = request_of(tmp_path, methods="wanda")
    places = Places(tmp_path / "small")
    assert try_steps(request, choose_texts(request.measure, request.judge, places.work), places, "75%", "lstsq") == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to": "75"}, "--to"),
        ({"methods": "wandaa"}, "wandaa"),
        ({"methods": ","}, "at least one"),
        ({"allocations": "even"}, "even"),
        ({"recover": "prayer"}, "prayer"),
        ({"atlas": "a.h5"}, "--calib"),
        ({"try_tokens": 1}, "--try-tokens"),
    ],
)
def test_options_are_checked_first(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        request_of(tmp_path, **changes).check()


# Texts


def test_a_source_with_parts_is_its_own_held_out_text(tmp_path: Path) -> None:
    found = choose_texts(MeasureOptions("pydoc"), JudgeOptions(other="none"), tmp_path)
    assert (found.calib, found.held_out, found.other, found.file) == ("pydoc", "pydoc", None, None)


@pytest.mark.parametrize(("offline", "other"), [(False, "wikitext2"), (True, None)])
def test_the_other_text_of_pydoc_needs_a_network_and_no_package(
    offline: bool, other: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    assert choose_texts(MeasureOptions("pydoc"), JudgeOptions(), tmp_path).other == other


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_file_is_split(tmp_path: Path, suffix: str) -> None:
    path, work = tmp_path / f"own{suffix}", tmp_path / "work"
    work.mkdir()
    rows = [json.dumps({"text": line}) for line in LINES] if suffix == ".jsonl" else LINES
    path.write_text("\n".join(rows), encoding="utf-8")
    found = choose_texts(MeasureOptions(str(path)), JudgeOptions(), work)
    assert found.other == "pydoc"
    split_file(found)
    parts = [Path(name).read_text() for name in (found.calib, found.held_out)]
    assert [sum(line in part for line in LINES) for part in parts] == [270, 30]
    # The parts stay as they are: a later run must measure what an earlier one measured.
    path.write_text("other\n" * 40)
    split_file(found)
    assert [Path(name).read_text() for name in (found.calib, found.held_out)] == parts


def test_texts_that_hold_nothing_out_are_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("one\ntwo")
    short = choose_texts(MeasureOptions(str(tmp_path / "short.txt")), JudgeOptions(), tmp_path)
    with pytest.raises(UsageError, match="too few"):
        split_file(short)
    with pytest.raises(UsageError, match="keeps nothing"):
        choose_texts(MeasureOptions("self"), JudgeOptions(), tmp_path)
    with pytest.raises(UsageError, match="nothing tells"):
        choose_texts(MeasureOptions(None, "a.h5"), JudgeOptions(), tmp_path, ("own.txt",))
    assert (
        choose_texts(MeasureOptions(None, "a.h5"), JudgeOptions(other="none"), tmp_path, ("pydoc/calibrate",)).held_out == "pydoc"
    )
    with pytest.raises(UsageError, match="does not exist"):
        choose_texts(MeasureOptions("absent.txt"), JudgeOptions(), tmp_path)


# Verdict


@pytest.mark.parametrize(("above", "words"), [(-0.1, 0), (0.05, 0), (0.051, 1), (0.5, 1), (0.51, 2), (12.0, 2)])
def test_the_worst_text_decides(above: float, words: int) -> None:
    losses = (TextLoss("a", 9, 2.0, 1.5, None, None, True), TextLoss("b", 9, 0.0, above, 0.0, 1.0, False))
    verdict = judged(losses)
    assert (verdict.words, verdict.text) == (LIMITS[words][1], "b")
    assert f"{math.exp(above):.2f} times" in verdict.sentence()
    assert json.loads(json.dumps(verdict.to_json()))["limits"][-1]["up_to"] is None


# Estimate, and what the atlas settles


def test_a_size_below_everything_but_the_ffns_is_refused_before_any_step(
    tiny_checkpoint: Any, tmp_path: Path, capsys: Any
) -> None:
    model = tiny_checkpoint("llama")
    arguments = ["shrink", str(model), "--calib", "pydoc", "--other", "none", "-o", str(tmp_path / "small")]
    assert main([*arguments, "--to", "10%"]) == 2
    printed = capsys.readouterr().err
    assert "cannot be reached" in printed
    assert not (tmp_path / "small.work").exists()
    source = ModelSource(model)
    # Three matrices of 36 x 87 in each of three layers.
    assert ffn_parameters(source) == 3 * 3 * 36 * 87
    assert main([*arguments, "--to", "100K"]) == 2
    assert "removes nothing" in capsys.readouterr().err


def test_the_estimate_is_printed_and_nothing_is_written(tiny_checkpoint: Any, tmp_path: Path, capsys: Any) -> None:
    arguments = ["shrink", str(tiny_checkpoint("llama")), "--calib", "pydoc", "--other", "none", "-o", str(tmp_path / "small")]
    assert main([*arguments, "--to", "90%", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines if line.startswith(("atlas", "surgery"))] == [
        ["atlas", "build"],
        ["surgery", "sweep"],
        ["surgery", "prune"],
        ["surgery", "eval"],
    ]
    assert {line.split("  ")[0] for line in lines} >= {"size then", "time", "memory", "disk", "nearest measured"}
    assert main([*arguments, "--to", "90%", "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["commands"]) == 4
    # A model of some ten thousand parameters is far below everything that was measured.
    assert found["expected"]["nearest"]
    assert any("the nearest measured one has" in phrase for phrase in found["expected"]["outside"])
    assert found["estimate"]["parameters"]["after_at_most"] == found["estimate"]["parameters"]["before"] * 9 // 10
    assert set(found["estimate"]["seconds"]) == {"measure", "try", "cut", "evaluate"}
    assert list(tmp_path.iterdir()) == []


def test_more_tokens_take_longer(tiny_checkpoint: Any, tmp_path: Path) -> None:
    import torch

    source = ModelSource(tiny_checkpoint("llama"))
    request = request_of(tmp_path, to="90%", other="none")
    texts = choose_texts(request.measure, request.judge, tmp_path)
    few = estimate(request, texts, source, torch.device("cpu"))
    request = Request(request.shrink, MeasureOptions("pydoc", sequences=10**6), request.cuts, request.judge)
    many = estimate(request, texts, source, torch.device("cpu"))
    assert many.seconds["measure"] > 10 * few.seconds["measure"]
    assert many.memory > few.memory
    assert few.rate > 1e8


def test_a_recovery_that_the_atlas_does_not_allow_is_left_out(tiny_atlas: Any, tmp_path: Path) -> None:
    with Atlas.open(tiny_atlas("llama")) as atlas:
        plan = make_plan(atlas, PlanOptions(0.5))
        assert possible("lstsq", atlas, plan) == "lstsq"
    assert atlas_program.main(["strip", str(tiny_atlas("llama")), "-o", str(tmp_path / "bare.h5"), "--quiet"]) == 0
    with Atlas.open(tmp_path / "bare.h5") as atlas:
        assert possible("lstsq", atlas, make_plan(atlas, PlanOptions(0.5))) == "none"


# Running steps


def step_of(places: Places, atlas: Path, to: str, name: str = "plan") -> Step:
    output = places.work / f"{name}.json"
    return Step(name, "plan", ("surgery", "plan", str(atlas), "--to", to, "--json"), output, stdout=output)


def test_a_step_runs_once_and_a_failed_one_leaves_nothing(tiny_atlas: Any, tmp_path: Path) -> None:
    places, atlas = Places(tmp_path / "small"), tiny_atlas("llama")
    runner = Runner(places, 2, None, overwrite=False, quiet=True)
    good, bad = step_of(places, atlas, "90%"), step_of(places, atlas, "1%", "bad")
    runner.run(good)
    assert json.loads(good.output.read_text())["parameters"]["after"] > 0
    written = good.output.stat().st_mtime_ns
    with pytest.raises(StepError, match="ended with 2") as error:
        runner.run(bad)
    assert error.value.exit_code == 2
    assert not bad.output.exists()
    again = Runner(places, 2, None, overwrite=False, quiet=True)
    again.run(good)
    assert good.output.stat().st_mtime_ns == written
    assert [item["step"] for item in again.commands] == ["plan"]
    with pytest.raises(UsageError, match="made by another command"):
        again.run(step_of(places, atlas, "85%"))
    Runner(places, 2, None, overwrite=True, quiet=True).run(step_of(places, atlas, "85%"))
    assert good.output.stat().st_mtime_ns != written


def test_a_step_that_was_killed_after_its_output_appeared_is_done(tmp_path: Path) -> None:
    step = Step("cut", "cut", ("surgery", "prune"), tmp_path / "out")
    rows = Step("try", "try", ("surgery", "sweep"), tmp_path / "out", whole=False)
    for each in (step, rows):
        Journal(tmp_path).begin(each)
    (tmp_path / "out").mkdir()
    journal = Journal(tmp_path)
    assert journal.is_done(step)
    assert not journal.is_done(rows)
    # A step that runs again makes the later ones run again.
    journal.begin(step)
    assert list(Journal(tmp_path).steps) == ["cut"]
    (tmp_path / "shrink.json").write_text("{}")
    with pytest.raises(UsageError, match="--overwrite"):
        Journal(tmp_path)


def test_a_directory_of_something_else_is_not_used(tiny_checkpoint: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "small.work").mkdir()
    (tmp_path / "small.work" / "notes.txt").write_text("mine")
    arguments = ["shrink", str(tiny_checkpoint("llama")), "--to", "90%", "--calib", "pydoc", "-o", str(tmp_path / "small")]
    for more in ([], ["--overwrite"]):
        assert main([*arguments, *more]) == 2
        assert "was not made by surgery shrink" in capsys.readouterr().err
    assert (tmp_path / "small.work" / "notes.txt").read_text() == "mine"


def test_other_kinds_of_models_are_refused_before_any_step(tmp_path: Path, capsys: Any) -> None:
    config = transformers.BertConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    assert main(["shrink", str(tmp_path / "bert"), "--to", "90%", "--calib", "pydoc", "-o", str(tmp_path / "small")]) == 2
    assert "is not a causal language model" in capsys.readouterr().err
    assert main(["shrink", str(tmp_path / "bert"), "--to", "90%", "--calib", "pydoc", "-o", "."]) == 2
    assert "names no new directory" in capsys.readouterr().err


def test_an_atlas_takes_the_place_of_the_measurement(tiny_checkpoint: Any, tiny_atlas: Any, tmp_path: Path, capsys: Any) -> None:
    model, atlas = str(tiny_checkpoint("llama")), str(tiny_atlas("llama"))
    arguments = ["shrink", model, "--to", "90%", "--atlas", atlas, "--other", "none", "-o", str(tmp_path / "small"), "--dry-run"]
    assert main(arguments) == 0
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("atlas", "surgery"))]
    assert [line.split()[1] for line in commands] == ["sweep", "prune", "eval"]
    assert all(atlas in line for line in commands[:2])
    assert "--data pydoc" in commands[0]


# A whole run


def command(model: Path, text: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "surgery", "shrink", str(model), "--to", "90%", "-o", "small", "--calib", "pydoc"),
        *("--other", str(text), "--sequences", "8", "--seq-len", "64", "--try-tokens", "128", "--eval-tokens", "192"),
        *("--methods", "activation,magnitude", "--try-recover", "none", "--recover", "lstsq", *more),
    ]


def begun(work: Path, name: str) -> bool:
    try:
        return name in json.loads((work / "shrink.json").read_text())["steps"]
    except (OSError, ValueError):
        return False


def test_a_killed_run_goes_on_and_ends_in_a_verdict(
    tiny_checkpoint: Any, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text, work = tiny_checkpoint("llama"), tmp_path / "own.txt", tmp_path / "small.work"
    text.write_text("\n".join(LINES), encoding="utf-8")
    root = str(Path(__file__).parents[3])
    settings: dict[str, Any] = {
        "cwd": tmp_path,
        "env": os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])},
        "text": True,
    }
    process = subprocess.Popen(command(model, text), stderr=subprocess.PIPE, stdout=subprocess.PIPE, **settings)
    deadline = time.monotonic() + 300
    while not begun(work, "try uniform") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    _, said = process.communicate()
    assert process.returncode == -signal.SIGKILL, said
    assert "to continue" not in said, "the first build is told to resume, and has nothing to tell about that"
    assert not (tmp_path / "small").exists()
    atlas = (work / "atlas.h5").stat().st_mtime_ns

    done = subprocess.run(command(model, text, "--json"), capture_output=True, check=False, **settings)
    assert done.returncode == 0, done.stderr
    assert "[1/5] measure which channels matter: done before" in done.stderr
    assert (work / "atlas.h5").stat().st_mtime_ns == atlas
    found = json.loads(done.stdout)
    assert [item["step"] for item in found["steps"]] == ["measure", "try uniform", "cut", "evaluate", "evaluate other"]
    # Every command is on stderr before it runs, and runs as it is printed.
    for item in found["steps"][1:]:
        assert f"  {item['command']}\n" in done.stderr
    assert found["tried"][0]["method"] == found["cut"]["method"]
    assert found["tried"][0]["above"] <= found["tried"][1]["above"]
    assert found["cut"]["recover"] == "lstsq"
    assert found["parameters"]["after"] <= 0.9 * found["parameters"]["before"]
    verdict = found["verdict"]
    assert [loss["calibrated"] for loss in verdict["losses"]] == [True, False]
    assert verdict["nats"] == pytest.approx(max(loss["result"] - loss["dense"] for loss in verdict["losses"]))
    assert [answer["prompt"] for answer in verdict["answers"]] == list(PROMPTS)

    result = open_result(tmp_path / "small")
    assert result.report.verdict is not None
    assert json.loads(json.dumps(result.report.verdict.to_json())) == verdict
    assert result.evaluated is not None
    assert result.evaluated.result.nll == verdict["losses"][0]["result"]
    assert result.strangers == []
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"**Verdict: {verdict['words']}.**" in card
    assert "own.txt" in card

    # The same command prints the same again, and another size is not mixed in.
    monkeypatch.chdir(tmp_path)
    words = command(model, text)[3:]
    assert main(words) == 0
    again = capsys.readouterr()
    assert again.err.count("done before") == 5
    assert f"verdict   {verdict['words']} (" in again.out
    assert main([*words, "--to", "88%"]) == 2
    assert "made by another command" in capsys.readouterr().err
    assert open_result(tmp_path / "small").report.verdict == result.report.verdict
