"""Next-token losses of a loaded model, block by block, and the bootstrap that compares two models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from chanfmt.base.errors import ChanfmtError, ModelError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RESAMPLES = 10_000
"""Bootstrap resamples of a comparison."""
CONFIDENCE = 0.95
"""Coverage of the bootstrap interval."""
_DRAWS = 1 << 20
"""Block numbers in memory at a time while resampling."""


@dataclass(frozen=True, repr=False)
class BlockLosses:
    """Losses of one model on consecutive blocks of tokens. A token is predicted from the tokens before it in its block.

    Attributes:
        nll: Summed next-token NLL of each block in nats, float64 (block,).
        predicted: Tokens predicted in each block, int64 (block,): all but the first token of the block.
    """

    nll: np.ndarray
    predicted: np.ndarray

    def __repr__(self) -> str:
        return f"<BlockLosses of {len(self.nll):,} blocks: {self.mean:.4f} nats per token>"

    @cached_property
    def mean(self) -> float:
        """NLL per predicted token, in nats."""
        return float(self.nll.sum() / self.predicted.sum())

    @property
    def perplexity(self) -> float:
        """exp of `mean`; infinity beyond float64."""
        return perplexity_of(self.mean)

    @cached_property
    def standard_error(self) -> float:
        """Standard error of `mean`, with the blocks as a sample of the text; NaN for a single block.

        A block weighs as many tokens as it predicts. This is the linearised variance of a ratio of sums. For blocks of
        equal length it is the standard deviation of the block means, divided by the root of their number.
        """
        blocks = len(self.nll)
        if blocks < 2:
            return math.nan
        residuals = self.nll - self.mean * self.predicted
        return float(np.sqrt(blocks / (blocks - 1) * np.square(residuals).sum()) / self.predicted.sum())


@dataclass(frozen=True)
class Comparison:
    """Difference between the mean NLL of a model and that of a reference model, on the same blocks.

    Attributes:
        difference: Mean NLL minus that of the reference, in nats per token.
        low, high: Ends of the bootstrap interval of ``difference``; NaN for a single block.
        blocks: Number of blocks.
        resamples: Number of bootstrap resamples.
        confidence: Coverage of the interval.
    """

    difference: float
    low: float
    high: float
    blocks: int
    resamples: int
    confidence: float

    @property
    def ratio(self) -> tuple[float, float, float]:
        """Perplexity divided by that of the reference, and the ends of its interval: exp of the difference and of its ends."""
        return perplexity_of(self.difference), perplexity_of(self.low), perplexity_of(self.high)


def perplexity_of(nll: float) -> float:
    """exp(``nll``); infinity beyond float64."""
    return math.inf if nll > 700 else math.exp(nll)


def block_losses(
    model: Any,
    token_ids: np.ndarray,
    seq_len: int,
    *,
    before: Sequence[int] = (),
    progress: Callable[[int], object] | None = None,
    name: str = "the model",
) -> BlockLosses:
    """Compute the losses of ``model`` on ``token_ids`` in blocks that do not overlap. The last block may be shorter.

    Args:
        model: A loaded causal language model in evaluation mode. Its vocabulary and context must suffice.
        token_ids: Integers (token,). A last block of one token predicts nothing and is left out.
        seq_len: Tokens in a block, at least 2.
        before: Token ids that take the place of the first token of every block, such as BOS. The same tokens are predicted as
            without ``before``, because the first token of a block never is. A block that begins with them stays as it is.
        progress: Called after each block with its number of tokens.
        name: What errors call the model.

    Raises:
        UsageError: There are fewer than two tokens.
        ModelError: The model cannot run a block, or the loss of a block is not finite.
        ChanfmtError: Memory ran out.
    """
    import torch

    from chanfmt.models.next_token import NextTokenLoss

    if len(token_ids) < 2:
        raise UsageError(
            f"no token can be predicted: there are {len(token_ids)}, and at least 2 are needed", hint="choose a longer text"
        )
    ids = torch.from_numpy(np.asarray(token_ids, dtype=np.int64)).to(next(model.parameters()).device)
    loss = NextTokenLoss(model, ids[None, : min(16, seq_len)])
    start_ids = torch.tensor([*before], dtype=ids.dtype, device=ids.device)
    # The tokens before a block predict each other too. The model is causal, so their own loss is the same in every block.
    own = loss.value(start_ids[None]) if len(before) > 1 else 0.0
    sums: list[float] = []
    predicted: list[int] = []
    for start in range(0, len(ids) - 1, seq_len):
        block = ids[start : start + seq_len]
        replaced = bool(before) and not torch.equal(block[: len(before)], start_ids)
        try:
            value = loss.value(torch.cat([start_ids, block[1:]])[None]) - own if replaced else loss.value(block[None])
        except torch.OutOfMemoryError:
            raise ChanfmtError(
                f"out of memory with a block of {len(block)} tokens", hint="use --dtype bfloat16, or a smaller --seq-len"
            ) from None
        if not math.isfinite(value):
            raise ModelError(
                f"the loss of {name} in block {len(sums)} (tokens {start:,} to {start + len(block) - 1:,}) is not finite; "
                "an activation overflowed",
                hint="use --dtype float32" if next(model.parameters()).dtype in (torch.float16, torch.bfloat16) else None,
            )
        sums.append(value)
        predicted.append(len(block) - 1)
        if progress:
            progress(len(block))
    return BlockLosses(np.array(sums, dtype=np.float64), np.array(predicted, dtype=np.int64))


def paired_bootstrap(
    reference: BlockLosses, other: BlockLosses, *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> Comparison:
    """Compare the mean NLL of ``other`` with that of ``reference``: their difference and its percentile interval.

    A resample draws as many blocks as there are, with replacement. Both models get the same blocks, so that a block
    which is hard for both does not blur the difference.

    Raises:
        ValueError: The two do not predict the same number of tokens in every block.
    """
    if not np.array_equal(reference.predicted, other.predicted):
        raise ValueError("the losses are not of the same blocks")
    gaps, weights = other.nll - reference.nll, reference.predicted
    blocks = len(gaps)
    low = high = math.nan
    if blocks > 1:
        generator = np.random.default_rng(seed)
        step = max(1, _DRAWS // blocks)
        drawn = []
        for start in range(0, resamples, step):
            chosen = generator.integers(blocks, size=(min(step, resamples - start), blocks))
            drawn.append(gaps[chosen].sum(axis=1) / weights[chosen].sum(axis=1))
        tail = (1 - confidence) / 2
        low, high = (float(end) for end in np.quantile(np.concatenate(drawn), [tail, 1 - tail]))
    return Comparison(float(gaps.sum() / weights.sum()), low, high, blocks, resamples, confidence)
