"""The size of a cut in words: the same line in a plan, a result, a card, a push and the browser."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import pytest

from chanfmt.format.reader import Atlas
from chanfmt.format.writer import write_atlas
from surgery.cli.main import main
from surgery.planning.options import PlanOptions
from surgery.planning.plan import make_plan
from surgery.planning.sizes import (
    Sizes,
    applied_changes,
    bytes_text,
    config_changes,
    count_text,
    parameters_text,
    read_config,
    size_text,
    stored_bytes,
)
from tests.support.factory import random_content, with_fields

if TYPE_CHECKING:
    from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Ffn:
    """As a block of an atlas."""

    n_channels: int
    width_field: str | None
    width_factor: int = 1
    n_experts: int = 0
    channel_parameters: int = 1


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1_000, "1.0K"),
        (46_404, "46.4K"),
        (999_499, "999.5K"),
        (999_999, "1.0M"),
        (134_515_008, "134.5M"),
        (999_960_000, "1.00B"),
        (8_030_261_248, "8.03B"),
        (70_553_706_496, "70.6B"),
        (1_000_000_000_000, "1.00T"),
    ],
)
def test_counts(count: int, text: str) -> None:
    assert count_text(count) == text


@pytest.mark.parametrize(
    ("count", "text"), [(512, "0.5 kB"), (999_960, "1.0 MB"), (378_800_000, "378.8 MB"), (16_060_522_496, "16.06 GB")]
)
def test_bytes(count: int, text: str) -> None:
    assert size_text(count) == text


def test_the_line() -> None:
    assert parameters_text(134_515_008, 94_701_888) == "134.5M to 94.7M parameters, -29.6%"
    assert parameters_text(134_515_008, 134_515_008) == "134.5M to 134.5M parameters, no smaller"
    sizes = Sizes((134_515_008, 94_701_888), (538_100_000, 378_800_000), ("intermediate_size 1536 to 768",))
    assert sizes.headline == "134.5M to 94.7M parameters, -29.6%; 538.1 MB to 378.8 MB; intermediate_size 1536 to 768"
    assert sizes.rows[0] == ["parameters", "134.5M to 94.7M, -29.6% (134,515,008 to 94,701,888)"]
    assert bytes_text(*sizes.bytes or (0, 0)) == sizes.rows[1][1]
    many = Sizes((2, 1), None, tuple(f"f{number} 2 to 1" for number in range(5)))
    assert many.headline.endswith("; f0 2 to 1, f1 2 to 1, f2 2 to 1, 2 more config fields")


def test_config_fields_are_named_with_the_values_that_they_hold() -> None:
    one = [Ffn(16, "intermediate_size"), Ffn(16, "intermediate_size")]
    assert config_changes(one, [8, 8], {"intermediate_size": 16}) == ("intermediate_size 16 to 8",)
    # An atlas from which somebody took the config.
    assert config_changes(one, [8, 8], {}) == ("intermediate_size 16 to 8",)
    # A ratio, and gate and up together.
    assert config_changes([Ffn(16, "mlp_ratio")], [8], {"mlp_ratio": 4.0}) == ("mlp_ratio 4 to 2",)
    assert config_changes([Ffn(16, "text.ff_dim")], [8], {"text": {"ff_dim": 32}}) == ("text.ff_dim 32 to 16",)
    # DeepSeek's shared experts: two widths, one field.
    pair = [Ffn(16, "moe_size", 1, 4), Ffn(32, "moe_size", 2)]
    assert config_changes(pair, [8, 16], {"moe_size": 16}) == ("moe_size 16 to 8",)
    each = [Ffn(16, f"sizes[{place}]") for place in range(3)]
    assert config_changes(each, [8, 8, 16], {"sizes": [16, 16, 16]}) == ("sizes 16 to 8",)
    assert config_changes(each, [8, 4, 16], {"sizes": [16, 16, 16]}) == ("2 values of sizes, now 4 to 8",)
    assert config_changes([Ffn(16, ""), Ffn(16, None)], [8, 8], {}) == ()
    # What an atlas says is not always true.
    for value in (10**400, "x", True, None, -1, {"a": 1}):
        assert config_changes(one, [8, 8], {"intermediate_size": value}) == ("intermediate_size 16 to 8",)


def test_changes_that_were_made() -> None:
    fields = {"sizes": ([16, 16], [8, 4]), "mlp_bias": (False, True), "width": (None, 8)}
    assert applied_changes(fields) == ("2 values of sizes, now 4 to 8", "mlp_bias false to true", "width unset to 8")


def test_bytes_follow_the_stored_type() -> None:
    assert stored_bytes({"dtype": "bfloat16"}) == 2
    assert stored_bytes({"text_config": {"torch_dtype": "float32"}}) == 4
    assert stored_bytes({"dtype": "auto"}) == 0
    assert stored_bytes({"dtype": ["float32"]}) == 0
    assert read_config("[1]") == read_config("{") == read_config('{"a": 1e999}') == {}


def test_a_plan_says_the_size_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = with_fields(random_content(channels=320), {"decoder": ("intermediate_size", 1)})
    config = json.dumps({"dtype": "bfloat16", "intermediate_size": 320})
    model = dataclasses.replace(content.model, config=config)
    write_atlas(dataclasses.replace(content, model=model), tmp_path / "a.h5")
    with Atlas.open(tmp_path / "a.h5") as atlas:
        plan = make_plan(atlas, PlanOptions(0.5))
    assert plan.sizes is not None
    assert plan.sizes.parameters == (plan.parameters, plan.parameters_after)
    assert plan.sizes.bytes == (2 * plan.parameters, 2 * (plan.parameters_after or 0))
    assert plan.sizes.config == ("intermediate_size 320 to 160",)
    assert parameters_text(*plan.sizes.parameters) in repr(plan)
    for arguments in (["plan"], ["prune", "--dry-run"]):
        assert main([arguments[0], str(tmp_path / "a.h5"), "--sparsity", "0.5", *arguments[1:]]) == 0
        totals = capsys.readouterr().out.split("\n\n")[-1].splitlines()
        assert [line.split()[0] for line in totals[:4]] == ["parameters", "size", "config", "model"]
    assert main(["plan", str(tmp_path / "a.h5"), "--sparsity", "0.5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == dict(zip(("before", "after"), plan.sizes.bytes, strict=True))


def test_rounding_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_atlas(random_content(channels=100), tmp_path / "a.h5")
    found = []
    for more in ([], ["--multiple-of", "1"], ["--multiple-of", "30"], ["--allocation", "global"]):
        assert main(["plan", str(tmp_path / "a.h5"), "--sparsity", "0.4", *more]) == 0
        found.append([line.split("  ", 1)[1].strip() for line in capsys.readouterr().out.splitlines() if "rounding" in line])
    assert found[0] == [
        "kept widths are multiples of 32, which fast kernels and quantised types need; --multiple-of 1 cuts exactly"
    ]
    assert found[1] == []
    assert found[2] == []
    assert all("--multiple-of 1 cuts exactly" in line for line in found[3])
