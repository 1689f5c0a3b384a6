"""How a result with uneven widths is laid out: which config it gets, and which programs read it. Pure numpy.

What programs read was taken from their code: vLLM 0.33 (`DeciLMForCausalLM`), SGLang and TensorRT-LLM (models `nemotron_nas`),
mlx-lm 0.32 (`nemotron-nas`), and llama.cpp's converter (`DeciModel`). mlx-lm and vLLM also ran results
(`bench/results/engines-2026-11-30.txt`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import UsageError
from chanfmt.base.own_names import DECI_TYPE, NARROWED_FIELD
from chanfmt.base.text import one_line, span
from surgery.planning.written import written_widths

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from surgery.planning.written import Linked

AUTO, UNIFORM, DECI, CUSTOM = "auto", "uniform", "deci", "custom"
LAYOUTS = {
    AUTO: "uniform if that pads no FFN; otherwise deci if the model is a Llama model; otherwise uniform",
    UNIFORM: "the config fields of the stock class; zero channels fill up FFNs that share a field with wider FFNs",
    DECI: "a Llama model as DeciLM (Nemotron-NAS): a width for each layer in block_configs, and a modelling file for transformers",
    CUSTOM: "a causal language model of any type as itself, with a width for each FFN in narrowed_ffns, and a modelling file",
}
"""Layouts that can be asked for, with what they are."""
WRITTEN = (UNIFORM, DECI, CUSTOM)
"""Layouts that a result can have."""
CAUSAL = ("ForCausalLM", "LMHeadModel")
"""Ends of the names of classes that predict the next token."""
LLAMA_TYPES = ("llama", "mistral", DECI_TYPE)
"""Model types whose code is Llama's. A `nemotron-nas` model is taken if it is an earlier result."""
DECI_MULTIPLE = 256
"""Multiple that every width must have if ``ffn_mult`` is to say it."""
CUSTOM_FIELDS = ("auto_map", NARROWED_FIELD)
"""Config fields that the layout `CUSTOM` sets besides widths."""
_PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "write": "down_proj"}
_LLAMA_3_VOCABULARY = 128256
_MLX_ACTIVATIONS = ("silu", "relu", "gelu", "gelu_new", "gelu_fast")
"""Values of ``hidden_act`` that mlx-lm's ``nemotron-nas`` takes."""


def needs_code(layout: str) -> bool:
    """Whether a result in ``layout`` brings a modelling file, so that transformers needs ``trust_remote_code=True``."""
    return layout in (DECI, CUSTOM)


@dataclass(frozen=True)
class LayoutRule:
    """What decides the layout of a cut, whatever its widths are.

    Attributes:
        asked: A key of `LAYOUTS`.
        obstacles: Why the model cannot be laid out as `DECI` or `CUSTOM`, by layout. A layout that is possible is left out.
        refusal: Why the model cannot be cut in any layout; empty if it can.
    """

    asked: str = UNIFORM
    obstacles: Mapping[str, str] = field(default_factory=dict)
    refusal: str = ""

    @property
    def may_be_uneven(self) -> bool:
        """Whether a cut with uneven widths gets a layout of its own."""
        return self.asked == CUSTOM or (self.asked != UNIFORM and DECI not in self.obstacles)

    def check(self) -> None:
        """Raise `UsageError` if the layout that is asked for is not possible for the model."""
        if self.refusal:
            raise UsageError(
                self.refusal, hint="cut the model that it was made from, or undo the first cut with: surgery restore"
            )
        if self.asked in self.obstacles:
            other = CUSTOM if self.asked == DECI else DECI
            ways = "" if other in self.obstacles else f"--layout {other}, or "
            raise UsageError(
                f"--layout {self.asked} is not possible: {self.obstacles[self.asked]}",
                hint=f"use {ways}--layout uniform, with --allocation uniform",
            )

    def choose(self, kept: Sequence[int], padded: Sequence[int]) -> str:
        """The layout of a cut, one of `WRITTEN`.

        Args:
            kept: Channels that each FFN keeps.
            padded: Width of each FFN in the layout `UNIFORM`.
        """
        if self.asked != AUTO:
            return self.asked
        # An old atlas does not say what sets a width. One field sets all widths of a Llama model.
        uneven = list(kept) != list(padded) or len(set(kept)) > 1
        return DECI if uneven and DECI not in self.obstacles else UNIFORM

    def widths(
        self,
        blocks: Sequence[Linked],
        kept: Sequence[int],
        multiple_of: int | None = None,
        groups: Sequence[Sequence[int]] | None = None,
    ) -> tuple[str, list[int]]:
        """The layout of a cut, and the width of each FFN in the result. The arguments are those of `written_widths`."""
        padded = written_widths(blocks, kept, multiple_of, groups)
        layout = self.choose(kept, padded)
        return layout, padded if layout == UNIFORM else layout_widths(layout, blocks, kept, multiple_of)


def layout_widths(layout: str, blocks: Sequence[Linked], kept: Sequence[int], multiple_of: int | None = None) -> list[int]:
    """Width of each FFN in a result in ``layout``, one of `WRITTEN`. The other arguments are those of `written_widths`."""
    if layout == DECI:
        return list(kept)
    # In the layout `CUSTOM`, no FFN shares a field.
    alone = [[place] for place in range(len(blocks))] if layout == CUSTOM else None
    return written_widths(blocks, kept, multiple_of, alone)


def layout_rule(asked: str, blocks: Sequence[Any], config: Mapping[str, Any]) -> LayoutRule:
    """The rule for a model with the FFNs ``blocks`` (of an atlas or a plan) and the ``config.json`` ``config``."""
    reasons = {DECI: deci_obstacle(blocks, config), CUSTOM: custom_obstacle(config)}
    refusal = (
        "the model was cut with --layout custom before, and such a result cannot be cut again" if NARROWED_FIELD in config else ""
    )
    return LayoutRule(asked, {layout: reason for layout, reason in reasons.items() if reason}, refusal)


def custom_obstacle(config: Mapping[str, Any]) -> str:
    """Why a model with this ``config.json`` cannot be laid out as `CUSTOM`, as the rest of a sentence; empty if it can."""
    if not config:
        return "the atlas does not hold the model's config"
    if config.get("model_type") == DECI_TYPE:
        return "a DeciLM model has a width for each layer already"
    if not str((config.get("architectures") or [""])[0]).endswith(CAUSAL):
        return "the model was saved without a head that predicts the next token, or with another"
    return ""


def deci_obstacle(blocks: Sequence[Any], config: Mapping[str, Any]) -> str:
    """Why a model cannot be laid out as DeciLM, as the rest of a sentence; empty if it can.

    Args:
        blocks: The model's FFNs, in an atlas (`chanfmt.format.records.Block`) or in a plan.
        config: The model's ``config.json``; empty if it is not known.
    """
    kind = config.get("model_type")
    if not config:
        return "the atlas does not hold the model's config"
    if kind not in LLAMA_TYPES:
        return f"DeciLM is a kind of Llama model, and this model is of the type {one_line(str(kind))!r}"
    if kind == DECI_TYPE and not _is_earlier_result(config):
        return "code in the model's repository defines it"
    if kind == "mistral" and config.get("sliding_window") is not None:
        return "DeciLM knows no sliding window, and the model has one"
    if not str((config.get("architectures") or [""])[0]).endswith("ForCausalLM"):
        return "DeciLM predicts tokens, and the model was saved without the head for that, or with another"
    layers, heads = config.get("num_hidden_layers"), config.get("num_attention_heads")
    groups = config.get("num_key_value_heads") or heads
    if not (isinstance(heads, int) and isinstance(groups, int) and 0 < groups <= heads and heads % groups == 0):
        return "its config does not say how many heads share keys and values"
    if [block.layer_index for block in blocks] != list(range(layers if isinstance(layers, int) else 0)):
        return "it does not have one FFN in each layer"
    for block in blocks:
        weights = {
            item.role: item.parameter for item in block.tensors if item.axis is not None and not item.role.endswith("_bias")
        }
        wanted = {role: f"layers.{block.layer_index}.mlp.{name}.weight" for role, name in _PROJECTIONS.items()}
        if block.n_experts or weights.keys() != wanted.keys() or not all(weights[role].endswith(wanted[role]) for role in wanted):
            return f"the FFN {one_line(block.module)} is not a Llama FFN"
    return ""


def _is_earlier_result(config: Mapping[str, Any]) -> bool:
    named = config.get("auto_map")
    return isinstance(named, dict) and str(named.get("AutoConfig", "")).startswith("configuration_uneven.")


def readers(config: Mapping[str, Any], widths: Sequence[int]) -> tuple[list[str], str]:
    """The programs besides transformers whose code reads a `DECI` result, and what keeps further ones from it; perhaps empty.

    Args:
        config: The model's ``config.json``, before or after the cut.
        widths: Width of every FFN in the result.
    """
    if any(width % DECI_MULTIPLE for width in widths):
        return ["vLLM"], (
            f"SGLang, TensorRT-LLM and mlx-lm read widths that are multiples of {DECI_MULTIPLE} only (--multiple-of {DECI_MULTIPLE})"
        )
    heads, hidden = config.get("num_attention_heads") or 1, config.get("hidden_size") or 0
    square = config.get("head_dim") in (None, hidden // heads)
    biased = bool(config.get("attention_bias") or config.get("mlp_bias"))
    active = config.get("hidden_act", "silu") in _MLX_ACTIVATIONS
    names = [
        "vLLM",
        *([] if biased else ["SGLang", "TensorRT-LLM"]),
        *(["mlx-lm"] if square and active else []),
        *(["llama.cpp's converter"] if square and not biased and config.get("vocab_size") == _LLAMA_3_VOCABULARY else []),
    ]
    return names, ""


def layout_text(layout: str, config: Mapping[str, Any], widths: Sequence[int]) -> str:
    """A layout in one line, for people."""
    if layout == UNIFORM:
        return f"{UNIFORM}: the config fields of the stock class"
    if layout == CUSTOM:
        return f"{CUSTOM}: the stock class with a modelling file, which transformers loads with trust_remote_code=True"
    names, limit = readers(config, widths)
    return (
        f"{DECI}: DeciLM with a modelling file, which transformers loads with trust_remote_code=True; read by {', '.join(names)}"
        + (f"; {limit}" if limit else "")
    )


def layout_notes(layout: str, rule: LayoutRule, kept: Sequence[int], widths: Sequence[int]) -> tuple[str, ...]:
    """What a user should know of the layout before the cut."""
    padded = sum(width > count for count, width in zip(kept, widths, strict=True))
    ffns = f"{padded} FFN{'' if padded == 1 else 's'} would be padded with zero channels"
    loads = "it loads with trust_remote_code=True, which runs a modelling file in its directory"
    if layout == CUSTOM:
        notes = [f"the result gets a class of its own: {loads}, and no other program reads it"]
        return tuple(notes + ([f"{ffns}: no config field gives them such widths"] if padded else []))
    if layout == DECI:
        if rule.asked == DECI or len(set(kept)) == 1:
            return (f"the result is laid out as DeciLM: {loads}",)
        return (
            f"the widths are uneven, so the result is laid out as DeciLM: {loads}; for a result that stock code loads, use "
            "--allocation uniform or --layout uniform",
        )
    if padded and rule.asked == AUTO:
        other = "" if CUSTOM in rule.obstacles else "; --layout custom pads no FFN that has a field"
        return (
            f"{ffns}: stock code gives widths of their own to no FFN of a group, and --layout deci is not possible, because "
            f"{rule.obstacles.get(DECI)}{other}",
        )
    return ()


def custom_changes(widths: Sequence[int]) -> tuple[str, ...]:
    """The config fields that the layout `CUSTOM` adds, in words.

    Args:
        widths: Widths that the list gives.
    """
    return (f"{len(widths)} widths of {span(str(min(widths)), str(max(widths)))} in {NARROWED_FIELD}",) if widths else ()


def deci_changes(config: Mapping[str, Any], widths: Sequence[int]) -> tuple[str, ...]:
    """The config fields that the layout `DECI` changes, in words."""
    kind = one_line(str(config.get("model_type")), 40)
    return (
        f"{len(widths)} widths of {span(str(min(widths)), str(max(widths)))} in block_configs",
        *([f"model_type {kind} to {DECI_TYPE}"] if kind != DECI_TYPE else []),
    )
