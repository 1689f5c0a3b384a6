"""What `surgery prune` will refuse in a model that can be measured, so that nobody learns it after the measurement."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chanfmt.models.source import own_code

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chanfmt.models.ffn import FFN
    from chanfmt.models.source import ModelSource


def prune_refusals(source: ModelSource, ffns: Sequence[FFN]) -> tuple[str, ...]:
    """The reasons why `surgery prune` will refuse the model of ``source``, one sentence each; none if no reason is known.

    Args:
        ffns: The FFNs of the model.
    """
    reasons = []
    if reason := own_code(source.config_fields):
        reasons.append(reason)
    mixed = sorted({ffn.layer_index for ffn in ffns if ffn.mixed})
    if mixed:
        reasons.append(
            f"in layer {', '.join(map(str, mixed))} a norm or a threshold over all channels lies between read and write, so "
            "removing some channels changes the others; prune cuts such a model only with --no-verify"
        )
    return tuple(reasons)
