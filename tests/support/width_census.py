"""Models with the FFN widths of released models, on small hidden sizes: do all widths shrink as the plan says?

    python -m tests.support.width_census [--out docs/models-widths.md] [NAME...]

Each instance is measured and pruned at several sparsities with the default multiple. `surgery prune` checks the result: stock
transformers loads it, and its logits are those of the masked dense model. The parameters that the plan announces, those that
the files hold, and those of the removed channels are compared.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support import zoo
from tests.support.census import build_atlas
from tests.support.tiny import tiny_tokenizer

SPARSITIES = (0.05, 0.3, 0.6, 0.95)


@dataclass(frozen=True)
class Instance:
    """A model type with the widths of a released model.

    Attributes:
        model_type: In the family of causal models.
        fields: Config fields to set.
    """

    model_type: str
    fields: dict[str, Any]


INSTANCES: dict[str, Instance] = {
    "1408 x 2": Instance("deepseek_v3", {"moe_intermediate_size": 1408, "n_shared_experts": 2, "intermediate_size": 10944}),
    "1536 x 2": Instance("deepseek_v2", {"moe_intermediate_size": 1536, "n_shared_experts": 2, "intermediate_size": 12288}),
    "1408 and 5632": Instance("qwen2_moe", {"moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632}),
    "768": Instance("qwen3_moe", {"moe_intermediate_size": 768}),
    "5461": Instance("llama", {"intermediate_size": 5461}),
    "18944": Instance("qwen2", {"intermediate_size": 18944}),
    "27648": Instance("qwen2", {"intermediate_size": 27648}),
    "prime": Instance("llama", {"intermediate_size": 7919}),
    "prime experts": Instance("mixtral", {"intermediate_size": 1009}),
    "fused": Instance("phi3", {"intermediate_size": 8192}),
}


@dataclass(frozen=True)
class Row:
    """The outcome at one sparsity.

    Attributes:
        widths: Old widths, each with the width in the result.
        asked: Parameters of the channels that the sparsity names, before any rounding.
        announced, removed: Parameters that the plan says go, and parameters by which the files differ.
        error: Largest relative difference of the logits; or the reason for which the cut failed.
    """

    name: str
    model_type: str
    sparsity: float
    widths: str
    asked: float
    announced: int
    removed: int
    error: str


def rows(name: str) -> list[Row]:
    """Measure the instance ``name`` and prune it at each of `SPARSITIES`."""
    from chanfmt.base.errors import ChanfmtError
    from chanfmt.format.reader import Atlas
    from chanfmt.models.source import ModelSource
    from surgery.cut.prune import prune
    from surgery.planning.options import PlanOptions
    from surgery.planning.plan import make_plan

    instance = INSTANCES[name]
    found = []
    with tempfile.TemporaryDirectory() as directory:
        model = Path(directory) / "model"
        zoo.tiny(instance.model_type, "causal", **instance.fields).save_pretrained(model)
        tiny_tokenizer().save_pretrained(model)
        build_atlas(model, Path(directory) / "a.h5")
        for sparsity in SPARSITIES:
            with Atlas.open(Path(directory) / "a.h5") as atlas:
                options = PlanOptions(sparsity, "magnitude")
                plan = make_plan(atlas, options)
                pairs = dict.fromkeys(zip((block.n_channels for block in plan.blocks), plan.widths, strict=True))
                widths = ", ".join(f"{before:,} to {after:,}" for before, after in pairs)
                each = [max(1, block.n_experts) * block.channel_parameters * block.n_channels for block in plan.blocks]
                announced = plan.size.written if plan.size else 0
                removed, outcome = 0, ""
                try:
                    result = prune(atlas, ModelSource(model), Path(directory) / f"out-{sparsity}", options)
                except ChanfmtError as error:
                    outcome = error.message[:160]
                else:
                    removed = result.report.parameters_before - result.report.parameters_after
                    logits = result.report.logits
                    outcome = f"{logits.relative_error:.1g}" if logits else "not compared"
                found.append(Row(name, instance.model_type, sparsity, widths, sparsity * sum(each), announced, removed, outcome))
    return found


def table(found: list[Row]) -> str:
    """The page of the documentation."""
    import torch
    import transformers

    lines = "\n".join(
        f"| {row.name} | {row.model_type} | {row.sparsity:g} | {row.widths} | {row.asked:,.0f} | {row.announced:,} | "
        f"{row.removed:,} | {row.error} |"
        for row in found
    )
    return (
        f"# Real widths\n\n`python -m tests.support.width_census` generated this page with transformers "
        f"{transformers.__version__} and torch {torch.__version__.split('+')[0]}. It measured random models with small hidden "
        "sizes and the FFN widths of released models, and pruned them with the default multiple.\n\n"
        "- *widths*: each old width with the width in the result. If one config field sets several widths (`1408 x 2`), they "
        "change together.\n- *asked*: parameters of the share of channels that was asked for.\n- *announced*: parameters that "
        "`surgery plan` says go.\n- *removed*: parameters by which the model became smaller.\n- *logits*: largest difference "
        "from the masked dense model, relative to its largest logit.\n\n"
        "| widths of | type | sparsity | widths | asked | announced | removed | logits |\n|---|---|---|---|---|---|---|---|\n"
        f"{lines}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*INSTANCES, []])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    found = []
    for name in arguments.names or INSTANCES:
        for row in rows(name):
            print(row, flush=True)
            found.append(row)
    if arguments.out:
        arguments.out.write_text(table(found), encoding="utf-8")
    sys.exit(any(row.announced != row.removed for row in found))


if __name__ == "__main__":
    main()
