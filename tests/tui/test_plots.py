"""Braille, bars and axis labels with known answers."""

from __future__ import annotations

import numpy as np
import pytest

from tui.widgets import plots
from tui.widgets.text import bar, count, number, percent, spread

NAN = float("nan")


def test_flat_curves_are_the_first_or_last_dots() -> None:
    assert plots.braille_curve(np.ones(4), 1) == ["⠉⠉"]
    assert plots.braille_curve(np.zeros(4), 1) == ["⣀⣀"]


def test_a_step_is_joined() -> None:
    assert plots.braille_curve(np.array([0.0, 1.0]), 1) == ["⡸"]
    assert plots.braille_curve(np.array([0.0, 1.0]), 2) == ["⢸", "⡸"]


def test_a_diagonal_has_one_dot_a_column() -> None:
    assert plots.braille_curve(np.array([0.0, 1 / 3, 2 / 3, 1.0]), 1) == ["⡠⠊"]


def test_histogram_heights_are_square_roots() -> None:
    assert plots.histogram(np.array([0, 1, 4]), 1) == [" ▄█"]
    assert plots.histogram(np.array([0, 1, 4]), 2) == ["  █", " ██"]


def test_histogram_of_nothing() -> None:
    assert plots.histogram(np.zeros(3, dtype=int), 2) == ["   ", "   "]


def test_log_counts_ignore_zero_and_nan() -> None:
    counts, low, high = plots.log_counts(np.array([0.0, NAN, 1e-3, 1e-3, 10.0]), 4)
    assert counts.tolist() == [2, 0, 0, 1]
    assert (low, high) == (-3.0, 1.0)


def test_log_counts_of_one_value_and_of_none() -> None:
    assert plots.log_counts(np.ones(5), 2)[0].sum() == 5
    assert plots.log_counts(np.zeros(5), 2) == (pytest.approx(np.zeros(2)), 0.0, 0.0)


def test_axis_labels_do_not_touch() -> None:
    assert plots.axis_labels([(0.0, "1"), (0.5, "10"), (1.0, "100")], 11) == "1   10  100"
    assert plots.axis_labels([(0.0, "1"), (0.05, "2"), (1.0, "9")], 9) == "1       9"


def test_rank_ticks_end_at_the_number_of_channels() -> None:
    ticks = plots.rank_ticks(14336, log=True)
    assert [text for _, text in ticks] == ["1", "10", "100", "1k", "14336"]
    assert plots.rank_ticks(14336, log=False)[-1] == (1.0, "14336")


def test_decade_ticks_thin_out() -> None:
    assert [text for _, text in plots.decade_ticks(-3.2, 1.1, 50)] == ["1e-3", "1e-2", "1e-1", "1e0", "1e1"]
    assert [text for _, text in plots.decade_ticks(-3.2, 1.1, 20)] == ["1e-2", "1e0"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(NAN, "-"), (0.0, "0"), (1.0, "1.00"), (777.0, "777"), (26440.0, "2.64e4"), (1.5e-9, "1.50e-9")],
)
def test_number(value: float, expected: str) -> None:
    assert number(value) == expected


def test_other_texts() -> None:
    assert percent(0.756) == "75.6%"
    assert (count(1.04), count(9.97), count(14336.0), count(NAN)) == ("1.0", "10", "14,336", "-")
    assert (bar(0.5, 4), bar(0.53, 4), bar(NAN, 2), bar(2.0, 2)) == ("██  ", "██▏ ", "  ", "██")
    assert (spread("left", "r", 8), spread("too long", "r", 6), spread("", "long", 2)) == ("left   r", "too  r", " l")
