"""The page of bench/evidence.py: from the results in its state directory to docs/evidence.md and its figures."""
from __future__ import annotations
import json
from pathlib import Path
from typing import Any
FORMAT = "evidence/1"
DEPENDENT = ("texts",)
def read_state(directory: Path) -> Any: ...
def write_page(page: Path, state: Any) -> None: ...
