"""What is said of a GGUF file."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import pytest

from chanfmt.models.gguf_file import describe
from tests.support.gguf_files import written

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(("kind", "bits"), [("Q4_1", 4), ("Q8_0", 8), ("F32", 32), ("BF16", 16)])
def test_size_and_bits(kind: str, bits: int, tmp_path: Path) -> None:
    assert describe(written(tmp_path / "m.gguf", kind)) == f"0 MB of {bits}-bit weights ({kind})"


def test_a_damaged_or_hostile_header_gives_the_size_only(tmp_path: Path) -> None:
    whole = written(tmp_path / "m.gguf", "Q4_1").read_bytes()
    path = tmp_path / "bad.gguf"
    nested = struct.pack("<Q1sI", 1, b"k", 9) + struct.pack("<IQ", 9, 1) * 5000
    huge = struct.pack("<Q1sI", 1, b"k", 9) + struct.pack("<IQ", 12, 2**63)
    for data in (
        b"",
        whole[:100],
        b"GGML" + whole[4:],
        struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + nested,
        struct.pack("<4sIQQ", b"GGUF", 3, 1, 1) + huge,
        struct.pack("<4sIQQ", b"GGUF", 3, 2**60, 0),
        struct.pack("<4sIQQ", b"GGUF", 3, 0, 2**60) + b"\xff" * 64,
    ):
        path.write_bytes(data)
        assert describe(path) == "0 MB"
