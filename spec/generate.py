"""Rewrite the specification's reference tables, and the schema as data, from `chanfmt.format.schema` and `chanfmt.format.columns`.

python spec/generate.py          rewrite atlas-1.0.md, atlas-1.0.json, columns-1.md and columns-1.json in place
python spec/generate.py --check  exit 1 if one of them would change
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

from chanfmt.algebra.validate.findings import RULES
from chanfmt.format import columns, schema

SPEC = Path(__file__).with_name(f"atlas-{schema.FORMAT_VERSION}.md")
COLUMNS = Path(__file__).with_name("columns-1.md")


LOSS_OF = {
    "next-token": "causal",
    "masked-token": "encoder with a language-model head",
    "reconstruction": "encoder-decoder",
    "embedding": "any, such as an encoder without a head",
    "labels": "given labels with its inputs",
}
"""Loss to the kind of model that it is for."""


def tables() -> dict[str, str]:
    """Marker in the specification to Markdown table."""
    result = {f"attributes {group}": _attributes(group) for group in schema.ATTRIBUTES}
    result["variables index"] = _variables(schema.INDEX_VARIABLES)
    result["variables stack"] = _variables(schema.STACK_VARIABLES)
    result["variables block"] = _variables(schema.BLOCK_VARIABLES)
    result["variables calibration"] = _variables(schema.CALIBRATION_VARIABLES)
    result["variables producer"] = _variables(schema.PRODUCER_VARIABLES)
    result["losses"] = "\n".join(
        ["| model | `loss` |", "|---|---|", *(f"| {model} | {schema.LOSSES[name]} |" for name, model in LOSS_OF.items())]
    )
    result["merge rules"] = "\n".join(
        [
            "| rule | two atlases' values are |",
            "|---|---|",
            *(f"| `{name}` | {meaning} |" for name, meaning in schema.MERGE_RULES.items()),
        ]
    )
    result["validation rules"] = "\n".join(
        [
            "| code | a file that breaks the rule has |",
            "|---|---|",
            *(f"| `{rule.code}` | {rule.meaning} |" for rule in RULES.values()),
        ]
    )
    return result


def column_tables() -> dict[str, str]:
    """As `tables`, for the page of columns."""
    found = {}
    for name, heading, items in (("columns", "column", columns.COLUMNS), ("driving tokens", "array", columns.DRIVING_ARRAYS)):
        rows = [f"| `{item.name}` | {item.dtype} | {item.units} | {item.merge} | {item.long_name} |" for item in items]
        found[name] = "\n".join([f"| {heading} | type | units | merge | meaning |", "|---|---|---|---|---|", *rows])
    return found


def rendered(path: Path, made: dict[str, str]) -> str:
    """The text of ``path`` with every generated table up to date."""
    text = path.read_text(encoding="utf-8")
    for marker, table in made.items():
        pattern = re.compile(rf"(<!-- generated: {re.escape(marker)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{path.name} has no place for the table {marker!r}")
        text = pattern.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def _attributes(group: str) -> str:
    items = schema.ATTRIBUTES[group]
    if all(item.required for item in items):
        rows = [f"| `{item.name}` | {item.type} | {item.meaning} |" for item in items]
        return "\n".join(["| attribute | type | meaning |", "|---|---|---|", *rows])
    rows = [f"| `{item.name}` | {item.type} | {'yes' if item.required else 'no'} | {item.meaning} |" for item in items]
    return "\n".join(["| attribute | type | required | meaning |", "|---|---|---|---|", *rows])


def _variables(variables: tuple[schema.Variable, ...]) -> str:
    rows = []
    for item in variables:
        needed = "gated" if item.gated_only else "yes" if item.required else "no"
        meaning = item.long_name.replace("|", "\\|")
        rows.append(
            f"| `{item.name}` | {item.dtype} | {', '.join(item.dimensions)} | {item.units or '-'} | {item.merge} "
            f"| {needed} | {meaning} |"
        )
    return "\n".join(
        ["| variable | type | dimensions | units | merge | required | meaning |", "|---|---|---|---|---|---|---|", *rows]
    )


def schema_json() -> str:
    """The schema as data, for programs in other languages."""

    def variables(table: tuple[schema.Variable, ...]) -> list[dict[str, object]]:
        return [_row(variable) for variable in table]

    return (
        json.dumps(
            {
                "format": schema.FORMAT,
                "format_version": schema.FORMAT_VERSION,
                "metric_definition": schema.METRIC_DEFINITION,
                "loss": schema.LOSSES,
                "attributes": {group: [dataclasses.asdict(item) for item in items] for group, items in schema.ATTRIBUTES.items()},
                "variables": {
                    "/calibration": variables(schema.CALIBRATION_VARIABLES),
                    "/block": variables(schema.BLOCK_VARIABLES),
                    "/stacks/*": variables((*schema.INDEX_VARIABLES, *schema.STACK_VARIABLES)),
                    "/producer": variables(schema.PRODUCER_VARIABLES),
                },
                "labels": schema.LABELS,
                "status": schema.STATUSES,
                "kind": schema.STACK_KINDS,
                "place": schema.PLACES,
                "source": schema.SOURCES,
                "role": schema.ROLES,
                "merge_rules": schema.MERGE_RULES,
                "extension_merge_rules": schema.EXTENSION_MERGE_RULES,
                "rules": {
                    rule.code: {"severity": rule.severity, "meaning": rule.meaning, "fix": rule.fix} for rule in RULES.values()
                },
            },
            indent=1,
        )
        + "\n"
    )


def _row(variable: schema.Variable) -> dict[str, object]:
    """One variable of the schema as data. The row of a stack's own variable also says which values it may have."""
    names = ("name", "dtype", "dimensions", "long_name", "units", "merge", "required", "gated_only", "heading")
    row = {name: getattr(variable, name) for name in names}
    if variable not in schema.STACK_VARIABLES:
        return row
    limits = [limit if math.isfinite(limit) else None for limit in (variable.range.low, variable.range.high)]
    known = variable.known_where if variable.dtype in ("f4", "f8") else schema.ALWAYS
    return row | {"range": limits, "known": known, "rests_on": variable.rests_on, "kept": variable.kept}


def outputs() -> dict[Path, str]:
    """Every generated file to the text that it should hold."""
    registry = json.dumps([dataclasses.asdict(item) for item in columns.COLUMNS], indent=1) + "\n"
    return {
        SPEC: rendered(SPEC, tables()),
        SPEC.with_suffix(".json"): schema_json(),
        COLUMNS: rendered(COLUMNS, column_tables()),
        COLUMNS.with_suffix(".json"): registry,
    }


def main() -> int:
    """Entry point. Returns the exit code."""
    stale = [path for path, text in outputs().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        return int(bool(stale))
    for path in stale:
        path.write_text(outputs()[path], encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
