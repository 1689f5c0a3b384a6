"""A build says what sets each FFN's width, and what prune will refuse."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from chanfmt.cli.main import main
from chanfmt.format.reader import Atlas
from chanfmt.models.source import ModelSource
from surgery.cli.main import main as surgery
from tests.support import zoo
from tests.support.census import build_atlas
from tests.support.tiny import tiny_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

SMALL = ("--calib", "pydoc", "--sequences", "2", "--seq-len", "32")


def saved(model_type: str, directory: Path, **changes: object) -> Path:
    zoo.tiny(model_type, "causal", **changes).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


def test_linked_widths_of_a_built_atlas_are_cut_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shared experts of DeepSeek are n times as wide as routed experts. `plan`, `--dry-run` and `prune` say one number."""
    fields = {"moe_intermediate_size": 1408, "n_shared_experts": 2, "intermediate_size": 512}
    model, path = saved("deepseek_v3", tmp_path / "model", **fields), str(tmp_path / "a.h5")
    build_atlas(model, tmp_path / "a.h5")
    hidden = json.loads((model / "config.json").read_text())["hidden_size"]
    with Atlas.open(path) as atlas:
        assert [(b.n_channels, b.width_field, b.width_factor, b.channel_parameters) for b in atlas.blocks] == [
            (512, "intermediate_size", 1, 3 * hidden),
            (1408, "moe_intermediate_size", 1, 3 * hidden),
            (2816, "moe_intermediate_size", 2, 3 * hidden),
        ]
    asked = [path, "--sparsity", "0.6", "--method", "magnitude"]
    said = []
    for arguments in (
        ["plan", *asked],
        ["prune", *asked, "--dry-run"],
        ["prune", *asked, "--model", str(model), "-o", str(tmp_path / "out")],
    ):
        assert surgery(arguments) == 0
        said.append(next(line for line in capsys.readouterr().out.splitlines() if line.startswith("parameters")))
    assert said[0] == said[1] == said[2]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # 0.4 of 1408 is 564, and the nearest multiple of 32 is 576.
    assert (config["moe_intermediate_size"], config["intermediate_size"]) == (576, 192)


def test_what_prune_will_refuse_is_said_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = saved("bloom", tmp_path / "model"), str(tmp_path / "a.h5")
    reason = "no config field sets the width of transformer.h.0.mlp and 1 more alone"
    assert main(["build", str(model), "-o", path, *SMALL, "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["prune"].startswith(f"refused: {reason}")
    assert main(["build", str(model), "-o", path, *SMALL]) == 0
    assert f"surgery prune will refuse it: {reason}" in capsys.readouterr().err
    cut = ["prune", path, "--sparsity", "0.5", "--method", "magnitude", "--model", str(model), "-o", str(tmp_path / "out")]
    assert surgery(cut) == 2
    assert "no config field that sets the width" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert surgery([*cut, "--allow-padding"]) == 0
    assert "the file is not smaller there" in capsys.readouterr().out


def test_a_model_that_stock_code_does_not_know(tmp_path: Path) -> None:
    """Code from a repository can measure a model that stock code cannot load. Its atlas is built all the same."""
    from chanfmt.building.widths import find_widths
    from chanfmt.models.find.discover import find_ffns
    from chanfmt.models.stored.layout import tensor_slices

    directory = saved("llama", tmp_path / "model")
    model = zoo.tiny("llama", "causal")
    ffns = find_ffns(model)
    slices = [tensor_slices(model, ffn, ModelSource(directory).index) for ffn in ffns]
    config = json.loads((directory / "config.json").read_text()) | {"model_type": "their-own"}
    (directory / "config.json").write_text(json.dumps(config))
    widths, refused, _ = find_widths(ModelSource(directory), ffns, slices)
    assert {(width.field, width.factor) for width in widths} == {("", 0)}
    assert "does not know the model type 'their-own'" in refused
