"""End to end: a model and its atlas give a smaller model that stock code loads, or nothing at all."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from chanfmt.base.command_line import recorded
from chanfmt.base.errors import ChanfmtError, CheckError, ModelError, UsageError
from chanfmt.format.reader import Atlas
from chanfmt.models.source import ModelSource
from surgery.cli.main import main
from surgery.cut.apply import apply_plan
from surgery.cut.options import CutOptions
from surgery.planning.file import load_plan
from surgery.planning.options import PlanOptions
from surgery.planning.plan import BlockPlan, PruningPlan, make_plan
from tests.support.cut_models import FAMILIES, VOCABULARY, save_atlas, save_model
from tests.support.heard import heard

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Case:
    """A saved model and its atlas."""

    name: str
    model: Path
    atlas: Path

    def plan(self, sparsity: float = 0.5, **options: Any) -> PruningPlan:
        with Atlas.open(self.atlas) as atlas:
            return make_plan(atlas, PlanOptions(sparsity, **options))


def make_case(name: str, directory: Path, **arguments: Any) -> Case:
    model = save_model(name, directory / "model", **arguments)
    return Case(name, model, save_atlas(name, model, directory / "atlas.h5"))


@pytest.fixture(scope="module")
def made_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("llama")
    make_case("llama", directory)
    return directory


@pytest.fixture
def llama(made_llama: Path, tmp_path: Path) -> Case:
    shutil.copytree(made_llama, tmp_path, dirs_exist_ok=True)
    return Case("llama", tmp_path / "model", tmp_path / "atlas.h5")


def entries(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def masked_logits(case: Case, plan: PruningPlan, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the dense model with removed channels' activations zeroed by hooks, not by editing weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32).eval()
    for block, planned in zip(FAMILIES[case.name].blocks(), plan.blocks, strict=True):
        write = next(item for item in block.tensors if item.role == "write")
        removed = torch.from_numpy(planned.removed_of(0).astype(np.int64))

        def silence(module: Any, inputs: tuple[torch.Tensor], removed: torch.Tensor = removed) -> torch.Tensor:
            return inputs[0].index_fill(-1, removed, 0.0)

        model.get_submodule(write.parameter.removesuffix(".weight")).register_forward_pre_hook(silence)
    with torch.inference_mode():
        return model(ids).logits


@pytest.mark.parametrize("name", list(FAMILIES))
def test_pruned_logits_equal_masked_dense_logits(name: str, tmp_path: Path) -> None:
    case = make_case(name, tmp_path)
    plan = case.plan(0.6, method="wanda")
    report = apply_plan(plan, ModelSource(case.model), tmp_path / "out")
    assert report.logits is not None
    assert report.logits.relative_error <= 1e-5
    changed = {field: change.after for field, change in report.applied.config.items()}
    assert changed == {FAMILIES[name].field: len(plan.blocks[0].kept)}
    pruned, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    ids = torch.randint(VOCABULARY, (2, 23), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        found = pruned.eval()(ids).logits
    expected = masked_logits(case, plan, ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    dense = transformers.AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32).eval()
    with torch.inference_mode():
        assert (dense(ids).logits - expected).abs().max() > 1e-4 * expected.abs().max(), "the mask did nothing"


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_tied_embeddings_stay_tied(name: str, tmp_path: Path) -> None:
    case = make_case(name, tmp_path)
    apply_plan(case.plan(), ModelSource(case.model), tmp_path / "out")
    pruned = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert pruned.get_input_embeddings().weight.data_ptr() == pruned.get_output_embeddings().weight.data_ptr()
    assert load_file(case.model / "model.safetensors").keys() == load_file(tmp_path / "out/model.safetensors").keys()


def test_bfloat16_shards_stay_bfloat16_shards(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = FAMILIES["llama"].build().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="9KB")
    case = Case("llama", tmp_path / "model", save_atlas("llama", tmp_path / "model", tmp_path / "atlas.h5"))
    shards = len(list(case.model.glob("*.safetensors")))
    assert shards > 2
    apply_plan(case.plan(), ModelSource(case.model), tmp_path / "out")
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert [file.name for file in files] == [f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)]
    assert all(tensor.dtype == torch.bfloat16 for file in files for tensor in load_file(file).values())


def test_names_on_disk_may_differ_from_names_in_memory(tmp_path: Path) -> None:
    """The first GPT-2 checkpoints lack the prefix that the loaded model's names have."""
    model = save_model("gpt2", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    save_file(
        {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()},
        model / "model.safetensors",
        {"format": "pt"},
    )
    case = Case("gpt2", model, save_atlas("gpt2", model, tmp_path / "atlas.h5"))
    plan = case.plan()
    blocks = tuple(
        dataclasses.replace(
            block,
            tensors=tuple(dataclasses.replace(item, tensor=item.tensor.removeprefix("transformer.")) for item in block.tensors),
        )
        for block in plan.blocks
    )
    report = apply_plan(dataclasses.replace(plan, blocks=blocks), ModelSource(model), tmp_path / "out")
    assert report.logits is not None
    assert "h.0.mlp.c_fc.weight" in load_file(tmp_path / "out" / "model.safetensors")


def test_only_the_width_changes_in_the_config(llama: Case, tmp_path: Path) -> None:
    config = json.loads((llama.model / "config.json").read_text()) | {"x_note": "kept", "rope_theta": 1e4}
    (llama.model / "config.json").write_text(json.dumps(config))
    plan = llama.plan()
    apply_plan(plan, ModelSource(llama.model), tmp_path / "out")
    edited = json.loads((tmp_path / "out" / "config.json").read_text())
    assert edited == config | {"intermediate_size": len(plan.blocks[0].kept)}
    assert list(edited) == list(config)


def test_what_the_output_holds(llama: Case, tmp_path: Path) -> None:
    for name in (
        "tokenizer.json",
        "chat_template.jinja",
        "LICENSE",
        "special_tokens_map.json",
        ".secret",
        "pytorch_model.bin",
        "model.onnx",
        "modeling_evil.py",
        "README.md",
        "other.safetensors",
        "training_args.bin",
        "model.gguf",
    ):
        (llama.model / name).write_text(f"{name}\n")
    (tmp_path / "private").write_text("private")
    (llama.model / "notes.txt").symlink_to(tmp_path / "private")
    (llama.model / "original").mkdir()
    (llama.model / "original" / "tokenizer.jinja").write_text("not ours")
    (llama.model / "additional_chat_templates").mkdir()
    for name in ("tools.jinja", "tools.py"):
        (llama.model / "additional_chat_templates" / name).write_text(name)
    with heard() as said, recorded("surgery", ["prune", "x"]):
        apply_plan(llama.plan(seed=3), ModelSource(llama.model), tmp_path / "out")
    assert entries(tmp_path / "out") == [
        "LICENSE",
        "README.md",
        "additional_chat_templates",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "kept_channels.safetensors",
        "layers.svg",
        "model.safetensors",
        "model.safetensors.index.json",
        "special_tokens_map.json",
        "surgery.json",
        "tokenizer.json",
    ]
    assert entries(tmp_path / "out" / "additional_chat_templates") == ["tools.jinja"]
    # vLLM takes all files with this suffix, except those that an index leaves out.
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == dict.fromkeys(load_file(tmp_path / "out" / "model.safetensors"), "model.safetensors")
    assert said == ["notes.txt is not carried over: it is a link out of the model's directory"]
    record = json.loads((tmp_path / "out" / "surgery.json").read_text())
    with Atlas.open(llama.atlas) as atlas:
        assert record["atlas_sha256"] == atlas.content_sha256
    assert record["seed"] == 3
    assert record["command"] == "surgery prune x"
    assert record["source"]["fingerprint"] == llama.plan().model.fingerprint
    assert record["sparsity"] == dict.fromkeys(("reached", "reached_in_scope"), pytest.approx(17 / 37)) | {"asked": 0.5}
    assert [layer["kept"] for layer in record["layers"]] == [20, 20, 20]
    assert record["checks"]["logits"]["tolerance"] == 1e-4
    assert record["checks"]["logits"]["text"] == "calibration tokens"
    assert {"torch", "transformers", "chanfmt", "safetensors", "python"} <= record["versions"].keys()
    kept = load_plan(tmp_path / "out" / "kept_channels.safetensors")
    up = load_file(llama.model / "model.safetensors")["model.layers.2.mlp.up_proj.weight"]
    cut = load_file(tmp_path / "out" / "model.safetensors")["model.layers.2.mlp.up_proj.weight"]
    assert torch.equal(cut, up[torch.from_numpy(kept.blocks[2].kept.astype(np.int64))])


def test_links_of_the_hub_cache_are_followed(llama: Case, tmp_path: Path) -> None:
    cache = tmp_path / "models--tiny--llama"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    (llama.model / "tokenizer.json").write_text("{}")
    for number, path in enumerate(sorted(llama.model.iterdir())):
        path.rename(cache / "blobs" / str(number))
        (cache / "snapshots" / "abc" / path.name).symlink_to(Path("../../blobs") / str(number))
    apply_plan(llama.plan(), ModelSource(cache / "snapshots" / "abc"), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_hostile_names_open_no_markup(llama: Case, tmp_path: Path) -> None:
    plan = llama.plan()
    model = dataclasses.replace(plan.model, id="x`\n---\n<script>|\x1b[31m", source="hub")
    apply_plan(dataclasses.replace(plan, model=model), ModelSource(llama.model), tmp_path / "out", CutOptions(verify=False))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "<script>" not in card.split("---\n", 2)[2]
    assert "\x1b" not in card
    assert card.count("\n---\n") == 1


def test_the_wrong_model(llama: Case, tmp_path: Path) -> None:
    torch.manual_seed(9)
    FAMILIES["llama"].build().save_pretrained(tmp_path / "other")
    before = entries(tmp_path)
    with pytest.raises(ModelError, match="is not the model of the atlas"):
        apply_plan(llama.plan(), ModelSource(tmp_path / "other"), tmp_path / "out")
    assert entries(tmp_path) == before


def test_quantised_and_configless_models(llama: Case, tmp_path: Path) -> None:
    path = llama.model / "config.json"
    config = json.loads(path.read_text())
    for text, message in (
        (json.dumps(config | {"quantization_config": {"bits": 4}}), "quantised"),
        ("{", "not valid"),
        ("[]", "is not a JSON object"),
        (json.dumps(config | {"model_type": "new"}), "does not know the model type 'new'"),
    ):
        path.write_text(text)
        with pytest.raises(ModelError, match=message):
            apply_plan(llama.plan(), ModelSource(llama.model), tmp_path / "out")
    path.unlink()
    with pytest.raises(ModelError, match="cannot read"):
        apply_plan(llama.plan(), ModelSource(llama.model), tmp_path / "out")
    assert entries(tmp_path) == ["atlas.h5", "model"]


def test_an_output_that_exists(llama: Case, tmp_path: Path) -> None:
    plan = llama.plan()
    apply_plan(plan, ModelSource(llama.model), tmp_path / "out", CutOptions(verify=False))
    with pytest.raises(UsageError, match="exists"):
        apply_plan(plan, ModelSource(llama.model), tmp_path / "out", CutOptions(verify=False))
    apply_plan(llama.plan(0.9), ModelSource(llama.model), tmp_path / "out", CutOptions(overwrite=True, verify=False))
    assert json.loads((tmp_path / "out" / "surgery.json").read_text())["sparsity"]["asked"] == 0.9
    assert entries(tmp_path) == ["atlas.h5", "model", "out"]


def test_overwrite_spares_what_is_not_ours(llama: Case, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    plan = llama.plan()
    with pytest.raises(UsageError, match="not written by surgery"):
        apply_plan(plan, ModelSource(llama.model), tmp_path / "home", CutOptions(overwrite=True))
    for place in (llama.model, tmp_path):
        with pytest.raises(UsageError, match="would replace the model"):
            apply_plan(plan, ModelSource(llama.model), place, CutOptions(overwrite=True))
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="not a directory"):
        apply_plan(plan, ModelSource(llama.model), tmp_path / "file", CutOptions(overwrite=True))
    assert entries(tmp_path) == ["atlas.h5", "file", "home", "model"]


def test_places_that_cannot_be_written(llama: Case, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        apply_plan(llama.plan(), ModelSource(llama.model), tmp_path / "no" / "out")
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    # Root ignores permissions, but nobody can write to the kernel's own file system.
    place = Path("/proc/out") if os.geteuid() == 0 else locked / "out"
    with pytest.raises(UsageError, match="cannot write in"):
        apply_plan(llama.plan(), ModelSource(llama.model), place)
    assert entries(locked) == []


@contextlib.contextmanager
def small_files() -> Iterator[None]:
    """The kernel refuses files of more than 9,000 bytes, as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_fills_up_leaves_nothing(llama: Case, tmp_path: Path) -> None:
    assert (llama.model / "model.safetensors").stat().st_size > 2 * 9000
    plan = llama.plan()
    with small_files(), pytest.raises(ChanfmtError, match="cannot write"):
        apply_plan(plan, ModelSource(llama.model), tmp_path / "out")
    assert entries(tmp_path) == ["atlas.h5", "model"]


def with_write_of(block: BlockPlan, other: BlockPlan) -> BlockPlan:
    pairs = zip(block.tensors, other.tensors, strict=True)
    return dataclasses.replace(block, tensors=tuple(theirs if mine.role == "write" else mine for mine, theirs in pairs))


def test_a_result_that_fails_its_check_is_not_published(llama: Case, tmp_path: Path) -> None:
    """The plan mixes up two layers' write projections: shapes fit, logits do not."""
    plan = llama.plan(method="random")
    first, second, *others = plan.blocks
    mixed = (with_write_of(first, second), with_write_of(second, first), *others)
    with pytest.raises(CheckError, match="logits differ"):
        apply_plan(dataclasses.replace(plan, blocks=mixed), ModelSource(llama.model), tmp_path / "out")
    assert entries(tmp_path) == ["atlas.h5", "model"]


def test_nan_weights_fail_the_check(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    case = Case("llama", model, save_atlas("llama", model, tmp_path / "atlas.h5"))
    with pytest.raises(CheckError, match="logits differ"):
        apply_plan(case.plan(), ModelSource(model), tmp_path / "out")
    assert entries(tmp_path) == ["atlas.h5", "model"]


def test_no_memory_for_the_check_is_said(llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surgery.cut import check

    with pytest.raises(check.NotCheckedError, match=r"needs 10000\.5 GB of memory for the model"):
        check.check_memory(10**13, "the model")
    check.check_memory(1000, "the model")
    monkeypatch.setattr(check, "available_memory", lambda: 0)
    with heard() as said:
        report = apply_plan(llama.plan(), ModelSource(llama.model), tmp_path / "out")
    assert report.logits is None
    assert "one block at a time in float32, and 0.0 GB are available" in said[0]
    assert "skipped" in json.loads((tmp_path / "out" / "surgery.json").read_text())["checks"]["logits"]


def test_random_tokens_where_the_atlas_stores_none(llama: Case, tmp_path: Path) -> None:
    for tokens in ((), (1, VOCABULARY)):
        plan = dataclasses.replace(llama.plan(), check_tokens=tokens)
        report = apply_plan(plan, ModelSource(llama.model), tmp_path / "out", CutOptions(overwrite=True))
        assert report.logits is not None
        assert (report.logits.text, report.logits.count) == ("random tokens", 64)


def test_command_line_end_to_end(
    llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prune", "atlas.h5", "--sparsity", "0.5", "--model", "model", "--json", "--quiet"]) == 0
    out, err = capsys.readouterr()
    record = json.loads(out)
    assert record["output"] == "llama-scar-prot-50"
    assert err == ""
    assert record["parameters"]["after"] < record["parameters"]["before"]
    # A fresh process with stock code only.
    code = (
        "import sys, torch, transformers; m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "assert m.config.intermediate_size == 20; print(m(torch.tensor([[1, 2]])).logits.shape);"
        "assert not {'chanfmt', 'surgery'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, "llama-scar-prot-50"], capture_output=True, text=True, check=True)
    assert f"[1, 2, {VOCABULARY}]" in done.stdout
    assert main(["plan", "atlas.h5", "--sparsity", "0.25", "--method", "flap", "-o", "plan", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["sparsity"]["asked"] == 0.25
    assert main(["apply", "plan", "--model", "model", "-o", "small", "--no-verify"]) == 0
    out, err = capsys.readouterr()
    assert "0.25 asked" in out
    assert "not run: --no-verify" in out
    assert "wrote small" in err
    assert entries(tmp_path) == ["atlas.h5", "llama-scar-prot-50", "model", "plan", "small"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "atlas.h5", "--sparsity", "0.5"], "built from a local model named 'tiny/llama'"),
        (["prune", "atlas.h5", "--sparsity", "1"], "nothing would be left"),
        (["prune", "atlas.h5", "--sparsity", "half"], "invalid float"),
        (["prune", "atlas.h5"], "--sparsity"),
        (["prune", "none.h5", "--sparsity", "0.5"], "none.h5"),
        (["plan", "atlas.h5", "--sparsity", "0.5", "--protect", "nodes"], "unknown selector 'nodes'"),
        (["plan", "atlas.h5", "--sparsity", "0.5", "-o", "atlas.h5"], "exists"),
        (["apply", "atlas.h5", "--model", "model"], "is not a pruning plan"),
        (["apply"], "PLAN"),
    ],
)
def test_wrong_usage_exits_2(
    llama: Case,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert entries(tmp_path) == ["atlas.h5", "model"]


def test_dry_run_writes_nothing(
    llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prune", "atlas.h5", "--sparsity", "0.5", "--dry-run"]) == 0
    assert "37 to 20 in 3 FFNs" in capsys.readouterr().out
    assert entries(tmp_path) == ["atlas.h5", "model"]


def test_interrupted_writes_leave_nothing(llama: Case, tmp_path: Path) -> None:
    def interrupt(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), heard(interrupt):
        apply_plan(llama.plan(), ModelSource(llama.model), tmp_path / "out", CutOptions(verify=False))
    assert entries(tmp_path) == ["atlas.h5", "model"]
