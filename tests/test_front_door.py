"""The two front doors, `chanfmt` and `surgery`, as a notebook uses them."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import json
import logging
import os
import pydoc
import re
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import chanfmt
import surgery
from chanfmt.base.narrate import LOGGER, bars_shown
from tests.support.tiny import tiny_model, tiny_tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from chanfmt.format.reader import Atlas

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 20
SMALL = {"sequences": 8, "seq_len": 32, "rho": 0.03, "support_size": 8}
DOORS = (chanfmt, surgery)
HEAVY = ("torch", "numpy", "h5py", "transformers")
IMPORT_SECONDS = 0.1
"""Twice the time that the import may take on a machine that does nothing else."""


@pytest.fixture
def atlas(tiny_atlas) -> Iterator[Atlas]:
    with chanfmt.open(tiny_atlas("llama")) as opened:
        yield opened


@pytest.fixture(scope="module")
def other(tiny_checkpoint, tmp_path_factory) -> Path:
    """An atlas of the tiny llama on other text than `tiny_atlas`."""
    path = tmp_path_factory.mktemp("other") / "other.h5"
    chanfmt.build(tiny_checkpoint("llama"), path, "pydoc", seed=5, **(SMALL | {"seq_len": 64})).close()
    return path


def functions() -> list[tuple[str, Callable[..., Any]]]:
    return [
        (f"{door.__name__}.{name}", getattr(door, name))
        for door in (*DOORS, chanfmt.analysis)
        for name in door.__all__
        if inspect.isfunction(getattr(door, name))
    ]


# Imports and documentation


def test_the_import_is_fast_and_light() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); import chanfmt, surgery; seconds = time.perf_counter() - start\n"
        "import json; print(json.dumps([seconds, sorted(sys.modules)]))"
    )
    found = [
        json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    assert not set(HEAVY) & set(found[0][1])
    assert min(seconds for seconds, _ in found) < IMPORT_SECONDS


@pytest.mark.parametrize("door", [*DOORS, chanfmt.analysis], ids=lambda door: door.__name__)
def test_help_lists_every_name(door: Any) -> None:
    shown = pydoc.plain(pydoc.render_doc(door))
    for name in door.__all__:
        value = getattr(door, name)
        if inspect.isroutine(value):
            assert re.search(rf"^    {name}\(", shown, re.MULTILINE)
        elif inspect.isclass(value):
            assert re.search(rf"^    class {name}\(", shown, re.MULTILINE)
        else:
            listed = (
                value if isinstance(value, str) else f"    {name} (package)" if hasattr(value, "__path__") else f"    {name}\n"
            )
            assert listed in shown
        if callable(value):
            assert inspect.getdoc(value).splitlines()[0] in shown
    assert set(door.__all__) <= set(dir(door))


def test_an_unknown_name_is_an_attribute_error() -> None:
    for door in (*DOORS, chanfmt.analysis):
        with pytest.raises(AttributeError, match="has no attribute 'fame'"):
            _ = door.fame


@pytest.mark.parametrize(
    ("name", "function"),
    [row for row in functions() if "analysis" not in row[0]],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_docstrings_are_whole(name: str, function: Callable[..., Any]) -> None:
    text = inspect.getdoc(function)
    sections = dict(re.findall(r"^(Args|Returns|Raises):\n((?:    .*\n?|\n)+)", text, re.MULTILINE))
    assert set(sections) == {"Args", "Returns", "Raises"}
    documented = {
        item.strip()
        for names in re.findall(r"^    (\w+(?:, \w+)*):", sections["Args"], re.MULTILINE)
        for item in names.split(",")
    }
    assert documented == set(inspect.signature(function).parameters)


def test_analysis_functions_stay_functions_after_their_modules_are_imported() -> None:
    """A module with the name of a function would take the function's place in the package."""
    code = (
        "import importlib, pkgutil, chanfmt\n"
        "for found in pkgutil.iter_modules(chanfmt.analysis.__path__):\n"
        "    importlib.import_module('chanfmt.analysis.' + found.name)\n"
        "assert all(callable(getattr(chanfmt.analysis, name)) for name in chanfmt.analysis.__all__)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# chanfmt


def test_a_directory_and_a_loaded_model_give_the_same_sums(tiny_checkpoint, tmp_path: Path) -> None:
    import transformers

    directory = tiny_checkpoint("llama")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory).train()
    state = copy.deepcopy(model.state_dict())
    config = model.config.to_dict()
    one = chanfmt.build(directory, tmp_path / "one.h5", "pydoc", **SMALL)
    two = chanfmt.build(model, str(tmp_path / "two.h5"), "pydoc", tokenizer=tiny_tokenizer(), name="tiny", **SMALL)
    with one, two:
        assert (one.model.id, two.model.id) == ("llama", "tiny")
        assert one.model.fingerprint == two.model.fingerprint
        stacks = one.stacks["decoder"], two.stacks["decoder"]
        assert stacks[0].variables == stacks[1].variables
        for name in stacks[0].variables:
            assert stacks[0][name].tobytes() == stacks[1][name].tobytes(), name
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert model.config.to_dict() == config
    assert all(state[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_a_dtype_and_a_device_of_torch_are_taken(tiny_checkpoint, tmp_path: Path) -> None:
    import torch

    with chanfmt.build(
        tiny_checkpoint("llama"), tmp_path / "a.h5", ["pydoc"], dtype=torch.float32, device=torch.device("cpu"), **SMALL
    ) as atlas:
        assert atlas.status == "complete"


def test_merging(atlas: Atlas, other: Path, tiny_checkpoint, tmp_path: Path) -> None:
    with chanfmt.open(other) as second, chanfmt.merge([atlas, other], tmp_path / "all.h5") as both:
        assert both.calibration.tokens == atlas.calibration.tokens + second.calibration.tokens
        assert "connectivity" in both.dropped
        np.testing.assert_array_equal(
            both.stacks["decoder"]["max_abs_u"],
            np.maximum(atlas.stacks["decoder"]["max_abs_u"], second.stacks["decoder"]["max_abs_u"]),
        )
    assert atlas.stacks["decoder"]["sum_q"].size
    # A directory may be a path, too.
    with chanfmt.merge((atlas, other), tmp_path / "all.h5", model=tiny_checkpoint("llama"), overwrite=True) as whole:
        assert "connectivity" in whole.stacks["decoder"]


def test_relabelling_an_open_atlas_and_a_path(tiny_atlas, atlas: Atlas, tmp_path: Path) -> None:
    with (
        chanfmt.relabel(atlas, tmp_path / "a.h5", rho=0.1) as one,
        chanfmt.relabel(tiny_atlas("llama"), tmp_path / "b.h5", rho=0.1) as two,
    ):
        assert one.labels == dataclasses.replace(atlas.labels, rho=0.1)
        # The digests also cover the history, which says at which second each was made.
        for name in one.stacks["decoder"].variables:
            np.testing.assert_array_equal(one.stacks["decoder"][name], two.stacks["decoder"][name])
        assert one.content_sha256 != atlas.content_sha256
    assert atlas.stacks["decoder"]["label"].size


def test_validating(tiny_atlas, atlas: Atlas, tmp_path: Path) -> None:
    assert chanfmt.validate(tiny_atlas("llama")) == chanfmt.validate(atlas) == []
    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes(tiny_atlas("llama").read_bytes()[:-100])
    found = chanfmt.validate(damaged)
    assert found
    assert found[0].rule.fix


def test_comparing(tiny_atlas, atlas: Atlas, other: Path) -> None:
    rows = chanfmt.compare(atlas, other)
    assert rows == chanfmt.compare(tiny_atlas("llama"), str(other), metric="lp")
    assert [row.module for row in rows] == [block.module for block in atlas.blocks]
    assert all(row.correlation == 1 for row in chanfmt.compare(atlas, atlas, "taylor"))
    assert atlas.stacks["decoder"]["curvature"].size


def test_a_report(tiny_atlas, atlas: Atlas, tmp_path: Path) -> None:
    plain = chanfmt.report(atlas)
    assert atlas.stacks["decoder"]["lp_factored"].size
    pytest.importorskip("matplotlib")
    written = chanfmt.report(tiny_atlas("llama"), tmp_path / "report")
    # NaN is not equal to itself, and its text is.
    assert json.dumps(plain.as_json()) == json.dumps(written.as_json())
    assert {path.stem for path in (tmp_path / "report" / "figures").iterdir()} == set(plain.plots)


def test_the_plots_of_a_report_are_drawn_into_axes(atlas: Atlas, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    from matplotlib import pyplot

    monkeypatch.setenv("MPLBACKEND", "agg")
    report = chanfmt.report(atlas)
    for name, plot in report.plots.items():
        panels = figures.Figure().subplots(1, len(plot.draw), squeeze=False)[0]
        assert report.plot(name, panels) == list(panels)
        assert all(axes.has_data() for axes in panels)
        with pytest.raises(chanfmt.UsageError, match="panel"):
            report.plot(name, [*panels, panels[0]])
    alone = figures.Figure().add_subplot()
    assert report.plot("cumulative", alone) == [alone]
    try:
        first, second = report.plot("concentration")
        assert first.figure is second.figure
    finally:
        pyplot.close("all")
    with pytest.raises(chanfmt.UsageError, match="did you mean cumulative"):
        report.plot("cumulativ")


# surgery


def test_a_plan_is_the_same_from_a_path_and_from_an_open_atlas(tiny_atlas, atlas: Atlas) -> None:
    one, two = surgery.plan(atlas, 0.5), surgery.plan(tiny_atlas("llama"), sparsity=0.5)
    for ours, theirs in zip(one.blocks, two.blocks, strict=True):
        np.testing.assert_array_equal(ours.kept, theirs.kept)
    assert one.atlas_sha256 == atlas.content_sha256
    assert atlas.stacks["decoder"]["label"].size


def test_layers_and_protection_in_the_forms_of_python(atlas: Atlas) -> None:
    spelled = surgery.plan(atlas, layers="0,1", protect=("supernodes",))
    for layers in ([0, 1], range(2), np.arange(2)):
        assert surgery.plan(atlas, layers=layers, protect="supernodes").layers == spelled.layers == "0,1"
    assert [block.is_cut for block in surgery.plan(atlas, layers=2).blocks] == [False, False, True]
    assert surgery.plan(atlas, protect=None).protect == surgery.plan(atlas).protect
    assert surgery.plan(atlas, np.float32(0.5)).channels_kept == spelled.channels_kept - (87 - spelled.blocks[0].n_kept)


def test_a_result_is_the_same_from_prune_apply_and_prune_in_place(
    tiny_checkpoint, tiny_atlas, atlas: Atlas, tmp_path: Path
) -> None:
    import transformers
    from safetensors.torch import load_file

    directory = tiny_checkpoint("llama")
    plan = surgery.plan(atlas, 0.5, method="taylor")
    pruned = surgery.prune(directory, tiny_atlas("llama"), tmp_path / "pruned", sparsity=0.5, method="taylor")
    applied = surgery.apply(plan, directory, tmp_path / "applied")
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    narrowed = surgery.prune_(model, plan)
    model.save_pretrained(tmp_path / "in-place")
    tensors = load_file(tmp_path / "pruned" / "model.safetensors")
    for name in ("applied", "in-place"):
        same = load_file(tmp_path / name / "model.safetensors")
        assert same.keys() == tensors.keys()
        assert all(same[key].equal(value) for key, value in tensors.items())
    assert pruned.report.parameters_after == narrowed.parameters_after == sum(item.numel() for item in model.parameters())
    assert str(tmp_path / "applied") in repr(applied)
    stock = transformers.AutoModelForCausalLM.from_pretrained(pruned.directory)
    assert stock.config.intermediate_size == 32


def test_apply_takes_a_plan_file_and_refits_with_the_atlas(tiny_checkpoint, tiny_atlas, atlas: Atlas, tmp_path: Path) -> None:
    directory = tiny_checkpoint("llama")
    pruned = surgery.prune(directory, atlas, tmp_path / "one", recover="bias")
    # The directory of a result takes the place of a path.
    plan_file = os.path.join(surgery.prune(directory, atlas, tmp_path / "plain"), "kept_channels.safetensors")
    applied = surgery.apply(plan_file, directory, tmp_path / "two", atlas=tiny_atlas("llama"), recover="bias")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (tmp_path / "two" / "model.safetensors").read_bytes()
    assert applied.report.recovery == pruned.report.recovery
    assert atlas.stacks["decoder"]["sum_u"].size


def test_evaluating(tiny_checkpoint, atlas: Atlas, tmp_path: Path) -> None:
    directory, model = tiny_checkpoint("llama"), tiny_model("llama")
    result = surgery.prune(directory, atlas, tmp_path / "half")
    cut, pair = tiny_model("llama"), (model.train(), tiny_tokenizer())
    surgery.prune_(cut, surgery.plan(atlas))
    named = surgery.LoadedModel(cut, tiny_tokenizer(), "cut")
    found = surgery.evaluate([directory, result, pair, named], TEXT, seq_len=32, max_tokens=256)
    assert found[0].perplexity == pytest.approx(found[2].perplexity, rel=1e-5)
    assert found[1].perplexity == pytest.approx(found[3].perplexity, rel=1e-5)
    assert [item.model for item in found][3] == "cut"
    assert found[0].comparison is None
    assert found[1].comparison is not None
    assert model.training


def test_a_sweep_and_its_plot(tiny_checkpoint, tiny_atlas, atlas: Atlas, tmp_path: Path) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    settings: dict[str, Any] = {
        "methods": ["scar-prot", "wanda"],
        "sparsity": np.array([0.3, 0.5]),
        "seq_len": 32,
        "max_tokens": 256,
    }
    by_path = surgery.sweep(tiny_atlas("llama"), tiny_checkpoint("llama"), TEXT, tmp_path / "sweep", **settings)
    loaded = surgery.sweep(atlas, (tiny_model("llama"), tiny_tokenizer()), TEXT, **settings)
    assert len(by_path.rows) == len(loaded.rows) == 5
    assert [row["nll"] for row in by_path.rows] == pytest.approx([row["nll"] for row in loaded.rows], rel=1e-5)
    assert atlas.stacks["decoder"]["label"].size
    assert all(path.is_file() for path in by_path.files)
    axes = figures.Figure().add_subplot()
    assert by_path.plot(axes, "half a fox") is axes
    dense = f"dense: {by_path.rows[0]['perplexity']:.4g}"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["scar-prot", "wanda", dense]
    assert axes.get_title() == "half a fox"


def test_ablating(tiny_checkpoint, tiny_atlas) -> None:
    found = surgery.ablate(tiny_atlas("llama"), "remove", tiny_checkpoint("llama"), TEXT, seq_len=32, select="supernodes")
    assert found.rows[0]["channels"] == 0
    assert found.rows[1]["supernodes_removed"] > 0


# Mistakes

MISTAKES: dict[str, tuple[str, str, Callable[[dict[str, Any]], object]]] = {
    "missing atlas": ("no.h5 does not exist", "atlas build", lambda have: chanfmt.open("no.h5")),
    "not an atlas": ("int is not an atlas", "open atlas", lambda have: chanfmt.report(3)),
    "a plan for an atlas": ("PruningPlan is not an atlas", "open atlas", lambda have: surgery.prune(have["model"], have["plan"])),
    "tokenizer with a name": (
        "are for a loaded model",
        "leave them out",
        lambda have: chanfmt.build(have["model"], "a.h5", tokenizer=have["tokenizer"]),
    ),
    "loaded without tokenizer": (
        "without a tokenizer",
        "tokenizer=",
        lambda have: chanfmt.build(have["loaded"], "a.h5", "pydoc", **SMALL),
    ),
    "a pair to build": (
        "tuple is not a model",
        "tokenizer=",
        lambda have: chanfmt.build((have["loaded"], have["tokenizer"]), "a.h5", "pydoc"),
    ),
    "text itself": ("not the text itself", ".txt file", lambda have: chanfmt.build(have["model"], "a.h5", TEXT)),
    "unknown loss": ("unknown loss 'nll'; choose", "", lambda have: chanfmt.build(have["model"], "a.h5", loss="nll")),
    "unknown device map": ("unknown device map", "", lambda have: chanfmt.build(have["model"], "a.h5", device_map="all")),
    "no sequences": ("--sequences must be", "", lambda have: chanfmt.build(have["model"], "a.h5", sequences=0)),
    "rho as text": ("--rho must be a number, not '0.1'", "", lambda have: chanfmt.relabel(have["atlas"], "a.h5", rho="0.1")),
    "rho in percent": ("--rho must lie in [0, 1], not 5", "", lambda have: chanfmt.relabel(have["atlas"], "a.h5", rho=5)),
    "existing output": ("exists", "overwrite", lambda have: chanfmt.relabel(have["atlas"], have["atlas"], rho=0.1)),
    "one atlas to merge": ("at least two atlases, not 1", "", lambda have: chanfmt.merge(have["atlas"], "all.h5")),
    "a loaded model to merge": (
        "not the name of a model",
        "directory",
        lambda have: chanfmt.merge([have["atlas"], have["other"]], "all.h5", model=have["loaded"]),
    ),
    "unknown metric": (
        "unknown metric 'fame'; choose from lp",
        "",
        lambda have: chanfmt.compare(have["atlas"], have["atlas"], "fame"),
    ),
    "missing file": ("no.h5 does not exist", "", lambda have: chanfmt.validate("no.h5")),
    "sparsity in percent": ("--sparsity must lie", "write 0.5 for 50%", lambda have: surgery.plan(have["atlas"], 50)),
    "sparsity as text": ("must be a number between 0 and 1, not '0.5'", "", lambda have: surgery.plan(have["atlas"], "0.5")),
    "unknown method": ("did you mean scar-lp", "", lambda have: surgery.plan(have["atlas"], method="scar")),
    "unknown selector": ("did you mean supernodes", "top:METRIC", lambda have: surgery.plan(have["atlas"], protect="supernode")),
    "ids to protect": ("--protect takes text, not 3", "LAYER:IDS", lambda have: surgery.plan(have["atlas"], protect=[3])),
    "unknown stack": ("there is no stack 'encoder'", "decoder", lambda have: surgery.plan(have["atlas"], stack="encoder")),
    "swapped arguments": ("is a directory, not an atlas", "", lambda have: surgery.prune(have["atlas"], have["model"], "half")),
    "a loaded model to prune": ("is in memory", "surgery.prune_(", lambda have: surgery.prune(have["loaded"], have["atlas"])),
    "a loaded model to apply": ("is in memory", "surgery.prune_(", lambda have: surgery.apply(have["plan"], have["loaded"])),
    "refit without atlas": (
        "needs the atlas",
        "atlas=",
        lambda have: surgery.apply(have["plan"], have["model"], "half", recover="bias"),
    ),
    "unknown recovery": (
        "did you mean bias",
        "",
        lambda have: surgery.prune(have["model"], have["atlas"], "half", recover="bia"),
    ),
    "an atlas to apply": ("Path is not a pruning plan|is not a pruning plan", "", lambda have: surgery.apply(have["atlas"])),
    "a number to apply": ("int is not a plan", "surgery.plan(", lambda have: surgery.apply(3)),
    "a path to prune in place": ("is not a plan", "surgery.plan(", lambda have: surgery.prune_(have["loaded"], have["atlas"])),
    "a name to prune in place": (
        "is not a transformers model",
        "from_pretrained",
        lambda have: surgery.prune_(have["model"], have["plan"]),
    ),
    "a model without tokenizer": ("by itself", "(model, tokenizer)", lambda have: surgery.evaluate(have["loaded"], TEXT)),
    "no model": ("no model to evaluate", "at least one", lambda have: surgery.evaluate([], TEXT)),
    "unknown protocol": ("unknown protocol", "", lambda have: surgery.evaluate(have["model"], TEXT, protocol="x")),
    "missing text": ("no.txt does not exist", "", lambda have: surgery.evaluate(have["model"], "no.txt")),
    "sweep in percent": (
        "not a share",
        "write 0.3 for 30%",
        lambda have: surgery.sweep(have["atlas"], have["model"], TEXT, sparsity=30),
    ),
    "unknown experiment": ("choose from remove", "", lambda have: surgery.ablate(have["atlas"], "remov", have["model"], TEXT)),
    "no result": ("is not a result of surgery", "surgery prune", lambda have: surgery.push(have["model"])),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_a_hint(
    name: str, tiny_checkpoint, tiny_atlas, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    have = {
        "model": tiny_checkpoint("llama"),
        "loaded": tiny_model("llama"),
        "tokenizer": tiny_tokenizer(),
        "atlas": tiny_atlas("llama"),
        "other": other,
        "plan": surgery.plan(tiny_atlas("llama")),
    }
    message, hint, mistake = MISTAKES[name]
    with pytest.raises(chanfmt.ChanfmtError) as caught:
        mistake(have)
    assert any(part in caught.value.message for part in message.split("|"))
    assert "\n" not in caught.value.message
    assert hint in (caught.value.hint or "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "function"),
    [row for row in functions() if "analysis" not in row[0]],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unknown_argument_is_a_type_error(name: str, function: Callable[..., Any]) -> None:
    given = {
        parameter.name: "remove" if parameter.name == "experiment" else "x"
        for parameter in inspect.signature(function).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    }
    with pytest.raises(TypeError, match=rf"^{name.rpartition('.')[2]}\(\) got an unexpected keyword argument 'fame'"):
        function(**given, fame=1)


# Notes and progress


def test_notes_go_to_the_logger_and_nothing_is_printed(
    tiny_checkpoint, tiny_atlas, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger=LOGGER.name):
        chanfmt.build(tiny_checkpoint("llama"), tmp_path / "a.h5", "pydoc", **SMALL).close()
        chanfmt.relabel(tiny_atlas("llama"), tmp_path / "b.h5", rho=0.1).close()
        surgery.prune(tiny_checkpoint("llama"), tiny_atlas("llama"), tmp_path / "half")
        surgery.evaluate(tmp_path / "half", TEXT, seq_len=32, progress=False)
    notes = [record.getMessage() for record in caplog.records if record.name == LOGGER.name]
    assert any(note.startswith("cutting ") for note in notes)
    assert any("still refer" in note for note in notes)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("progress", [False, True, None])
def test_progress(
    progress: bool | None,
    terminal: bool,
    tiny_checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    surgery.evaluate(tiny_checkpoint("llama"), TEXT, seq_len=32, progress=progress)
    drawn = "tok" in capsys.readouterr().err
    assert drawn == (terminal if progress is None else progress)
    assert not bars_shown()


# In a session


def test_objects_are_short_in_a_session(tiny_checkpoint, atlas: Atlas, tmp_path: Path) -> None:
    plan, report = surgery.plan(atlas), chanfmt.report(atlas)
    result = surgery.prune(tiny_checkpoint("llama"), atlas, tmp_path / "half")
    with contextlib.closing(chanfmt.open(atlas.path)) as again:
        shown = (
            again,
            plan,
            plan.blocks[0],
            report,
            report.sections[0],
            report.plots["halo"],
            report.sections[0].tables[0],
            result,
        )
        for value in shown:
            assert repr(value).startswith(f"<{type(value).__name__}")
            assert len(repr(value)) < 160
    assert repr(plan.blocks[0]) == "<BlockPlan 'model.layers.0.mlp': 32 of 87 channels kept>"
    # Records without the texts and arrays that fill a screen.
    assert len(repr(atlas.model)) < 300
    assert len(repr(atlas.calibration)) < 600
    assert len(repr(result.report)) < 700
    for value, words in ((report, "the paper says"), (result, "supernodes removed"), (plan, "LP kept"), (atlas, "calibration")):
        assert words in value._repr_html_()
