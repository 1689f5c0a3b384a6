"""Where dequantised GGUF files are kept."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from chanfmt.models import gguf


@pytest.mark.skipif(sys.platform != "linux", reason="the directory of another system")
@pytest.mark.parametrize(("variable", "expected"), [("/somewhere/else", "/somewhere/else"), ("", "~/.cache"), (None, "~/.cache")])
def test_the_cache_is_the_users(monkeypatch, variable, expected):
    if variable is None:
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", variable)
    assert gguf._cache() == Path(expected).expanduser() / "chanfmt" / "gguf"
