"""Tiny atlases for the conformance files. Every sum is taken over random tokens, so that all numbers fit together."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass

import numpy as np

from chanfmt.algebra import labels
from chanfmt.format import schema
from chanfmt.format.records import (
    AtlasContent,
    Block,
    CalibrationRecord,
    Contribution,
    LabelSettings,
    ModelRecord,
    ProducerRecord,
    SpecialTokens,
    StackData,
    TensorSlice,
)

SEQUENCES, SEQ_LEN, SPLITS = 4, 4, 2
SETTINGS = LabelSettings(rho=0.25, eta=0.5, support_size=4, redundancy_top_k=1)
NEAREST = {"redundancy_partner": "redundancy_pair", "write_dimension": "write_share"}
OF_REDUNDANCY = ("redundancy", "redundancy_null", "redundancy_tokens", "core_covered", "redundancy_partner", "redundancy_pair")
OF_WEIGHTS = ("connectivity", "connectivity_at", "read_connectivity", "write_dimension", "write_share")
UNMERGEABLE = (*OF_REDUNDANCY, *OF_WEIGHTS, "wanda_group")


@dataclass(frozen=True)
class Kind:
    """FFNs to stack. ``share`` of the tokens reach each; ``idle`` ones, (row, expert), get none."""

    name: str = "decoder"
    layers: tuple[int, ...] = (0, 1)
    channels: int = 8
    kind: str = "dense"
    place: str = "decoder"
    gated: bool = True
    experts: int = 0
    bias: bool = False
    share: float = 1.0
    idle: tuple[tuple[int, int], ...] = ()


DENSE = Kind()
MOE = (
    Kind(layers=(0,)),
    Kind("decoder.experts", (1, 2), 4, kind="experts", experts=3, share=0.6, idle=((0, 1),)),
    Kind("decoder.shared", (1, 2), 6, kind="shared"),
)


def content(
    *kinds: Kind,
    settings: LabelSettings = SETTINGS,
    core_rho: float | None = None,
    without: tuple[str, ...] = (),
    dropped: tuple[str, ...] = (),
    tokens_stored: bool = True,
    contributions: int = 1,
    inputs: str = "",
    special: tuple[SpecialTokens, SpecialTokens] | None = None,
    edit: object = None,
    title: str = "conformance",
    status: str = "complete",
) -> AtlasContent:
    """A small atlas that follows all the rules.

    Args:
        without: Variables that are not there.
        dropped: Variables that are not there, and that ``dropped`` names.
        inputs: Arrays that the model was given in place of text.
        special: Special tokens around every sequence, and those that the tokenizer adds; None for an older file.
        edit: Function of u and s, (token, channel), of an FFN, that changes them in place.
    """
    kinds = kinds or (DENSE,)
    random = np.random.default_rng(len(kinds))
    calibration = _calibration(random, tokens_stored, contributions, inputs, special)
    split_of = np.repeat(calibration.split_of, SEQ_LEN)
    stacks, blocks = [], []
    for kind in kinds:
        ffns = [
            _ffn(random, kind, split_of, settings, edit, (row, expert) in kind.idle)
            for row in range(len(kind.layers))
            for expert in range(kind.experts or 1)
        ]
        leading = (len(kind.layers), *([kind.experts] if kind.kind == "experts" else []))
        arrays = {}
        for name, first in ffns[0].items():
            # FFNs come before the channels, and after splits, support sizes or places if there are any.
            tail = np.ndim(first) - (name in ("tokens_split", "sum_q2_split", "connectivity_at", *NEAREST, *NEAREST.values()))
            stacked = np.stack([ffn[name] for ffn in ffns], axis=-1 - tail)
            shape = stacked.shape
            axis = stacked.ndim - 1 - tail
            arrays[name] = stacked.reshape(*shape[:axis], *leading, *shape[axis + 1 :])
        arrays = {name: values for name, values in arrays.items() if name not in (*without, *dropped)}
        _label(arrays, settings, leading, kind.channels)
        supports = (2, 4) if "connectivity_at" in arrays else ()
        arrays = {name: values for name, values in arrays.items() if name not in (*without, *dropped)}
        stacks.append(
            StackData(
                kind.name,
                kind.kind,
                kind.gated,
                "silu",
                np.array(kind.layers),
                kind.channels,
                kind.experts,
                SPLITS,
                arrays,
                supports,
            )
        )
        blocks += [_block(kind, row) for row in range(len(kind.layers))]
    blocks.sort(key=lambda block: (block.place != "encoder", block.layer_index))
    blocks = [dataclasses.replace(block, index=index) for index, block in enumerate(blocks)]
    config = json.dumps({"model_type": "llama", "hidden_size": 8})
    return AtlasContent(
        title=title,
        model=ModelRecord(
            "conformance/tiny",
            "",
            "local",
            "llama",
            ("LlamaForCausalLM",),
            config,
            hashlib.sha256(config.encode()).hexdigest(),
            "float32",
            1000,
            "f" * 64,
        ),
        calibration=calibration,
        labels=settings,
        core_rho=settings.rho if core_rho is None else core_rho,
        blocks=tuple(blocks),
        stacks=tuple(stacks),
        producer=ProducerRecord({"conformance": "1"}, "generate.py", "cpu", 1.0, 1, ({"command": "generate"},)),
        status=status,
        dropped=dropped,
    )


def _calibration(
    random: np.random.Generator,
    stored: bool,
    contributions: int,
    inputs: str,
    special: tuple[SpecialTokens, SpecialTokens] | None,
) -> CalibrationRecord:
    tokens = random.integers(0, 100, (SEQUENCES, SEQ_LEN)).astype("<i4")
    if special is not None:
        before, after = special[0].before, special[0].after
        tokens[:, : len(before)], tokens[:, SEQ_LEN - len(after) :] = before, after
    digests = [hashlib.sha256(row.tobytes()).hexdigest() for row in tokens]
    order = np.argsort(digests)
    # Contributions take turns, and each has sequences in every split.
    source = np.arange(SEQUENCES, dtype=np.int32) % contributions
    split = (np.arange(SEQUENCES) * SPLITS // SEQUENCES).astype(np.uint8)
    count = SEQUENCES // contributions
    return CalibrationRecord(
        schema.LOSSES["labels" if inputs else "next-token"],
        schema.METRIC_DEFINITION,
        "" if inputs else "none",
        SEQ_LEN,
        0,
        4.25,
        tuple(digests[row] for row in order),
        source,
        split,
        tuple(
            Contribution(
                str(index) * 32,
                "random",
                "",
                f"{index * count}:{(index + 1) * count}",
                count,
                count * SEQ_LEN,
                "generate.py",
                inputs,
            )
            for index in range(contributions)
        ),
        tokens[order] if stored else None,
        *(special or ()),
    )


def _ffn(
    random: np.random.Generator, kind: Kind, split_of: np.ndarray, settings: LabelSettings, edit: object, idle: bool
) -> dict[str, np.ndarray]:
    """The variables of one FFN except its labels: (channel,), per split (split, channel), or scalars."""
    shape = (len(split_of), kind.channels)
    u = random.normal(0, 1, shape).astype(np.float32).astype(float)
    s = (random.normal(0, 1, shape) * np.exp(random.normal(0, 1, kind.channels))).astype(np.float32).astype(float)
    if edit is not None:
        edit(u, s)
    reached = np.zeros(len(u), dtype=bool) if idle else random.random(len(u)) < kind.share
    u, s, splits = u[reached], s[reached], split_of[reached]
    q, n = u * s, max(1, len(u))
    per_split = np.stack([(q[splits == split] ** 2).sum(axis=0) for split in range(SPLITS)])
    found = {
        "tokens": np.int64(len(u)),
        "tokens_split": np.bincount(splits, minlength=SPLITS),
        "sum_u": u.sum(axis=0),
        "sum_u2": (u**2).sum(axis=0),
        "sum_s2": (s**2).sum(axis=0),
        "sum_q": q.sum(axis=0),
        "sum_abs_q": np.abs(q).sum(axis=0),
        "sum_q2": per_split.sum(axis=0),
        "sum_q2_split": per_split,
        "max_abs_u": np.abs(u).max(axis=0, initial=0),
    }
    shares = np.sort(random.random((2, kind.channels)).astype(np.float32), axis=0)
    redundancy, null = random.gamma(1, 0.01, (2, kind.channels))
    on_tokens = {
        "lp": found["sum_q2"] / n / 2,
        "lp_factored": found["sum_u2"] / n * (found["sum_s2"] / n) / 2,
        "activation_power": found["sum_u2"] / n,
        "curvature": found["sum_s2"] / n,
        "taylor": found["sum_abs_q"] / n,
        "connectivity": shares[(2, 4).index(settings.support_size)],
        "connectivity_at": shares,
        "redundancy": redundancy,
        "redundancy_null": null,
        "wanda_group": random.gamma(2, 1, kind.channels),
        "core_covered": np.float32(1),
    }
    nearest, own = {}, np.random.default_rng(kind.channels)  # The other numbers are as they were before these came.
    for (name, value), most in zip(NEAREST.items(), (kind.channels, 8), strict=True):
        ids = np.array([own.permutation(most)[:3] for _ in range(kind.channels)], dtype=np.int32).T
        ids[2, ::2] = -1
        nearest[name] = np.full_like(ids, -1) if idle else ids
        on_tokens[value] = np.where(ids < 0, np.nan, np.sort(own.random(ids.shape) / 8, axis=0)[::-1])
    if idle:
        on_tokens = {name: np.full(np.shape(values), np.nan) for name, values in on_tokens.items()}
    for name in ("write_norm", "up_norm", *(["gate_norm"] if kind.gated else [])):
        found[name] = random.gamma(2, 1, kind.channels)
    found["write_norm_l1"] = 2 * found["write_norm"]
    found["redundancy_tokens"] = np.int64((splits > 0).sum())
    found["read_connectivity"] = random.random(kind.channels)
    return found | nearest | {name: np.asarray(values, dtype=np.float32) for name, values in on_tokens.items()}


def _label(arrays: dict[str, np.ndarray], settings: LabelSettings, leading: tuple[int, ...], channels: int) -> None:
    shape = (*leading, channels)
    arrays["label"], arrays["protection"] = np.zeros(shape, dtype=np.uint8), np.ones(shape, dtype=np.float32)
    for ffn in np.ndindex(leading):
        known = [arrays[name][ffn] if name in arrays else None for name in (settings.score, "connectivity", "redundancy")]
        if known[0] is not None:
            arrays["label"][ffn], arrays["protection"][ffn] = labels.label_ffn(*known, settings)


def _block(kind: Kind, row: int) -> Block:
    module = f"{kind.place}.layers.{kind.layers[row]}.mlp{'.' + kind.kind if kind.kind != 'dense' else ''}"
    slices = []
    for expert in range(kind.experts or 1):
        for role in (*(["gate"] if kind.gated else []), "up", "write"):
            name = f"{module}.{expert}.{role}" if kind.kind == "experts" else f"{module}.{role}"
            slices.append(TensorSlice(role, f"{name}.weight", f"{name}.weight", int(role == "write"), 0, kind.channels))
            if kind.bias:
                axis, stop = (None, 0) if role == "write" else (0, kind.channels)
                slices.append(TensorSlice(f"{role}_bias", f"{name}.bias", f"{name}.bias", axis, 0, stop))
    return Block(0, kind.layers[row], kind.place, module, kind.name, row, kind.channels, kind.experts, tuple(slices))
