"""Small GGUF files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from pathlib import Path


def written(path: Path, kind: str) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc", "d" * 300])
    writer.add_array("tokenizer.ggml.scores", [0.5, 0.25])
    writer.add_bool("x.flag", True)
    writer.add_string("x.text", "text")
    writer.add_tensor("norm.weight", np.ones(64, dtype=np.float32))
    values = np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)
    quantised = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    writer.add_tensor("a.weight", quantised, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
