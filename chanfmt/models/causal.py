"""Whether a model is causal: no token sees a later one, and the model predicts tokens. The instance is asked, not its class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from chanfmt.base.errors import ModelError
from chanfmt.models.run import run_text, test_tokens, vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CAUSAL_TOKENS = 8


@torch.no_grad()
def is_causal(model: Any) -> bool:
    """Whether ``model`` predicts tokens, and no token sees a later one.

    The instance is asked, because two dozen encoder types pass for causal language models by their class.
    """
    return not model.config.is_encoder_decoder and shows_causal(run_text(model, causal_rows(model)))


def causal_rows(model: Any) -> torch.Tensor:
    """Token ids of two sequences that differ in their last token only, for `shows_causal`."""
    rows = test_tokens(model)[:, :_CAUSAL_TOKENS].repeat(2, 1)
    rows[1, -1] = (rows[1, -1] + 1) % vocabulary(model)
    return rows


def shows_causal(output: Any) -> bool:
    """Whether the output of a model for `causal_rows` predicts tokens and differs at the last token only."""
    if not hasattr(output, "logits"):
        return False
    logits = output.logits
    # A classifier has one row of scores for a sequence.
    if not isinstance(logits, torch.Tensor) or logits.ndim < 3:
        return False
    first, second = logits[:, :-1].float()
    return float((first - second).abs().max()) <= 1e-3 * float(first.abs().max())


def check_causal(model: PreTrainedModel) -> None:
    """Raise `ModelError` if a later token reaches an earlier logit: the model has no next-token loss then."""
    if not is_causal(model):
        with torch.no_grad():
            logits = getattr(run_text(model, causal_rows(model)), "logits", None)
        # NaN differs from NaN, so NaN logits look as if tokens saw later ones.
        if logits is not None and bool(logits.isnan().any()):
            raise ModelError(
                f"the logits of {type(model).__name__} are NaN: an activation overflowed", hint="use --dtype float32"
            )
        raise ModelError(
            f"{type(model).__name__} {why_not_causal(model)}, so it has no next-token loss",
            hint="perplexity is for causal language models, and for encoders with is_decoder=true",
        )


def why_not_causal(model: Any) -> str:
    """The reason why ``model`` is not a causal language model, as the rest of a sentence about it."""
    if model.config.is_encoder_decoder:
        return "is an encoder-decoder: its decoder reads what its encoder made of the whole text"
    kind, saved = type(model).__name__, str((model.config.architectures or [""])[0])
    if any(name.endswith(("Classification", "RewardModel")) for name in (kind, saved)):
        what = f"was saved as {saved}" if saved not in ("", kind) else "is a classifier or a reward model"
        return f"{what}: it gives scores, and predicts no tokens"
    if model.get_output_embeddings() is None:
        return "has no head that predicts tokens"
    return "is an encoder as configured: its tokens see later tokens"
