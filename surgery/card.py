"""The model card of a cut checkpoint."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from chanfmt.console import printable
from surgery.methods import METHODS
from surgery.recovery.options import RECOVERIES
from surgery.report import layer_rows, summary_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from surgery.report import Report

TAGS = ("pruned", "structured-pruning", "ffn-pruning", "chanfmt")


def model_card(report: Report, name: str) -> str:
    """Markdown with front matter: what the model is, what was removed, how it was checked, how to load it.

    Args:
        name: Name of the output directory.
    """
    plan = report.plan
    front = [*([f"base_model: {json.dumps(plan.model.id)}"] if plan.model.source == "hub" else []),
             "library_name: transformers", "tags:", *(f"- {tag}" for tag in TAGS)]
    method = METHODS.get(plan.method)
    formula = f" ({method.description}; {method.source})" if method else ""
    return "\n".join([
        "---", *front, "---", "",
        f"# {_inline(name)}", "",
        f"`{_inline(plan.model.id)}` with {plan.sparsity_reached:.1%} of its feed-forward (FFN) channels removed. "
        f"{_form(report)} Stock transformers code loads the result. {_weights(report)}", "",
        "## What was removed", "",
        f"The channels with the {'highest' if plan.invert else 'lowest'} score were removed, by the method "
        f"`{plan.method}`{formula}. The scores come from an importance atlas measured on: {_inline(plan.calibration)}.", "",
        _table(["", ""], summary_rows(plan, report)), "",
        "LP is the loss proxy 1/2 E[(u dL/du)^2]; supernodes are the channels that lead each layer by it. LP mass kept "
        "is a proxy for the loss, not a perplexity: evaluate the model on your own data before you use it.", "",
        "<details><summary>Every layer</summary>", "", _table(*layer_rows(plan)), "", "</details>", "",
        "`kept_channels.safetensors` lists the channels that stayed; `surgery.json` says how the model was made.", "",
        "## Load", "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        f"model = AutoModelForCausalLM.from_pretrained({json.dumps(_inline(name))})",
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(_inline(name))})",
        "```", "",
    ])


def _form(report: Report) -> str:
    """How the removal shows in the files."""
    fields = ", ".join(f"`{_inline(field)}` is {_inline(str(change.after))}" for field, change in report.config_fields.items())
    if not report.padded:
        return f"The channels are gone, not zeroed: {fields} in `config.json`."
    zeros = f"Stock code knows no width of their own for {len(report.padded)} FFNs, which are filled up with zero channels."
    return f"{zeros} {fields[:1].upper()}{fields[1:]} in `config.json`." if fields else zeros


def _weights(report: Report) -> str:
    if report.recovery is None:
        return "No weight that stayed was changed, and nothing was trained."
    what = RECOVERIES[report.recovery.method]
    return f"{what[:1].upper()}{what[1:]}; no gradient was taken."


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(_inline(cell) for cell in line) + " |" for line in lines)


def _inline(text: str) -> str:
    # Names come from files: they may not open markup of their own.
    flat = " ".join(printable(text).split())
    return flat.replace("|", "/").replace("`", "'").replace("<", "(").replace(">", ")")
