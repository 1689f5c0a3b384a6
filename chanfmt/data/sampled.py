"""Calibration sequences that are sampled from the measured model: ``--calib self``."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from chanfmt.base.errors import ChanfmtError, ModelError, UsageError, first_line
from chanfmt.data.tokens import check_vocabulary
from chanfmt.format.records import NO_SPECIAL_TOKENS, SpecialTokens
from chanfmt.models.causal import check_causal
from chanfmt.models.out_of_memory import is_out_of_memory
from chanfmt.models.quiet import quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH = 16
"""Sequences sampled side by side if no batch size is given."""


def sample_sequences(
    model: Any,
    tokenizer: Any,
    sequences: int,
    seq_len: int,
    seed: int,
    *,
    name: str,
    special: SpecialTokens = NO_SPECIAL_TOKENS,
    bos: bool = True,
    batch_size: int | None = None,
    progress: Callable[[int], object] = lambda tokens: None,
) -> np.ndarray:
    """Sample token ids from ``model`` at temperature 1, from all of its vocabulary. Returns int32 (sequence, position).

    Every sequence starts with ``special.before``. If that is empty, it starts with the tokenizer's BOS, or with a random
    ordinary token if the tokenizer has no BOS. It ends with ``special.after``. An EOS is a token like any other: the next
    document follows it, as in packed text. The random numbers belong to the sequence and the position, so they do not depend
    on the batch size.

    Args:
        model: A loaded causal LM with frozen parameters.
        name: Name of the model in messages.
        special: The tokens that every sequence begins and ends with.
        bos: Whether a sequence may start with the tokenizer's BOS if ``special.before`` is empty.
        batch_size: Sequences at a time; None for `BATCH`.
        progress: Called with the number of tokens sampled since the last call.

    Raises:
        UsageError: The model is not causal, or ``special`` leaves no place for a sampled token.
        ModelError: The model has no embedding for the tokenizer's BOS, or its logits are not finite.
        ChanfmtError: Memory runs out.
    """
    _check_samples(model, name)
    device = next(model.parameters()).device
    first = _first_tokens(model, tokenizer, sequences, seed, name, special, bos)
    sampled = seq_len - first.shape[1] - len(special.after)
    if sampled < 1:
        raise UsageError(
            f"--seq-len {seq_len} leaves no place for a sampled token: every sequence has {seq_len - sampled} given ones",
            hint="use a larger --seq-len",
        )
    ids = np.empty((sequences, seq_len - len(special.after)), dtype=np.int32)
    ids[:, : first.shape[1]] = first
    uniform = np.random.default_rng(seed).random((sequences, sampled))
    size = batch_size or BATCH
    try:
        with torch.no_grad(), quiet_transformers():
            cached = _cache_works(model, device)
            for start in range(0, sequences, size):
                part = slice(start, start + size)
                ids[part] = (
                    _continue(
                        model,
                        torch.from_numpy(ids[part, : first.shape[1]]).long().to(device),
                        torch.from_numpy(uniform[part]).to(device),
                        cached,
                        progress,
                    )
                    .cpu()
                    .numpy()
                )
    except (RuntimeError, IndexError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ChanfmtError(
                f"out of memory sampling {min(size, sequences)} sequences at a time",
                hint="use a smaller --batch-size or --seq-len, or --dtype bfloat16",
            ) from None
        raise ModelError(f"{name} cannot continue a text to {seq_len} tokens: {first_line(error)}") from error
    return np.hstack([ids, np.tile(np.asarray(special.after, dtype=np.int32), (sequences, 1))])


def _check_samples(model: Any, name: str) -> None:
    hint = "use a text: wikitext2, pydoc, a file or a data set"
    if getattr(model.config, "is_encoder_decoder", False):
        raise UsageError(f"--calib self: {name} is an encoder-decoder; only causal models write text of their own", hint=hint)
    try:
        check_causal(model)
    except ModelError as error:
        raise UsageError(f"--calib self: {error.message}", hint=hint) from None


def _first_tokens(
    model: Any, tokenizer: Any, sequences: int, seed: int, name: str, special: SpecialTokens, bos: bool
) -> np.ndarray:
    """First tokens of every sequence, int64 (sequence, position)."""
    given = special.before
    if not given and bos and tokenizer.bos_token_id is not None:
        given = (tokenizer.bos_token_id,)
    check_vocabulary(model.config, tokenizer, np.array([*given, *special.after], dtype=np.int64), name)
    if given:
        return np.tile(given, (sequences, 1))
    known = min(len(tokenizer), model.config.get_text_config().vocab_size)
    ordinary = np.setdiff1d(np.arange(known), tokenizer.all_special_ids)
    # A generator of its own: the other random numbers do not depend on whether there is a BOS.
    return np.random.default_rng([seed, 1]).choice(ordinary, (sequences, 1))


def _continue(
    model: Any, ids: torch.Tensor, uniform: torch.Tensor, cached: bool, progress: Callable[[int], object]
) -> torch.Tensor:
    """``ids`` int64 (sequence, token), continued by one token for each number in ``uniform`` float64 (sequence, position)."""
    cache = None
    for position in range(uniform.shape[1]):
        logits, cache = _next_logits(model, ids[:, -1:] if cached and position else ids, cache, cached)
        ids = torch.cat([ids, _pick(logits, uniform[:, position : position + 1])], dim=1)
        progress(len(ids))
    return ids


def _pick(logits: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The tokens at the quantiles ``uniform`` (sequence, 1) of the distribution of ``logits`` (sequence, token); int64 (sequence, 1)."""
    cumulative = torch.softmax(logits.double(), dim=-1).cumsum(dim=-1)
    if not bool(torch.isfinite(cumulative[:, -1]).all()):
        raise ModelError("the logits of a sampled text are not finite; an activation overflowed", hint="use --dtype float32")
    # Rounding may leave the last sum slightly above or below 1.
    tokens = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return tokens.clamp(max=logits.shape[-1] - 1)


def _next_logits(model: Any, ids: torch.Tensor, cache: Any, cached: bool) -> tuple[torch.Tensor, Any]:
    """Logits (sequence, token) behind the last token of ``ids``, and the cache with that token."""
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    if not cached:
        return model(ids, use_cache=False, **only_last).logits[:, -1], None
    output = model(ids, past_key_values=cache, use_cache=True, **only_last)
    return output.logits[:, -1], output.past_key_values


def _cache_works(model: Any, device: torch.device) -> bool:
    """Whether the model gives the same logits for one token at a time, with its cache, as for all tokens at once.

    The instance is asked, because caches have several names, and some models take a cache and ignore it.
    """
    ids = (torch.arange(8, device=device) % model.config.get_text_config().vocab_size)[None]
    expected, _ = _next_logits(model, ids, None, False)
    cache = None
    try:
        for position in range(ids.shape[1]):
            logits, cache = _next_logits(model, ids[:, position : position + 1], cache, True)
            if cache is None:
                return False
    # A model without a cache may raise anything over the argument, the missing output, or the single token.
    except Exception:
        return False
    # In bfloat16 two kernels may round differently. The error of a cache that is ignored is far larger.
    tolerance = 1e-3 if expected.dtype in (torch.float32, torch.float64) else 0.1
    return bool((logits.float() - expected.float()).abs().max() <= tolerance * expected.float().abs().max())
