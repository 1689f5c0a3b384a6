"""Atlases made from random numbers, for tests that need a file and not a model."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

from chanfmt import labels, metrics, schema
from chanfmt.records import (
    AtlasContent,
    Block,
    CalibrationRecord,
    Contribution,
    LabelSettings,
    ModelRecord,
    ProducerRecord,
    StackData,
    TensorSlice,
)
from chanfmt.writer import write_atlas

if TYPE_CHECKING:
    from pathlib import Path


def random_content(layers: int = 4, channels: int = 96, hidden: int = 24, seed: int = 0) -> AtlasContent:
    """A self-consistent dense gated atlas: every metric follows from the sums and random weights."""
    random = np.random.default_rng(seed)
    sequences, seq_len, splits = 16, 32, schema.SPLITS
    tokens = sequences * seq_len
    settings = LabelSettings(support_size=8)
    shape = (layers, channels)
    scale = np.exp(random.normal(0, 2, shape))
    split_q2 = random.gamma(1.0, 1.0, (splits, *shape)) * scale
    sum_q2 = split_q2.sum(axis=0)
    sum_u2 = random.gamma(2.0, 1.0, shape) * tokens
    variables: dict[str, np.ndarray] = {
        "tokens": np.full(layers, tokens),
        "tokens_split": np.full((splits, layers), tokens // splits),
        "sum_u": random.normal(0, 0.1, shape) * np.sqrt(sum_u2 * tokens),
        "sum_u2": sum_u2,
        "sum_s2": sum_q2 / sum_u2 * tokens,
        "sum_q": random.normal(0, 0.1, shape) * np.sqrt(sum_q2 * tokens),
        "sum_abs_q": 0.7 * np.sqrt(sum_q2 * tokens),
        "sum_q2": sum_q2,
        "sum_q2_split": split_q2,
        "max_abs_u": 4 * np.sqrt(sum_u2 / tokens),
        "redundancy_tokens": np.full(layers, tokens * 7 // 8),
        "core_covered": np.ones(layers),
    }
    variables |= metrics.derive_metrics(variables, variables["tokens"])
    for name in ("label", "connectivity", "redundancy", "redundancy_null", "protection", "read_connectivity",
                 "write_norm", "write_norm_l1", "gate_norm", "up_norm", "wanda_group"):
        variables[name] = np.zeros(shape)
    support = None
    for row in range(layers):
        write, gate, up = (random.normal(0, 1, size) for size in ((hidden, channels), (channels, hidden), (channels, hidden)))
        core = labels.supernodes(variables["lp"][row], settings.rho)
        variables["read_connectivity"][row] = np.nan if support is None else labels.read_connectivity([gate, up], support)
        support = labels.write_support(write, core, settings.support_size)
        conn = labels.connectivity(write, support).astype(np.float32)
        halo = labels.halo(conn, core, settings.eta)
        redundancy = random.gamma(1.0, 0.01, channels)
        variables["label"][row] = labels.label_array(channels, core, halo)
        variables["connectivity"][row] = conn
        variables["redundancy"][row] = redundancy
        variables["redundancy_null"][row] = random.gamma(1.0, 0.002, channels)
        variables["protection"][row] = labels.protection(redundancy, halo, settings.alpha, settings.gamma)
        variables["write_norm"][row] = np.linalg.norm(write, axis=0)
        variables["write_norm_l1"][row] = np.abs(write).sum(axis=0)
        variables["gate_norm"][row] = np.linalg.norm(gate, axis=1)
        variables["up_norm"][row] = np.linalg.norm(up, axis=1)
        variables["wanda_group"][row] = random.gamma(2.0, 1.0, channels)
    blocks = tuple(
        Block(index, index, "decoder", f"model.layers.{index}.mlp", "decoder", index, channels, 0, tuple(
            TensorSlice(role, f"model.layers.{index}.mlp.{name}.weight", f"model.layers.{index}.mlp.{name}.weight",
                        axis, 0, channels)
            for role, name, axis in (("gate", "gate_proj", 0), ("up", "up_proj", 0), ("write", "down_proj", 1))
        ))
        for index in range(layers)
    )
    token_ids = random.integers(0, 100, (sequences, seq_len)).astype("<i4")
    config = json.dumps({"model_type": "llama", "intermediate_size": channels, "hidden_size": hidden})
    return AtlasContent(
        title="importance atlas of tests/random",
        model=ModelRecord(
            "tests/random", "", "local", "llama", ("LlamaForCausalLM",), config,
            hashlib.sha256(config.encode()).hexdigest(), "float32", 12345, "f" * 64,
        ),
        calibration=CalibrationRecord(
            schema.LOSS, schema.METRIC_DEFINITION, "none", seq_len, seed, 4.2,
            tuple(hashlib.sha256(row.tobytes()).hexdigest() for row in token_ids),
            np.zeros(sequences, dtype=np.int32), np.arange(sequences, dtype=np.uint8) * splits // sequences,
            (Contribution("c" * 32, "random", "", f"0:{sequences}", sequences, tokens, "tests"),), token_ids,
        ),
        labels=settings,
        blocks=blocks,
        stacks=(StackData("decoder", "dense", True, "silu", np.arange(layers), channels, 0, splits, variables),),
        producer=ProducerRecord({"chanfmt": "test"}, "tests", "cpu", 1.0, 1),
    )


def random_atlas(path: Path, **arguments: int) -> Path:
    """Write `random_content` to ``path`` and return it."""
    write_atlas(random_content(**arguments), path)
    return path
