"""How a result with uneven widths is laid out: which config it gets, and which programs read it. Pure numpy.

What programs read was taken from their code: vLLM 0.33 (`DeciLMForCausalLM`), SGLang and TensorRT-LLM (models `nemotron_nas`),
mlx-lm 0.32 (`nemotron-nas`), and llama.cpp's converter (`DeciModel`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import UsageError
from chanfmt.base.text import one_line
from surgery.planning.written import written_widths

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from surgery.planning.written import Linked

AUTO, UNIFORM, DECI = "auto", "uniform", "deci"
LAYOUTS = {
    AUTO: "uniform if that pads no FFN; otherwise deci if the model is a Llama model; otherwise uniform",
    UNIFORM: "the config fields of the stock class; zero channels fill up FFNs that share a field with wider FFNs",
    DECI: "a Llama model as DeciLM (Nemotron-NAS): a width for each layer in block_configs, and a modelling file for transformers",
}
"""Layouts that can be asked for, with what they are."""
LLAMA_TYPES = ("llama", "mistral", "nemotron-nas")
"""Model types whose code is Llama's. A `nemotron-nas` model is taken if it is an earlier result."""
DECI_MULTIPLE = 256
"""Multiple that every width must have if ``ffn_mult`` is to say it."""
_PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "write": "down_proj"}
_LLAMA_3_VOCABULARY = 128256


@dataclass(frozen=True)
class LayoutRule:
    """What decides the layout of a cut, whatever its widths are.

    Attributes:
        asked: A key of `LAYOUTS`.
        obstacle: Why the model cannot be laid out as `DECI`; empty if it can.
    """

    asked: str = UNIFORM
    obstacle: str = ""

    @property
    def may_be_deci(self) -> bool:
        """Whether a cut with uneven widths is laid out as `DECI`."""
        return self.asked != UNIFORM and not self.obstacle

    def check(self) -> None:
        """Raise `UsageError` if the layout that is asked for is not possible for the model."""
        if self.asked == DECI and self.obstacle:
            raise UsageError(
                f"--layout deci is not possible: {self.obstacle}", hint="use --layout uniform, with --allocation uniform"
            )

    def choose(self, kept: Sequence[int], padded: Sequence[int]) -> str:
        """The layout of a cut: `UNIFORM` or `DECI`.

        Args:
            kept: Channels that each FFN keeps.
            padded: Width of each FFN in the layout `UNIFORM`.
        """
        if self.asked != AUTO:
            return self.asked
        # An old atlas does not say what sets a width. One field sets all widths of a Llama model.
        uneven = list(kept) != list(padded) or len(set(kept)) > 1
        return DECI if uneven and not self.obstacle else UNIFORM

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
        return layout, list(kept) if layout == DECI else padded


def layout_rule(asked: str, blocks: Sequence[Any], config: Mapping[str, Any]) -> LayoutRule:
    """The rule for a model with the FFNs ``blocks`` (of an atlas or a plan) and the ``config.json`` ``config``."""
    return LayoutRule(asked, deci_obstacle(blocks, config))


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
    if kind == "nemotron-nas" and not _is_earlier_result(config):
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
    names = [
        "vLLM",
        *([] if biased else ["SGLang", "TensorRT-LLM"]),
        *(["mlx-lm"] if square else []),
        *(["llama.cpp's converter"] if square and not biased and config.get("vocab_size") == _LLAMA_3_VOCABULARY else []),
    ]
    return names, ""


def layout_text(layout: str, config: Mapping[str, Any], widths: Sequence[int]) -> str:
    """A layout in one line, for people."""
    if layout != DECI:
        return f"{UNIFORM}: the config fields of the stock class"
    names, limit = readers(config, widths)
    return (
        f"{DECI}: DeciLM with a modelling file, which transformers loads with trust_remote_code=True; read by {', '.join(names)}"
        + (f"; {limit}" if limit else "")
    )


def layout_notes(layout: str, rule: LayoutRule, kept: Sequence[int], widths: Sequence[int]) -> tuple[str, ...]:
    """What a user should know of the layout before the cut."""
    padded = sum(width > count for count, width in zip(kept, widths, strict=True))
    if layout == DECI:
        loads = "it loads with trust_remote_code=True, which runs a modelling file in its directory"
        if rule.asked == DECI or len(set(kept)) == 1:
            return (f"the result is laid out as DeciLM: {loads}",)
        return (
            f"the widths are uneven, so the result is laid out as DeciLM: {loads}; for a result that stock code loads, use "
            "--allocation uniform or --layout uniform",
        )
    if padded and rule.asked == AUTO:
        return (
            f"{padded} FFN{'' if padded == 1 else 's'} would be padded with zero channels: stock code gives widths of their own to "
            f"no FFN of a group, and --layout deci is not possible, because {rule.obstacle}",
        )
    return ()


def deci_changes(config: Mapping[str, Any], widths: Sequence[int]) -> tuple[str, ...]:
    """The config fields that the layout `DECI` changes, in words."""
    low, high = min(widths), max(widths)
    span = f"{low}" if low == high else f"{low} to {high}"
    kind = one_line(str(config.get("model_type")), 40)
    return (
        f"{len(widths)} widths of {span} in block_configs",
        *([f"model_type {kind} to nemotron-nas"] if kind != "nemotron-nas" else []),
    )
