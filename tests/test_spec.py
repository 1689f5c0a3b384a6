"""The specification and the schema say the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_tables_follow_the_schema():
    specification = importlib.util.spec_from_file_location("generate", ROOT / "spec" / "generate.py")
    generate = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(generate)
    text = generate.SPEC.read_text(encoding="utf-8")
    assert generate.rendered(text) == text, "run: python spec/generate.py"
