"""The bench of recoveries: what it writes anew does what its sources say, and every row is about the same tokens."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from bench.recovery_baselines import Layers, Projection, cut_only, find_rule, fit, flap_bias
from chanfmt.format.reader import Atlas
from chanfmt.models.load import load_model
from chanfmt.models.source import ModelSource
from surgery.cli.main import main
from surgery.evaluation.evaluate import evaluate
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from tests.support import zoo
from tests.support.measured import SEQ_LEN, TOKENS, Tiny, make_tiny
from tests.support.plans import planned

if TYPE_CHECKING:
    import numpy as np

    from surgery.planning.plan import PruningPlan

SCRIPT = Path(__file__).parents[2] / "bench" / "recover.py"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def half(llama: Tiny) -> tuple[PruningPlan, np.ndarray]:
    """A plan that removes half of every FFN, and the atlas's tokens."""
    with Atlas.open(llama.atlas) as atlas:
        tokens = atlas.calibration.token_ids
        assert tokens is not None
        return make_plan(atlas, PlanOptions(0.5, "scar-lp")), tokens[:]


def loaded(case: Tiny) -> Any:
    return load_model(ModelSource(case.model), device="cpu")


def pruned(case: Tiny, directory: Path, *more: str) -> Path:
    command = ["prune", case.atlas, "--model", case.model, "--method", "scar-lp", "--sparsity", 0.5, "-o", directory, "--quiet"]
    assert main([*map(str, command), *more]) == 0
    return directory


def losses(model: Any, case: Tiny) -> np.ndarray:
    return evaluate(model, str(case.text), seq_len=SEQ_LEN, max_tokens=TOKENS)[0].losses.nll


def seen(model: Any, name: str, tokens: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """What the module ``name`` reads and writes on ``tokens``, float64 (token, feature)."""
    found: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, args, output: found.extend((args[0], output)))
    with torch.no_grad():
        model(torch.from_numpy(tokens).long())
    handle.remove()
    read, written = (item.reshape(-1, item.shape[-1]).double() for item in found)
    return read, written


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "qwen2", "opt", "gpt2"])
def test_the_layers_one_by_one_are_the_model(model_type: str, tmp_path: Path) -> None:
    zoo.tiny(model_type, "causal").save_pretrained(tmp_path)
    model = load_model(ModelSource(tmp_path), device="cpu")
    plan = planned(tmp_path, lambda number, ffn: ffn.width // 2)
    ids = torch.arange(3, 43).reshape(2, 20)
    layers = Layers(model, plan)
    with torch.no_grad():
        hidden = torch.cat([layers.embedded(row) for row in ids])
        expected = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        assert torch.equal(hidden, expected[0])
        for number in layers.numbers[:-1]:
            write = Projection(model, layers.cut[number])
            parts = [layers.run(number, row[None], write) for row in hidden]
            hidden = torch.cat([output for _, output in parts])
            assert torch.allclose(hidden, expected[number + 1], atol=1e-5)
            assert parts[0][0].shape == (20, write.width)


def test_a_cut_in_memory_is_the_cut_checkpoint(llama: Tiny, half: tuple[PruningPlan, np.ndarray], tmp_path: Path) -> None:
    model = loaded(llama)
    cut_only(model, half[0])
    tokenizer = ModelSource(llama.model).tokenizer
    assert losses((model, tokenizer), llama) == pytest.approx(losses(pruned(llama, tmp_path / "out"), llama), rel=1e-6)


def test_flaps_bias_is_ours(llama: Tiny, half: tuple[PruningPlan, np.ndarray], tmp_path: Path) -> None:
    """The two do not share code: ours reads sums from the atlas."""
    model = loaded(llama)
    flap_bias(model, *half)
    written = load_file(pruned(llama, tmp_path / "out", "--recover", "bias") / "model.safetensors")
    biases = {name: tensor for name, tensor in written.items() if name.endswith("down_proj.bias")}
    assert biases
    for name, tensor in biases.items():
        found = model.get_parameter(name)
        assert found.abs().max() > 0
        assert torch.allclose(found, tensor, rtol=1e-4, atol=1e-4 * float(tensor.abs().max()))


@pytest.mark.parametrize("name", ["grail", "grail:0.1", "dense-lstsq", "osscar", "osscar-fullseq:0.1"])
def test_the_fit_solves_its_own_problem(name: str, llama: Tiny, half: tuple[PruningPlan, np.ndarray]) -> None:
    """Check the second layer, whose inputs differ between the dense and the cut model."""
    plan, tokens = half
    rule = find_rule(name)
    assert rule is not None
    dense, model = loaded(llama), loaded(llama)
    fit(model, plan, tokens, rule)
    kept = torch.from_numpy(plan.blocks[1].kept).long()
    down, mlp = "model.layers.1.mlp.down_proj", "model.layers.1.mlp"
    read, written = seen(dense, down, tokens)
    inputs = read[:, kept] if rule.inputs == "dense" else seen(model, down, tokens)[0]
    if rule.inputs == "cut" and rule.target == "own":
        written = dense.get_submodule(mlp)(seen(model, mlp, tokens)[0].float()).double()
    prior = dense.get_parameter(f"{down}.weight")[:, kept].double()
    found = model.get_parameter(f"{down}.weight").double()
    assert found.shape == prior.shape
    assert not torch.allclose(found, prior, rtol=1e-2)
    if rule.towards == "zero":
        damping, prior = rule.ridge * (inputs.square().sum(0).mean() + 1e-3), torch.zeros_like(prior)
    else:
        everything = read if rule.inputs == "dense" else seen(cut_before(dense, model), down, tokens)[0]
        damping = rule.ridge * everything.square().sum(0).mean()
    slope = inputs.T @ (inputs @ found.T - written) + damping * (found - prior).T
    assert slope.abs().max() <= 1e-4 * (inputs.T @ written).abs().max()


def cut_before(dense: Any, model: Any) -> Any:
    """The fitted model with the second layer of the dense model."""
    mixed = copy.deepcopy(model)
    mixed.model.layers[1] = dense.model.layers[1]
    return mixed


def test_a_singular_fit_without_a_penalty_has_an_answer(llama: Tiny, half: tuple[PruningPlan, np.ndarray]) -> None:
    plan, tokens = half
    model = loaded(llama)
    rule = find_rule("grail:0")
    assert rule is not None
    assert rule.ridge == 0
    fit(model, plan, tokens[:1, :4], rule)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def run(case: Tiny, directory: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [SCRIPT, case.model, "--atlas", case.atlas, "--text", case.text, "--held-out", case.text.with_name("other.txt")]
    command += ["--seq-len", SEQ_LEN, "--max-tokens", TOKENS, "-o", directory, *more]
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False)


def test_rows_are_measured_once_and_alike(llama: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama.text.with_name("other.txt").write_text("\n".join(f"class C{number}: pass" for number in range(90)), encoding="utf-8")
    done = run(llama, tmp_path / "out", "--methods", "grail")
    assert done.returncode == 0, done.stderr
    first = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    done = run(llama, tmp_path / "out", "--methods", "grail,lstsq")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("measuring") == 1
    assert done.stdout == (tmp_path / "out" / "page.md").read_text() + "\n"
    for text in ("## text.txt", "## other.txt", "| **lstsq** |", "above lstsq"):
        assert text in done.stdout
    rows = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert rows["grail"] == first["grail"]
    assert rows["grail"]["rule"] == {"inputs": "cut", "target": "own", "towards": "zero", "ridge": 1e-3}
    assert rows["grail"]["refit_sha256"] == rows["lstsq"]["refit_sha256"]
    assert rows["grail"]["parameters"] == rows["lstsq"]["parameters"]
    # The sweep measures the same recovery in place, without a checkpoint.
    options = ["--methods", "scar-lp", "--sparsity", "0.5", "--recover", "lstsq", "--json"]
    assert main(["sweep", *llama.arguments(tmp_path / "sweep", *options)]) == 0
    swept = json.loads(capsys.readouterr().out)["rows"][-1]
    assert swept["recover"] == "lstsq"
    assert rows["lstsq"]["texts"][0]["block_nll"] == pytest.approx(swept["block_nll"], rel=1e-5)
    done = run(llama, tmp_path / "out", "--methods", "grail", "--sparsity", "0.25")
    assert done.returncode == 2
    assert "measured with another sparsity" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "grale"], "unknown row"),
        (["--methods", "grail:little"], "takes no such penalty"),
        (["--methods", "lstsq:0.1"], "takes no such penalty"),
        (["--recover-tokens", "8k"], "--calib, which is not given"),
    ],
)
def test_a_mistake_shows_before_any_work(options: list[str], message: str, llama: Tiny, tmp_path: Path) -> None:
    done = run(llama, tmp_path / "out", *options)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_page_says_what_failed_and_what_is_not_another_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    from bench.recover import page

    def row(first: float, second: float, **more: Any) -> dict[str, Any]:
        texts = [
            {"text": name, "tokens": 8, "tokens_sha256": name, "block_nll": [3 * first, 3 * second], "block_predicted": [3, 3]}
            for name in ("test.txt", "pydoc")
        ]
        machine = {"cpu": "a CPU", "cores": 2, "threads": 1, "torch": "2", "transformers": "5", "chanfmt": "1"}
        return {"date": "2026-01-02 03:04", "command": "python x", "machine": machine, "texts": texts, "parameters": 9} | more

    identity = {
        "model": "tiny",
        "atlas": {"sha256": "", "tokens": "2 x 4", "sources": ["valid.txt"]},
        "scores": "scar-lp",
        "sparsity": 0.5,
        "calib": ["valid.txt=3", "pydoc"],
        "texts": [["test.txt", 8], ["pydoc", 8]],
        "seq_len": 4,
        "seed": 0,
    }
    fitted = {"refit_tokens": 8, "seconds": 1.0, "cpu_seconds": 1.0, "peak_bytes": 10**6}
    rows = {
        "dense": row(1.0, 2.0),
        "scar-lp": row(2.0, 4.0),
        "grail": row(2.0, 3.5, **fitted),
        "bias": {"error": "surgery prune: error: no bias"},
        "lstsq": row(1.5, 3.0, **fitted, continued=True),
    }
    said = page({"identity": identity, "rows": rows})
    assert "8 tokens drawn from valid.txt=3, pydoc" in said
    assert said.count("is not another domain") == 1
    assert "The refit uses pydoc too" in said
    assert "- `bias`: surgery prune: error: no bias" in said
    # exp(2.25 - 3), and the differences of the two blocks from lstsq, 0.5 and 0.5.
    assert "| **lstsq** | 9.488 | 2.2500 +- 0.7500 | 0.472 | - |" in said
    assert "| grail | 15.64 | 2.7500 +- 0.7500 | 0.779 | +0.5000 (+0.5000 to +0.5000) |" in said
    assert "| **lstsq** | 1 + interrupted runs | 1 + interrupted runs | 1 | 9 |" in said
