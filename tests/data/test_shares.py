"""The number of sequences that each source gives."""

from __future__ import annotations

import pytest

from chanfmt.base.errors import UsageError
from chanfmt.building.options import BuildOptions
from chanfmt.data.shares import divide, read_weights


@pytest.mark.parametrize(
    ("calib", "weights"),
    [
        (["pydoc"], {"pydoc": 1}),
        (["a/b:c@train=0.25", "pydoc=3e2"], {"a/b:c@train": 0.25, "pydoc": 300}),
        (["lr=3/a.txt", "lr=3/b.txt=2", "x=1.jsonl"], {"lr=3/a.txt": 1, "lr=3/b.txt": 2, "x=1.jsonl": 1}),
    ],
)
def test_a_weight_follows_the_source(calib, weights):
    assert read_weights(calib) == weights


@pytest.mark.parametrize(
    ("calib", "message"),
    [
        (["pydoc=0"], "positive"),
        (["pydoc=-1"], "positive"),
        (["pydoc=nan"], "positive"),
        (["pydoc=inf"], "positive"),
        (["pydoc=half"], "'half' is not a number"),
        (["pydoc="], "'' is not a number"),
        (["=0.5"], "names no source"),
        ([""], "names no source"),
        ([], "names no source"),
        (["pydoc", "c4", "pydoc=2"], "names pydoc twice"),
    ],
)
def test_a_weight_that_is_not_a_weight_is_refused(calib, message):
    with pytest.raises(UsageError, match=message):
        read_weights(calib)


@pytest.mark.parametrize(
    ("weights", "sequences", "counts"),
    [
        ({"a": 1}, 5, {"a": 5}),
        ({"a": 1, "b": 1, "c": 1}, 64, {"a": 22, "b": 21, "c": 21}),
        ({"a": 1, "b": 0.25}, 64, {"a": 51, "b": 13}),
        ({"a": 1e308, "b": 1e308}, 4, {"a": 2, "b": 2}),
        ({"a": 5e-324, "b": 5e-324}, 4, {"a": 2, "b": 2}),
    ],
)
def test_sequences_are_divided_by_weight_whatever_the_order(weights, sequences, counts):
    assert divide(weights, sequences) == counts
    assert divide(dict(reversed(weights.items())), sequences) == counts


def test_a_source_without_a_sequence_is_refused():
    with pytest.raises(UsageError, match="--sequences 4 leaves no sequence for b"):
        divide({"a": 1, "b": 0.01}, 4)


def test_options_take_one_source_or_several():
    assert BuildOptions("m", "o").shares == {"wikitext2": 64}
    assert BuildOptions("m", "o", calib="pydoc", sequences=3).shares == {"pydoc": 3}
    assert BuildOptions("m", "o", calib=("pydoc", "c4=3")).shares == {"c4": 48, "pydoc": 16}
