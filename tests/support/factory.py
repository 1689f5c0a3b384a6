"""Atlases made from random numbers, for tests that need a file and not a model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np

from chanfmt.algebra import labels, metrics
from chanfmt.format import schema
from chanfmt.format.records import (
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
from chanfmt.format.writer import write_atlas

if TYPE_CHECKING:
    from pathlib import Path


_NEAREST = ("redundancy_partner", "write_dimension", "redundancy_pair", "write_share")
_FROM_WEIGHTS = (
    "label",
    "connectivity",
    "redundancy",
    "redundancy_null",
    "protection",
    "read_connectivity",
    "write_norm",
    "write_norm_l1",
    "gate_norm",
    "up_norm",
    "wanda_group",
)


def with_fields(content: AtlasContent, fields: dict[str, tuple[str, int]], parameters: int = 72) -> AtlasContent:
    """``content`` with what sets the widths: stack to field and factor; each channel has so many ``parameters``."""
    blocks = []
    for block in content.blocks:
        name, factor = fields[block.stack]
        blocks.append(dataclasses.replace(block, width_field=name, width_factor=factor, channel_parameters=parameters))
    total = sum(parameters * block.n_channels * max(1, block.n_experts) for block in blocks)
    model = dataclasses.replace(content.model, parameters=total + 1000)
    return dataclasses.replace(content, blocks=tuple(blocks), model=model)


def random_content(
    layers: int = 4, channels: int = 96, hidden: int = 24, seed: int = 0, calibration_seed: int | None = None
) -> AtlasContent:
    """A self-consistent dense gated atlas: every metric follows from the sums and random weights.

    Atlases that differ in ``calibration_seed`` alone are of one model, measured on different sequences.
    """
    random = np.random.default_rng(seed)
    text = random if calibration_seed is None else np.random.default_rng((seed, calibration_seed))
    sequences, seq_len, splits = 16, 32, schema.SPLITS
    tokens = sequences * seq_len
    settings = LabelSettings(support_size=8)
    shape = (layers, channels)
    scale = np.exp(random.normal(0, 2, shape))
    split_q2 = text.gamma(1.0, 1.0, (splits, *shape)) * scale
    sum_q2 = split_q2.sum(axis=0)
    sum_u2 = text.gamma(2.0, 1.0, shape) * tokens
    variables: dict[str, np.ndarray] = {
        "tokens": np.full(layers, tokens),
        "tokens_split": np.full((splits, layers), tokens // splits),
        "sum_u": text.normal(0, 0.1, shape) * np.sqrt(sum_u2 * tokens),
        "sum_u2": sum_u2,
        "sum_s2": sum_q2 / sum_u2 * tokens,
        "sum_q": text.normal(0, 0.1, shape) * np.sqrt(sum_q2 * tokens),
        "sum_abs_q": 0.7 * np.sqrt(sum_q2 * tokens),
        "sum_q2": sum_q2,
        "sum_q2_split": split_q2,
        "max_abs_u": 4 * np.sqrt(sum_u2 / tokens),
        "redundancy_tokens": np.full(layers, tokens * 7 // 8),
        "core_covered": np.ones(layers),
    }
    variables |= metrics.derive_metrics(variables, variables["tokens"])
    variables |= {name: np.zeros(shape) for name in _FROM_WEIGHTS}
    sizes = labels.support_sizes(hidden, settings.support_size)
    variables["connectivity_at"] = np.zeros((len(sizes), *shape))
    variables |= {
        name: np.zeros((schema.NEAREST, *shape), dtype=np.int32 if name in _NEAREST[:2] else np.float32) for name in _NEAREST
    }
    support = None
    for row in range(layers):
        found, support, _ = _label(random, variables["lp"][row], settings, hidden, support)
        for name, values in found.items():
            variables[name][..., row, :] = values
    blocks = tuple(
        Block(
            index,
            index,
            "decoder",
            f"model.layers.{index}.mlp",
            "decoder",
            index,
            channels,
            0,
            tuple(
                TensorSlice(
                    role, f"model.layers.{index}.mlp.{name}.weight", f"model.layers.{index}.mlp.{name}.weight", axis, 0, channels
                )
                for role, name, axis in (("gate", "gate_proj", 0), ("up", "up_proj", 0), ("write", "down_proj", 1))
            ),
        )
        for index in range(layers)
    )
    token_ids = text.integers(0, 100, (sequences, seq_len)).astype("<i4")
    contribution = "c" * 32 if calibration_seed is None else hashlib.sha256(token_ids.tobytes()).hexdigest()[:32]
    config = json.dumps({"model_type": "llama", "intermediate_size": channels, "hidden_size": hidden})
    return AtlasContent(
        title="importance atlas of tests/random",
        model=ModelRecord(
            "tests/random",
            "",
            "local",
            "llama",
            ("LlamaForCausalLM",),
            config,
            hashlib.sha256(config.encode()).hexdigest(),
            "float32",
            12345,
            "f" * 64,
        ),
        calibration=CalibrationRecord(
            schema.LOSSES["next-token"],
            schema.METRIC_DEFINITION,
            "none",
            seq_len,
            seed,
            4.2,
            tuple(hashlib.sha256(row.tobytes()).hexdigest() for row in token_ids),
            np.zeros(sequences, dtype=np.int32),
            np.arange(sequences, dtype=np.uint8) * splits // sequences,
            (Contribution(contribution, "random", "", f"0:{sequences}", sequences, tokens, "tests"),),
            token_ids,
        ),
        labels=settings,
        core_rho=settings.rho,
        blocks=blocks,
        stacks=(StackData("decoder", "dense", True, "silu", np.arange(layers), channels, 0, splits, variables, sizes),),
        producer=ProducerRecord({"chanfmt": "test"}, "tests", "cpu", 1.0, 1),
    )


def with_other_tokens(content: AtlasContent) -> AtlasContent:
    """``content`` as if it were measured on tokens that `random_content` does not have, so that the two can be merged."""
    calibration = content.calibration
    tokens = calibration.token_ids + 1000
    return dataclasses.replace(
        content,
        calibration=dataclasses.replace(
            calibration,
            token_ids=tokens,
            sequence_sha256=tuple(hashlib.sha256(row.tobytes()).hexdigest() for row in tokens),
            contributions=(dataclasses.replace(calibration.contributions[0], id="d" * 32),),
        ),
    )


def random_atlas(path: Path, **arguments: int) -> Path:
    """Write `random_content` to ``path`` and return it."""
    write_atlas(random_content(**arguments), path)
    return path


def moe_content(
    layers: int = 3,
    experts: int = 4,
    channels: int = 24,
    dense_channels: int = 96,
    hidden: int = 24,
    seed: int = 0,
    calibration_seed: int | None = None,
) -> AtlasContent:
    """A self-consistent atlas of a model whose first layer is dense and whose ``layers`` others hold experts.

    Every token goes to two of the experts, some more often than others. Expert 1 of the second layer gets
    none: its sums are 0, what follows from them is NaN, and it has no labels.
    """
    content = random_content(layers=1, channels=dense_channels, hidden=hidden, seed=seed, calibration_seed=calibration_seed)
    random = np.random.default_rng((seed, 1))
    text = random if calibration_seed is None else np.random.default_rng((seed, 1, calibration_seed))
    settings, calibration, splits = content.labels, content.calibration, schema.SPLITS
    split_of = np.repeat(calibration.split_of, calibration.seq_len)
    tokens_split = np.zeros((splits, layers, experts), dtype=np.int64)
    for row in range(layers):
        preference = text.normal(0, 1, experts) + text.gumbel(0, 1, (len(split_of), experts))
        if row == 0:
            preference[:, 1] = -np.inf
        chosen = np.argsort(-preference, axis=1)[:, :2]
        np.add.at(tokens_split, (split_of[:, None], row, chosen), 1)
    tokens = tokens_split.sum(axis=0)
    count = tokens[..., None]
    shape = (layers, experts, channels)
    split_q2 = text.gamma(1.0, 1.0, (splits, *shape)) * np.exp(text.normal(0, 2, shape)) * (tokens_split[..., None] > 0)
    sum_q2 = split_q2.sum(axis=0)
    mean_u2 = text.gamma(2.0, 1.0, shape)
    sum_u2 = mean_u2 * count
    variables: dict[str, np.ndarray] = {
        "tokens": tokens,
        "tokens_split": tokens_split,
        "sum_u": text.normal(0, 0.1, shape) * np.sqrt(sum_u2 * count),
        "sum_u2": sum_u2,
        "sum_s2": sum_q2 / mean_u2,
        "sum_q": text.normal(0, 0.1, shape) * np.sqrt(sum_q2 * count),
        "sum_abs_q": 0.7 * np.sqrt(sum_q2 * count),
        "sum_q2": sum_q2,
        "sum_q2_split": split_q2,
        # One token's u^2 cannot exceed the sum of all.
        "max_abs_u": np.sqrt(np.minimum(16, count) * mean_u2),
        "redundancy_tokens": tokens - tokens_split[0],
        "core_covered": np.where(tokens > 0, 1.0, np.nan),
    }
    variables |= metrics.derive_metrics(variables, tokens)
    variables |= {name: np.zeros(shape) for name in _FROM_WEIGHTS}
    sizes = labels.support_sizes(hidden, settings.support_size)
    variables["connectivity_at"] = np.zeros((len(sizes), *shape))
    variables |= {
        name: np.zeros((schema.NEAREST, *shape), dtype=np.int32 if name in _NEAREST[:2] else np.float32) for name in _NEAREST
    }
    # The write support of a layer with several FFNs comes from the supernodes of all these FFNs.
    support = None
    for row in range(layers):
        written = []
        for expert in range(experts):
            found, _, core_writes = _label(random, variables["lp"][row, expert], settings, hidden, support)
            written.append(core_writes)
            for name, values in found.items():
                variables[name][..., row, expert, :] = values
        joint = np.concatenate(written, axis=1)
        support = labels.write_support(joint, np.arange(joint.shape[1]), settings.support_size)
    blocks = [content.blocks[0]]
    for row in range(layers):
        module = f"model.layers.{row + 1}.mlp.experts"
        tensors = tuple(
            TensorSlice(role, f"{module}.{expert}.{name}.weight", f"{module}.{expert}.{name}.weight", axis, 0, channels)
            for expert in range(experts)
            for role, name, axis in (("gate", "gate_proj", 0), ("up", "up_proj", 0), ("write", "down_proj", 1))
        )
        blocks.append(Block(row + 1, row + 1, "decoder", module, "decoder.experts", row, channels, experts, tensors))
    config = json.dumps(
        {
            "model_type": "qwen3_moe",
            "intermediate_size": dense_channels,
            "moe_intermediate_size": channels,
            "hidden_size": hidden,
            "num_hidden_layers": layers + 1,
            "num_experts": experts,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [0],
        }
    )
    return dataclasses.replace(
        content,
        title="importance atlas of tests/experts",
        model=dataclasses.replace(
            content.model,
            id="tests/experts",
            model_type="qwen3_moe",
            architectures=("Qwen3MoeForCausalLM",),
            config=config,
            config_sha256=hashlib.sha256(config.encode()).hexdigest(),
            fingerprint="e" * 64,
        ),
        blocks=tuple(blocks),
        stacks=(
            *content.stacks,
            StackData(
                "decoder.experts", "experts", True, "silu", np.arange(1, layers + 1), channels, experts, splits, variables, sizes
            ),
        ),
    )


def moe_atlas(path: Path, **arguments: int) -> Path:
    """Write `moe_content` to ``path`` and return it."""
    write_atlas(moe_content(**arguments), path)
    return path


def _label(
    random: np.random.Generator, lp: np.ndarray, settings: LabelSettings, hidden: int, previous_support: np.ndarray | None
) -> tuple[dict[str, np.ndarray], np.ndarray | None, np.ndarray]:
    """`_FROM_WEIGHTS` of one FFN with random weights, its write support, and its supernodes' write vectors.

    An FFN without tokens (``lp`` is NaN) has norms, but no labels, no support and nothing relative to them.
    """
    channels = len(lp)
    write, gate, up = (random.normal(0, 1, size) for size in ((hidden, channels), (channels, hidden), (channels, hidden)))
    redundancy = random.gamma(1.0, 0.01, channels)
    null = random.gamma(1.0, 0.002, channels)
    wanda = random.gamma(2.0, 1.0, channels)
    found: dict[str, np.ndarray] = {
        "write_norm": np.linalg.norm(write, axis=0),
        "write_norm_l1": np.abs(write).sum(axis=0),
        "gate_norm": np.linalg.norm(gate, axis=1),
        "up_norm": np.linalg.norm(up, axis=1),
        "read_connectivity": np.full(channels, np.nan)
        if previous_support is None
        else labels.read_connectivity([gate, up], previous_support),
    }
    if np.isnan(lp).all():
        nothing = np.full(channels, np.nan)
        found["connectivity_at"] = np.full((len(labels.support_sizes(hidden, settings.support_size)), channels), np.nan)
        found |= dict.fromkeys(("connectivity", "redundancy", "redundancy_null", "wanda_group"), nothing)
        found |= {"label": np.zeros(channels), "protection": np.ones(channels)}
        for place, name in enumerate(_NEAREST):
            found[name] = np.full((schema.NEAREST, channels), -1 if place < 2 else np.nan)
        return found, None, write[:, :0]
    core = labels.supernodes(lp, settings.rho)
    sizes = labels.support_sizes(hidden, settings.support_size)
    conn = labels.connectivity(write, core, sizes).astype(np.float32)
    redundancy = redundancy.astype(np.float32)
    chosen = conn[sizes.index(settings.support_size)]
    label, factor = labels.label_ffn(lp, chosen, redundancy, settings)
    found |= {
        "connectivity_at": conn,
        "connectivity": chosen,
        "redundancy": redundancy,
        "redundancy_null": null,
        "label": label,
        "protection": factor,
        "wanda_group": wanda,
    }
    support = labels.write_support(write, core, settings.support_size)
    found["write_dimension"], found["write_share"] = labels.written_dimensions(write, support, schema.NEAREST)
    found["redundancy_partner"], found["redundancy_pair"] = labels.nearest_in_core(
        random.uniform(0.01, 0.4, (channels, len(core))), core, schema.NEAREST
    )
    return found, support, write[:, core]
