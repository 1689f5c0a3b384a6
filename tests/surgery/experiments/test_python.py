"""`sweep` and `ablate` from Python: an open atlas and a model by name or in memory, rows with and without a directory."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

import surgery
from chanfmt.base.errors import ModelError, UsageError
from chanfmt.format.reader import Atlas
from surgery.cli.main import main
from surgery.experiments.ablation.experiments import EXPERIMENTS
from surgery.experiments.ablation.removal import RemovalOptions
from surgery.experiments.ablation.run import ablate
from surgery.experiments.spelled import spelled
from surgery.experiments.subject import open_subject
from surgery.experiments.sweep import sweep
from surgery.experiments.sweep_plan import SweepOptions
from surgery.experiments.sweep_plot import draw
from tests.support.measured import SEQ_LEN, TOKENS, Forwards, Tiny, make_tiny
from tests.support.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

TEXT: dict[str, Any] = {"seq_len": SEQ_LEN, "max_tokens": TOKENS}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("llama"), "llama")


def loaded(case: Tiny) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(case.model)


def nll_of(rows: list[dict[str, Any]]) -> list[float]:
    return [row["nll"] for row in rows]


def test_a_sweep_of_a_loaded_model_has_the_rows_of_the_command_line(llama: Tiny, tmp_path: Path) -> None:
    arguments = llama.arguments(tmp_path / "out", "--methods", "wanda,random", "--sparsity", "0.3,0.5", "--seeds", "0-1")
    assert main(["sweep", *arguments]) == 0
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    model = loaded(llama).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    results = sweep(
        Atlas.open(llama.atlas),
        (model, tiny_tokenizer()),
        llama.text,
        methods=["wanda", "random"],
        sparsity=[0.3, 0.5],
        seeds=range(2),
        **TEXT,
    )
    assert nll_of(results.rows) == nll_of(stored["rows"])
    assert [row["channels_sha256"] for row in results.rows] == [row["channels_sha256"] for row in stored["rows"]]
    assert (results.directory, results.files) == (None, ())
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_one_subject_serves_several_experiments(llama: Tiny) -> None:
    atlas = Atlas.open(llama.atlas)
    subject = open_subject(atlas, (loaded(llama), tiny_tokenizer()), llama.text, **TEXT)
    forwards = Forwards(subject)
    swept = sweep(atlas, subject, methods="wanda", sparsity=0.5)
    each = forwards.count // 2
    ablation = ablate(atlas, "remove", subject, select="supernodes", control=["random"], seeds=[0, 1])
    assert forwards.count == 6 * each
    assert nll_of(ablation.rows)[0] == nll_of(swept.rows)[0]
    assert [row["control"] for row in ablation.rows] == [None, None, "random", "random"]
    by_name = ablate(atlas, "remove", str(llama.model), llama.text, select=("supernodes",), control="random", seeds="0-1", **TEXT)
    assert nll_of(by_name.rows) == nll_of(ablation.rows)
    assert by_name.summary == ablation.summary


def test_rows_of_other_weights_in_memory_are_not_taken_up(llama: Tiny, tmp_path: Path) -> None:
    atlas, model = Atlas.open(llama.atlas), loaded(llama)
    options = {"methods": "wanda", "sparsity": 0.5, "output": tmp_path / "out", **TEXT}
    first = sweep(atlas, (model, tiny_tokenizer()), llama.text, **options)
    again = sweep(atlas, (model, tiny_tokenizer()), llama.text, **options)
    assert again.rows == first.rows
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(UsageError, match="was measured with another fingerprint"):
        sweep(atlas, (model, tiny_tokenizer()), llama.text, **options)


def test_a_refit_needs_files(llama: Tiny) -> None:
    atlas = Atlas.open(llama.atlas)
    with pytest.raises(UsageError, match="a refit reads the model's files, and a loaded model has none"):
        sweep(
            atlas,
            (loaded(llama), tiny_tokenizer()),
            llama.text,
            methods="scar-lp",
            sparsity=0.5,
            recover=["none", "lstsq"],
            **TEXT,
        )
    rows = sweep(atlas, llama.model, llama.text, methods="scar-lp", sparsity=0.5, recover=["none", "lstsq"], **TEXT).rows
    assert [row["recover"] for row in rows] == ["none", "none", "lstsq"]
    assert rows[1]["nll"] != rows[2]["nll"]


def test_what_does_not_fit_is_refused(llama: Tiny, tmp_path: Path) -> None:
    atlas, other = Atlas.open(llama.atlas), make_tiny(tmp_path, "gpt2")
    with pytest.raises(ModelError, match="does not have the FFN"):
        sweep(atlas, (loaded(other), tiny_tokenizer()), llama.text, **TEXT)
    with pytest.raises(ModelError, match="is not the model of the atlas"):
        sweep(atlas, other.model, llama.text, **TEXT)
    subject = open_subject(Atlas.open(other.atlas), other.model, llama.text, **TEXT)
    with pytest.raises(UsageError, match="opened with another atlas"):
        sweep(atlas, subject)
    with pytest.raises(UsageError, match="unknown experiment 'removal'; choose from remove"):
        ablate(atlas, "removal", subject)
    with pytest.raises(TypeError, match="methods"):
        ablate(atlas, "remove", subject, methods="wanda")
    with pytest.raises(UsageError, match="--seq-len must be at least 2"):
        sweep(atlas, llama.model, llama.text, seq_len=1)


def test_an_interrupt_without_a_directory_promises_nothing(llama: Tiny) -> None:
    atlas, subject = llama.subject()
    Forwards(subject, stop_at=1)
    with pytest.raises(KeyboardInterrupt) as stopped:
        sweep(atlas, subject, methods="wanda", sparsity=0.5)
    assert str(stopped.value) == ""


def test_python_and_the_command_line_have_the_same_options_and_defaults() -> None:
    for function in (sweep, surgery.sweep):
        signature = {name: item.default for name, item in inspect.signature(function).parameters.items()}
        for item in dataclasses.fields(SweepOptions):
            assert signature[item.name] == item.default
    taken = set(inspect.signature(ablate).parameters)
    for kind in EXPERIMENTS.values():
        assert not taken & {item.name for item in dataclasses.fields(kind.options)}


def test_lists_are_spelled_as_on_the_command_line() -> None:
    options = spelled(SweepOptions, {"methods": ["a", "b"], "sparsity": (0.1, 1e-7), "layers": None, "stack": "x", "seeds": 3})
    assert (options.methods, options.sparsity, options.layers, options.stack, options.seeds) == (
        "a,b",
        "0.1,1e-07",
        None,
        ("x",),
        "3",
    )
    chosen = spelled(RemovalOptions, {"select": ["halo"], "layers": [0, 2], "one_layer_at_a_time": True})
    assert (chosen.select, chosen.layers, chosen.one_layer_at_a_time) == (("halo",), "0,2", True)


def test_results_are_short_in_a_session_and_tables_in_a_notebook(llama: Tiny, tmp_path: Path) -> None:
    atlas, subject = llama.subject()
    results = sweep(atlas, subject, methods="wanda", sparsity=0.5, output=tmp_path / "out")
    ablation = ablate(atlas, "halo", subject)
    assert repr(results) == f"<Results sweep/1: 2 rows in {str(tmp_path / 'out')!r}>"
    assert repr(ablation) == f"<Ablation 'halo': {len(ablation.rows)} rows>"
    assert repr(subject) == f"<Subject 'model' on 'text.txt': 2 FFNs, {TOKENS} tokens>"
    assert results._repr_html_().count("<tr>") == 3
    assert ablation._repr_html_().count("<table>") == 2
    results.rows[1]["method"] = "<b>"
    assert "<b>" not in results._repr_html_()


def test_a_sweep_is_drawn_into_axes_of_the_caller(llama: Tiny) -> None:
    figures = pytest.importorskip("matplotlib.figure")
    atlas, subject = llama.subject()
    results = sweep(atlas, subject, methods=["wanda", "magnitude"], sparsity=[0.3, 0.5])
    left, right = figures.Figure().subplots(1, 2)
    draw(left, results.rows)
    draw(right, results.rows, "a title")
    assert (left.get_title(), right.get_title()) == ("", "a title")
    dense = results.rows[0]["perplexity"]
    assert [line.get_label() for line in left.lines] == ["wanda", "magnitude", f"dense: {dense:.4g}"]
    assert set(left.lines[-1].get_ydata()) == {dense}
    assert left.lines[0].get_ydata().tolist()[1:] == pytest.approx([row["perplexity"] for row in results.rows[1:3]])
    assert left.get_yscale() == "log"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value["rows"][1].update(nll="3.5"), "row 1: nll is not valid: expected float, got str"),
        (
            lambda value: value["rows"][1].update(perplexity=True),
            "row 1: perplexity is not valid: expected float | null, got bool",
        ),
        (lambda value: value["rows"][1].update(block_nll=[1.0]), "row 1: it has 1 losses for 5 blocks"),
        (lambda value: value["rows"][1].update(block_nll=[], block_predicted=[]), "row 1: it has 0 losses"),
        (
            lambda value: value["rows"][1].update(block_predicted=[1.5] * 5),
            "block_predicted[0] is not valid: expected int, got float",
        ),
        (lambda value: value["rows"][1].update(method=["wanda"]), "got array"),
        (lambda value: value["rows"][1].pop("hit_rate"), "row 1: it lacks the column 'hit_rate'"),
        (lambda value: value["rows"][1].pop("channels_sha256"), "missing required field channels_sha256"),
        (lambda value: value["rows"].append(3), "rows[2] is not valid: expected object, got int"),
        (lambda value: value.update(identity=[]), "identity is not valid: expected object, got array"),
        (lambda value: value.pop("rows"), "missing required field rows"),
    ],
)
def test_a_results_file_with_wrong_types_is_refused(llama: Tiny, tmp_path: Path, change: Any, message: str) -> None:
    atlas, subject = llama.subject()
    sweep(atlas, subject, methods="wanda", sparsity=0.5, output=tmp_path / "out")
    path = tmp_path / "out" / "results.json"
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(UsageError, match="is not a results file") as caught:
        sweep(atlas, subject, methods="wanda", sparsity=0.5, output=tmp_path / "out")
    assert message in caught.value.message
    assert caught.value.hint == "choose another -o, or add --overwrite"


@pytest.mark.parametrize("content", ["", "[1]", "nonsense", '{"format": NaN}', "[" * 100_000, "\ud800"])
def test_a_results_file_that_is_not_one_is_refused(llama: Tiny, tmp_path: Path, content: str) -> None:
    atlas, subject = llama.subject()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(UsageError, match="is not a results file"):
        sweep(atlas, subject, methods="wanda", sparsity=0.5, output=tmp_path / "out")


def test_the_layout_of_a_size_is_that_of_the_call(llama: Tiny) -> None:
    """With uneven widths, `uniform` pads to the widest FFN, so a size that `deci` reaches may need a larger share."""
    import surgery

    given = {"methods": "magnitude", "to": "90%", "allocation": "global", "multiple_of": 1}
    model = (loaded(llama), tiny_tokenizer())
    found = {
        layout: surgery.sweep(Atlas.open(llama.atlas), model, llama.text, layout=layout, **given, **TEXT).rows[-1][
            "sparsity_asked"
        ]
        for layout in ("deci", "auto")
    }
    assert found["deci"] == found["auto"]
    with pytest.raises(UsageError, match="unknown layout 'diagonal'"):
        surgery.sweep(Atlas.open(llama.atlas), model, llama.text, layout="diagonal", **given, **TEXT)
    with pytest.raises(UsageError, match="cannot be reached"):
        surgery.sweep(Atlas.open(llama.atlas), model, llama.text, layout="uniform", **given | {"to": "70%"}, **TEXT)
