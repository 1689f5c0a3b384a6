"""The specification and the schema say the same."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_tables_follow_the_schema():
    specification = importlib.util.spec_from_file_location("generate", ROOT / "spec" / "generate.py")
    generate = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(generate)
    for path, text in generate.outputs().items():
        assert path.read_text(encoding="utf-8") == text, "run: python spec/generate.py"
