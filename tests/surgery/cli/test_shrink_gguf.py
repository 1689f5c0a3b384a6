"""``surgery shrink`` on a GGUF file: the result is one, sizes count it, and the comparison reads it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

import surgery
from chanfmt.base.errors import UsageError
from chanfmt.building.options import BuildOptions
from chanfmt.format.records import LabelSettings
from surgery.cli.shrinking.options import CutsOptions, JudgeOptions, MeasureOptions, Request, ShrinkOptions
from surgery.result.result import open_result
from tests.support.builds import build
from tests.support.gguf_models import tiny_llama, to_gguf

ROOT = str(Path(__file__).parents[3])


def request(model: str = "m.gguf", allocations: str = "uniform", **changes: Any) -> Request:
    shrink = ShrinkOptions(model, "75%", "small", **changes)
    return Request(shrink, MeasureOptions("pydoc"), CutsOptions(allocations=allocations), JudgeOptions())


@pytest.mark.parametrize(
    ("given", "format", "dtype"),
    [
        ({}, "gguf", None),
        ({"model": "org/model"}, "safetensors", None),
        ({"dtype": "float16"}, "safetensors", "float16"),
        ({"format": "safetensors"}, "safetensors", "bfloat16"),
        ({"layout": "deci"}, "safetensors", "bfloat16"),
        ({"allocations": "global"}, "safetensors", "bfloat16"),
        ({"allocations": "global,uniform"}, "gguf", None),
    ],
)
def test_the_format_is_that_of_the_model_unless_an_option_needs_a_checkpoint(
    given: dict[str, str], format: str, dtype: str | None
) -> None:
    made = request(**given)
    made.check()
    assert (made.format, made.dtype) == (format, dtype)


@pytest.mark.parametrize(
    "given",
    [
        {"model": "org/model", "format": "gguf"},
        {"dtype": "float16", "format": "gguf"},
        {"format": "safetensors", "quant": "q8_0"},
        {"format": "gguf", "layout": "deci"},
        {"layout": "diagonal"},
    ],
)
def test_formats_that_are_not_possible_are_refused_first(given: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        request(**given).check()


def test_a_gguf_file_becomes_a_smaller_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]))
    model = tmp_path / "tiny.gguf"
    to_gguf(tiny_llama(tmp_path / "llama"), model, "Q8_0")
    options = BuildOptions(str(model), str(tmp_path / "a.h5"), calib="pydoc", sequences=8, seq_len=64)
    build(options, LabelSettings(rho=0.03, support_size=8))
    wanted = 0.9 * model.stat().st_size
    shrunk = surgery.shrink(
        model, f"{wanted / 1e3}KB", tmp_path / "small", atlas=tmp_path / "a.h5", methods="activation,magnitude",
        allocations="uniform,global", try_recover="none", try_tokens=128, recover="none", seq_len=64, eval_tokens=192,
        held_out="pydoc", other="none", cut_quant="f16", progress=False,
    )  # fmt: skip
    file = tmp_path / "small" / "small.gguf"
    report = open_result(tmp_path / "small").report
    assert report.bytes_after == file.stat().st_size <= wanted
    # It is as large as the steps of the width allow, and not as small as float32 bytes would have made it.
    assert report.bytes_after > 0.75 * wanted
    assert report.gguf is not None
    assert report.gguf.types["F16"] == 3
    commands = {item["step"]: item["command"] for item in shrunk.to_json()["steps"]}
    assert list(commands) == ["try uniform", "cut", "evaluate"]
    assert "--format gguf --cut-quant f16" in commands["cut"]
    assert str(file) in commands["evaluate"]
    assert report.verdict == shrunk.verdict
    assert (tmp_path / "small" / "evaluation.json").exists()
    assert shrunk.next["serve"] == f"llama-server -m {file}"
    assert "--format gguf" in shrunk.next["heal"]
    assert shrunk.estimate.size == round(wanted)
    evaluated = surgery.evaluate([file], "one two three four five six seven eight\n" * 40, seq_len=64, max_tokens=128)
    assert evaluated[0].cut is not None
    assert evaluated[0].cut["method"] == report.plan.method
