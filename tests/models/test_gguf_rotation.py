"""How a GGUF header scales positions: as llama.cpp reads it, and refused if it is damaged or unknown."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from chanfmt.base.errors import ModelError
from chanfmt.models.gguf_header import F32, FLOAT32, Header, StoredTensor, Value
from chanfmt.models.gguf_rotation import DIVISORS, LLAMA3, divisors, stored_scaling

if TYPE_CHECKING:
    from pathlib import Path

HEAD, THETA = 64, 5e5
TWO = Value.of(2.0, FLOAT32)
LINEAR = {"rope_type": "linear", "factor": 2.0}
SCALED = divisors({"rope_theta": THETA, "factor": 8.0, **LLAMA3}, HEAD)


def read(path: Path, keys: dict[str, Value], numbers: np.ndarray | None = None, shape: tuple[int, ...] | None = None) -> object:
    path.write_bytes(b"" if numbers is None else numbers.astype("<f4").tobytes())
    values = {f"llama.rope.{name}": value for name, value in keys.items()} | {"general.architecture": Value.of("llama")}
    tensors = {} if numbers is None else {DIVISORS: StoredTensor(DIVISORS, shape or numbers.shape, F32)}
    return stored_scaling(path, Header(values, tensors, 0), THETA, HEAD)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"scaling.type": Value.of("linear"), "scaling.factor": TWO}, LINEAR),
        # llama.cpp takes the type linear if the file names none, and knows the old name of the factor.
        ({"scaling.factor": TWO}, LINEAR),
        ({"scale_linear": TWO}, LINEAR),
        ({"scaling.type": Value.of("none"), "scaling.factor": TWO}, None),
        ({"scaling.type": Value.of("linear"), "scaling.factor": Value.of(0.0, FLOAT32)}, None),
    ],
)
def test_a_scaling_is_read_as_llama_cpp_reads_it(keys: dict[str, Value], expected: object, tmp_path: Path) -> None:
    assert read(tmp_path / "x", keys) == expected
    # Divisors of 1 divide nothing, so what the keys say holds beside them.
    assert read(tmp_path / "x", keys, np.ones(HEAD // 2)) == expected


@pytest.mark.parametrize(
    "keys",
    [
        {"scaling.type": Value.of("linear"), "scaling.factor": Value.of("two")},
        {"scaling.type": Value.of("linear"), "scaling.factor": Value.array([1, 2])},
        {"scaling.type": Value.of("linear"), "scaling.factor": Value.of(float("nan"), FLOAT32)},
        {"scaling.type": Value.of("yarn"), "scaling.factor": TWO, "scaling.original_context_length": Value.of("x")},
        {"scaling.attn_factor": TWO},
    ],
)
def test_a_value_that_is_not_a_scale_is_refused(keys: dict[str, Value], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not read from GGUF files"):
        read(tmp_path / "x", keys)


def test_divisors_and_another_scaling_are_refused_together(tmp_path: Path) -> None:
    assert read(tmp_path / "x", {}, SCALED) == {"rope_type": "llama3", "factor": 8.0, **LLAMA3}
    with pytest.raises(ModelError, match="in two ways"):
        read(tmp_path / "x", {"scaling.factor": TWO}, SCALED)


@pytest.mark.parametrize("shape", [(1 << 60,), (HEAD // 2,)])
def test_divisors_that_the_file_does_not_hold_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="all of them in the file"):
        read(tmp_path / "x", {}, SCALED[:5], shape)
