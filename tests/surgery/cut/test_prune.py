"""From Python: an open atlas and a model give a smaller model, and the atlas stays the same from first to last."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from chanfmt.base.errors import AtlasError, ModelError, UsageError
from chanfmt.format.reader import Atlas
from chanfmt.format.writer import write_atlas
from chanfmt.models.source import ModelSource
from surgery.cli.main import main
from surgery.cut import apply as apply_module
from surgery.cut.apply import apply_plan
from surgery.cut.options import CutOptions
from surgery.cut.prune import apply, prune
from surgery.cut.restore import restore
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from surgery.recovery.options import RecoveryOptions
from surgery.result.result import open_result
from tests.support.cut_models import content_for, save_atlas, save_model
from tests.support.gguf_files import written
from tests.support.heard import heard
from tests.support.plans import read
from tests.support.repeated import repeated

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model("llama", tmp_path / "model")


@pytest.fixture
def atlas(model: Path, tmp_path: Path) -> Iterator[Atlas]:
    with Atlas.open(save_atlas("llama", model, tmp_path / "atlas.h5")) as opened:
        yield opened


def other_atlas(model: Path, path: Path) -> Path:
    """An atlas of the same model with other content."""
    write_atlas(dataclasses.replace(content_for("llama", model), title="other"), path)
    return path


@pytest.mark.parametrize("how", ["source", "path", "text"])
def test_a_model_is_given_in_any_form(atlas: Atlas, model: Path, tmp_path: Path, how: str) -> None:
    given = {"source": ModelSource(model), "path": model, "text": str(model)}[how]
    with heard() as said:
        result = prune(atlas, given, tmp_path / "out", PlanOptions(0.5, "wanda"))
    assert said == ["cutting model", f"wrote {tmp_path / 'out'}"]
    assert result.directory == tmp_path / "out"
    assert result.report.logits is not None
    assert result.report.plan.method == "wanda"
    back = open_result(tmp_path / "out")
    assert back.report.to_json() == result.report.to_json()
    assert (tmp_path / "out" / "atlas.h5").read_bytes() == Path(atlas.path).read_bytes()


def test_the_steps_one_by_one_give_the_same(atlas: Atlas, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    plan = make_plan(atlas, PlanOptions(0.5))
    result = apply(plan, "model", options=CutOptions(verify=False), atlas=atlas)
    assert result.directory == Path("llama-scar-prot-50")
    again = prune(atlas, "model", "again", PlanOptions(0.5), CutOptions(verify=False))
    assert again.directory == Path("again")
    assert Path("again/model.safetensors").read_bytes() == Path("llama-scar-prot-50/model.safetensors").read_bytes()


@pytest.mark.parametrize("recover", ["none", "bias", "lstsq"])
@pytest.mark.parametrize("swap", ["rename", "rewrite"])
def test_an_atlas_that_changes_during_the_cut_is_refused(
    atlas: Atlas, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: str, recover: str
) -> None:
    """The file is swapped after the plan was made and before the copy."""
    other = other_atlas(model, tmp_path / "other.h5")
    write = apply_module.write_plan

    def swapped(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        if swap == "rename":
            os.replace(other, atlas.path)
        else:
            shutil.copyfile(other, atlas.path)

    monkeypatch.setattr(apply_module, "write_plan", swapped)
    options = CutOptions(verify=False), RecoveryOptions(recover, "cpu")
    with pytest.raises(AtlasError, match="changed while the model was cut") as caught:
        prune(atlas, model, tmp_path / "out", PlanOptions(0.5), *options)
    assert "\n" not in caught.value.message
    assert not (tmp_path / "out").exists()


def test_another_atlas_than_the_plans_is_refused_before_any_work(atlas: Atlas, model: Path, tmp_path: Path) -> None:
    plan = make_plan(atlas, PlanOptions(0.5))
    with (
        Atlas.open(other_atlas(model, tmp_path / "other.h5")) as other,
        pytest.raises(AtlasError, match=r"other\.h5 is not the atlas of the plan"),
    ):
        apply_plan(plan, ModelSource(model), tmp_path / "out", atlas=other)


def test_a_model_that_is_not_there(atlas: Atlas, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="built from a local model"):
        prune(atlas, None, tmp_path / "out", PlanOptions(0.5))
    with pytest.raises(ModelError, match="is a file"):
        prune(atlas, tmp_path / "model" / "config.json", tmp_path / "out", PlanOptions(0.5))


def test_what_was_restored(atlas: Atlas, model: Path, tmp_path: Path) -> None:
    result = prune(atlas, model, tmp_path / "out", PlanOptions(0.5), CutOptions(verify=False))
    restored = restore(ModelSource(result.directory), tmp_path / "back")
    assert restored.model == "tiny/llama"
    assert restored.relative_error is not None
    assert restored.relative_error <= 1e-4
    assert restored.tensors == len(read(model))


@pytest.mark.parametrize("recover", ["bias", "distill", *repeated("none", "lstsq")])
def test_a_plan_file_is_applied_and_refitted_as_prune_does(
    atlas: Atlas, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recover: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "atlas.h5", "--sparsity", "0.5", "-o", "plan", "--quiet"]) == 0
    assert main(["prune", "atlas.h5", "--sparsity", "0.5", "--model", "model", "--recover", recover, "-o", "one", "--quiet"]) == 0
    line = ["apply", "plan", "--model", "model", "--atlas", "atlas.h5", "--recover", recover, "-o", "two", "--quiet"]
    assert main(line) == 0
    assert Path("one/model.safetensors").read_bytes() == Path("two/model.safetensors").read_bytes()
    assert Path("two/atlas.h5").read_bytes() == Path(atlas.path).read_bytes()
    one, two = (open_result(Path(name)).report for name in ("one", "two"))
    assert one.recovery == two.recovery
    # The list of kept channels in the result is a plan for the same model, with or without a recovery.
    line = ["apply", "one/kept_channels.safetensors", "--model", "model", "--atlas", "atlas.h5", "--recover", recover]
    assert main([*line, "-o", "three", "--quiet"]) == 0
    assert Path("one/model.safetensors").read_bytes() == Path("three/model.safetensors").read_bytes()


def test_what_a_recovery_of_a_plan_needs(
    atlas: Atlas, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "atlas.h5", "--sparsity", "0.5", "-o", "plan", "--quiet"]) == 0
    other_atlas(model, tmp_path / "other.h5")
    capsys.readouterr()
    for arguments, message in (
        (["--recover", "lstsq"], "--recover lstsq needs the atlas that the plan was made from"),
        (["--recover", "later"], "unknown recovery 'later'"),
        (["--recover", "bias", "--atlas", "other.h5"], "other.h5 is not the atlas of the plan"),
        (["--atlas", "other.h5"], "other.h5 is not the atlas of the plan"),
        (["--recover", "bias", "--atlas", "missing.h5"], "missing.h5 does not exist"),
    ):
        assert main(["apply", "plan", "--model", "model", "-o", "out", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.parametrize(("dtype", "said"), [(None, "in float32"), ("bfloat16", "in bfloat16")])
def test_the_result_of_a_gguf_file_is_not_quantised(
    atlas: Atlas, model: Path, tmp_path: Path, dtype: str | None, said: str
) -> None:
    """The file's weights have 4 bits, and the model that is cut is their dequantised copy."""
    source = ModelSource(model, "small.gguf", "", "gguf")
    source.file = written(tmp_path / "small.gguf", "Q4_1")
    with heard() as lines:
        result = prune(atlas, source, tmp_path / "out", PlanOptions(0.5), CutOptions(dtype=dtype))
    assert result.report.source_file == "0 MB of 4-bit weights (Q4_1)"
    assert lines[-1].startswith("small.gguf is 0 MB of 4-bit weights (Q4_1), and the result is not quantised: 0 MB " + said)
    assert ("--dtype bfloat16" in lines[-1]) == (dtype is None)
    assert "the result is not quantised" in (tmp_path / "out" / "README.md").read_text()
    assert open_result(tmp_path / "out").report.to_json() == result.report.to_json()
