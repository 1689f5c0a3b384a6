"""The loss that is differentiated: the sum of next-token negative log-likelihoods, in nats."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from chanfmt.errors import ModelError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator

LOGIT_BYTES = 128 << 20
"""Logits held at a time. A vocabulary of 128k over 2k tokens would be a gigabyte, thrice."""


class NextTokenLoss:
    """Sum of next-token NLL of a causal LM, forward and backward, with logits in chunks.

    Where the model's logits are its output embedding applied to its decoder's last hidden state
    (checked on the instance, bit for bit up to rounding), they are computed and differentiated a
    chunk of tokens at a time; otherwise all at once through the model's own forward.
    """

    def __init__(self, model: Any, example: torch.Tensor) -> None:
        """Args: ``example`` are token ids (1, position) to check the head on; at most 16 are used."""
        self.model = model
        self.head = model.get_output_embeddings()
        self.chunked = self.head is not None and self._head_is_plain(example[:, :16])

    def backward(self, ids: torch.Tensor) -> float:
        """Run ``ids`` (sequence, position) forward and backward. Returns the summed loss in nats.

        Raises:
            ModelError: The model cannot run sequences of this length.
            torch.OutOfMemoryError: On any device.
        """
        with _explained(ids):
            return self._backward(ids)

    @torch.no_grad()
    def value(self, ids: torch.Tensor) -> float:
        """Summed loss of ``ids`` (sequence, position) in nats, forward only. Raises as `backward`."""
        with _explained(ids):
            return self._value(ids)

    def _backward(self, ids: torch.Tensor) -> float:
        if not self.chunked:
            loss = _nll(self.model(ids, use_cache=False).logits[:, :-1], ids[:, 1:])
            loss.backward()
            return float(loss.detach())
        hidden = self._decoder(ids)
        rows = hidden[:, :-1].reshape(-1, hidden.shape[-1])
        targets = ids[:, 1:].reshape(-1)
        gradient = torch.empty_like(rows)
        total = 0.0
        for start, stop in self._chunks(len(targets)):
            part = rows[start:stop].detach().requires_grad_(True)
            loss = _nll(self.head(part), targets[start:stop])
            loss.backward()
            assert part.grad is not None
            gradient[start:stop] = part.grad
            total += float(loss.detach())
        rows.backward(gradient)
        return total

    def _value(self, ids: torch.Tensor) -> float:
        if not self.chunked:
            return float(_nll(self.model(ids, use_cache=False).logits[:, :-1], ids[:, 1:]))
        hidden = self._decoder(ids)
        rows, targets = hidden[:, :-1].reshape(-1, hidden.shape[-1]), ids[:, 1:].reshape(-1)
        return sum(float(_nll(self.head(rows[start:stop]), targets[start:stop]))
                   for start, stop in self._chunks(len(targets)))

    def _decoder(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model.base_model(ids, use_cache=False)[0]

    def _chunks(self, rows: int) -> list[tuple[int, int]]:
        step = max(1, LOGIT_BYTES // (4 * self.head.weight.shape[0]))
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    @torch.no_grad()
    def _head_is_plain(self, example: torch.Tensor) -> bool:
        if self.model.base_model is self.model:
            return False
        hidden = self._decoder(example)
        if not isinstance(hidden, torch.Tensor) or hidden.shape[-1] != self.head.weight.shape[-1]:
            return False
        expected = self.model(example, use_cache=False).logits.float()
        # In bfloat16 two kernels may round apart; a scale or a soft cap would show far above this.
        tolerance = 1e-5 if hidden.dtype in (torch.float32, torch.float64) else 1e-2
        return bool((self.head(hidden).float() - expected).abs().max() <= tolerance * expected.abs().max())


@contextlib.contextmanager
def _explained(ids: torch.Tensor) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        # Only accelerators have an exception of their own for it.
        if "allocate memory" in str(error):
            raise torch.OutOfMemoryError(str(error)) from None
        raise ModelError(f"the model cannot run {ids.shape[1]} tokens at a time: {first_line(error)}") from error


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = logits.reshape(-1, logits.shape[-1])
    if logits.dtype != torch.float64:
        logits = logits.float()
    return functional.cross_entropy(logits, targets.reshape(-1), reduction="sum")
