"""Rewrite the reference tables of the specification from `chanfmt.schema`.

    python spec/generate.py          rewrite spec/atlas-1.0.md in place
    python spec/generate.py --check  exit 1 where it would change
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from chanfmt import schema
from chanfmt.validate.findings import RULES

SPEC = Path(__file__).with_name(f"atlas-{schema.FORMAT_VERSION}.md")


def tables() -> dict[str, str]:
    """Marker to Markdown table."""
    result = {f"attributes {group}": _attributes(group) for group in schema.ATTRIBUTES}
    result["variables index"] = _variables(schema.INDEX_VARIABLES)
    result["variables stack"] = _variables(schema.STACK_VARIABLES)
    result["variables block"] = _variables(schema.BLOCK_VARIABLES)
    result["variables calibration"] = _variables(schema.CALIBRATION_VARIABLES)
    result["variables producer"] = _variables(schema.PRODUCER_VARIABLES)
    result["merge rules"] = "\n".join(["| rule | two atlases' values are |", "|---|---|",
                                       *(f"| `{name}` | {meaning} |" for name, meaning in schema.MERGE_RULES.items())])
    result["validation rules"] = "\n".join(["| code | a file that breaks the rule has |", "|---|---|",
                                            *(f"| `{rule.code}` | {rule.meaning} |" for rule in RULES.values())])
    return result


def rendered(text: str) -> str:
    """``text`` with every generated table brought up to date."""
    for marker, table in tables().items():
        pattern = re.compile(rf"(<!-- generated: {re.escape(marker)} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"{SPEC.name} has no place for the table {marker!r}")
        text = pattern.sub(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
    return text


def _attributes(group: str) -> str:
    rows = [f"| `{item.name}` | {item.type} | {item.meaning} |" for item in schema.ATTRIBUTES[group]]
    return "\n".join(["| attribute | type | meaning |", "|---|---|---|", *rows])


def _variables(variables: tuple[schema.Variable, ...]) -> str:
    rows = []
    for item in variables:
        needed = "gated" if item.gated_only else "yes" if item.required else "no"
        meaning = item.long_name.replace("|", "\\|")
        rows.append(
            f"| `{item.name}` | {item.dtype} | {', '.join(item.dimensions)} | {item.units or '-'} | {item.merge} "
            f"| {needed} | {meaning} |"
        )
    return "\n".join(["| variable | type | dimensions | units | merge | required | meaning |",
                      "|---|---|---|---|---|---|---|", *rows])


def main() -> int:
    """Entry point. Returns the exit code."""
    before = SPEC.read_text(encoding="utf-8")
    after = rendered(before)
    if "--check" in sys.argv[1:]:
        return int(before != after)
    SPEC.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
