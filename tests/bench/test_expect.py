"""The bench behind docs/expect.md: it measures what a sweep measures, and the page and the data of the package agree."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from bench import expect as bench
from surgery.experiments.columns import losses_of
from surgery.experiments.sweep import sweep
from surgery.planning.measured import cuts_of, measured_cuts
from tests.support.measured import SEQ_LEN, Tiny, make_tiny

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TOKENS = 3 * SEQ_LEN


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture
def arguments(tiny: Tiny, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line, with words for its end."""
    other = tmp_path / "other.txt"
    other.write_text(tiny.text.read_text(encoding="utf-8")[40:])
    page = tmp_path / "page.md"
    page.write_text(f"before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n")

    def make(*more: str) -> list[str]:
        return [
            *(str(tiny.model), "--atlas", str(tiny.atlas), "--name", "Tiny", "--calibration", "noise", "--sparsity", "0.5"),
            *("--methods", "scar-lp", "--text", "first", "prose", str(tiny.text), "--text", "second", "manual", str(other)),
            *("--seq-len", str(SEQ_LEN), "--max-tokens", str(TOKENS), "--data", str(tmp_path / "data.json")),
            *("--page", str(page), "-o", str(tmp_path / "rows"), *more),
        ]

    return make


def test_the_page_and_the_data_of_the_package_agree() -> None:
    page = bench.PAGE.read_text(encoding="utf-8")
    assert bench.rendered(page, measured_cuts()) == page, "run: python bench/expect.py --render"


def test_two_texts_are_measured_at_once_as_a_sweep_measures_each(arguments: Any, tiny: Tiny, tmp_path: Path) -> None:
    assert bench.main(arguments("--recover", "none,lstsq")) == 0
    cuts = cuts_of(json.loads((tmp_path / "data.json").read_text()))
    assert [(item.recovery, item.method) for item in cuts] == [("none", "scar-lp"), ("lstsq", "scar-lp")]
    for number, source in enumerate((tiny.text, tmp_path / "other.txt")):
        atlas, _ = tiny.subject()
        with atlas:
            rows = sweep(
                atlas,
                str(tiny.model),
                str(source),
                methods="scar-lp",
                sparsity="0.5",
                recover="none,lstsq",
                seq_len=SEQ_LEN,
                max_tokens=TOKENS,
            ).rows
        dense, *others = map(losses_of, rows)
        for item, losses in zip(cuts, others, strict=True):
            loss = item.losses[number]
            # The data has four decimals.
            np.testing.assert_allclose(loss.above, losses.mean - dense.mean, atol=6e-5)
            np.testing.assert_allclose(loss.dense, dense.mean, atol=6e-5)
            assert loss.low is not None
            assert loss.low - 1e-4 <= loss.above <= loss.high + 1e-4  # type: ignore[operator]
            assert (loss.tokens, loss.blocks) == (TOKENS, 3)
    [command] = {item.command for item in cuts}
    assert str(tmp_path) not in (tmp_path / "data.json").read_text() + (tmp_path / "page.md").read_text()
    assert command.startswith("python bench/expect.py ")
    page = (tmp_path / "page.md").read_text()
    assert page.startswith("before\n")
    assert page.endswith(f"{bench.END}\nafter\n")
    assert "| scar-lp | lstsq | " in page
    assert "old" not in page


def test_rows_that_are_there_are_not_measured_again_and_keep_their_day(arguments: Any, tmp_path: Path) -> None:
    assert bench.main(arguments("--recover", "none")) == 0
    path = tmp_path / "data.json"
    path.write_text(path.read_text().replace(cuts_of(json.loads(path.read_text()))[0].date, "2020-01-02"))
    rows = (tmp_path / "rows" / "results.json").read_text()
    assert bench.main(arguments("--recover", "none,bias", "--publish")) == 0
    assert (tmp_path / "rows" / "results.json").read_text() == rows
    [kept] = cuts_of(json.loads(path.read_text()))
    assert kept.date == "2020-01-02"
    assert bench.main(arguments("--sparsity", "0.25,0.5", "--recover", "none")) == 0
    first, second = cuts_of(json.loads(path.read_text()))
    assert first.channels_removed < second.channels_removed
    assert second.date == "2020-01-02" != first.date


def test_a_missing_argument_is_named(capsys: Any, tmp_path: Path) -> None:
    assert bench.main(["model", "--data", str(tmp_path / "data.json")]) == 2
    assert "--atlas is missing" in capsys.readouterr().err
