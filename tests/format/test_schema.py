"""The traits of every variable, and what follows from them."""

from __future__ import annotations

import pytest

from chanfmt.algebra.metrics import FORMULAS
from chanfmt.format import schema

BY_NAME = schema.STACK_VARIABLE_BY_NAME


def test_every_metric_that_follows_from_sums_has_a_formula_and_every_formula_a_metric():
    derived = {metric.name for metric in schema.METRICS if metric.merge == "derive"}
    assert FORMULAS.keys() == derived - {"protection"}
    assert list(FORMULAS) == [metric.name for metric in schema.METRICS if metric.name in FORMULAS]
    assert {term for formula in FORMULAS.values() for term in formula.sums} <= {variable.name for variable in schema.SUMS}


def test_names_are_unique_and_headings_fit():
    names = [variable.name for variable in (*schema.INDEX_VARIABLES, *schema.STACK_VARIABLES)]
    assert len(set(names)) == len(names)
    assert all(0 < len(metric.heading) <= 10 for metric in schema.METRICS)
    assert len({metric.heading for metric in schema.METRICS}) == len(schema.METRICS)


def test_traits_name_what_there_is():
    for variable in schema.STACK_VARIABLES:
        assert variable.merge in schema.MERGE_RULES
        assert set(variable.rests_on) <= {schema.CORE, schema.SUPPORT, schema.CORRELATIONS}
        assert variable.known_where in {schema.ALWAYS, schema.WITH_TOKENS, schema.PER_FFN, schema.PARTLY}
        assert not variable.beside or BY_NAME[variable.beside].dimensions == variable.dimensions
        assert variable.ids_of in {"", "channel", "residual"}
        assert bool(variable.ids_of) == bool(variable.beside) == (variable.range == schema.ID)


@pytest.mark.parametrize(
    ("what", "names"),
    [
        (
            schema.CORE,
            "connectivity connectivity_at read_connectivity redundancy redundancy_null redundancy_partner redundancy_pair "
            "write_dimension write_share",
        ),
        (schema.SUPPORT, "connectivity read_connectivity write_dimension write_share"),
        (
            schema.CORRELATIONS,
            "redundancy redundancy_null redundancy_tokens core_covered redundancy_partner redundancy_pair",
        ),
    ],
)
def test_what_rests_on_what(what, names):
    assert set(schema.resting_on(what)) == set(names.split())


def test_series_and_what_a_strip_leaves_out():
    assert set(schema.SERIES) == {
        "sum_q2_split",
        "tokens_split",
        "connectivity_at",
        "redundancy_partner",
        "redundancy_pair",
        "write_dimension",
        "write_share",
    }
    assert set(schema.STRIPPED) == {*(variable.name for variable in schema.SUMS), "sum_q2_split", "max_abs_u"}
    assert {variable.name for variable in schema.STACK_VARIABLES if variable.kept} == {"tokens", "tokens_split"}


def test_ranges_and_where_values_are_known():
    def having(test):
        return {variable.name for variable in schema.STACK_VARIABLES if test(variable)}

    assert having(lambda item: item.range == schema.ANY) == {"sum_u", "sum_q"}
    assert having(lambda item: item.range == schema.SHARE) == {
        "connectivity",
        "connectivity_at",
        "read_connectivity",
        "core_covered",
        "protection",
        "write_share",
    }
    assert having(lambda item: item.range == schema.NATS) == {"redundancy", "redundancy_null", "redundancy_pair"}
    assert having(lambda item: item.range == schema.ID) == {"redundancy_partner", "write_dimension"}
    assert having(lambda item: item.known_where == schema.ALWAYS) == having(
        lambda item: item.merge in ("sum", "max", "equal")
    ) | {"protection"}
    assert having(lambda item: item.known_where == schema.PARTLY) == {
        "redundancy",
        "redundancy_null",
        "redundancy_pair",
        "write_share",
    }
    assert having(lambda item: item.known_where == schema.PER_FFN) == {"read_connectivity"}
