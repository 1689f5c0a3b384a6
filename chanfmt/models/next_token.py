"""The next-token loss of a causal language model, with its logits in chunks."""

from __future__ import annotations

from typing import Any

import torch

from chanfmt.format import schema
from chanfmt.models.likelihood import differentiated, nll, summed_nll
from chanfmt.models.run import explained, run_text, tokens_at_once

LOGIT_BYTES = 128 << 20
"""Bytes of logits held at a time. The logits of 2k tokens over a vocabulary of 128k take a gigabyte, three times over."""
_TILE = 128


class NextTokenLoss:
    """Sum of next-token NLL of a causal LM, forward and backward, with logits in chunks.

    If the model's logits are its output embedding applied to its decoder's last hidden state, they are computed and
    differentiated one chunk of tokens at a time. That is checked on the instance, up to rounding. Otherwise all logits are
    computed at once by the model's own ``forward``.
    """

    definition = schema.LOSSES["next-token"]

    def __init__(self, model: Any, example: torch.Tensor) -> None:
        """Check the head on ``example``, token ids (1, position), of which at most 16 are used."""
        self.model = model
        self.head = model.get_output_embeddings()
        self.chunked = isinstance(getattr(self.head, "weight", None), torch.Tensor) and self._head_is_plain(example[:, :16])

    def terms(self, seq_len: int) -> int:
        """Predicted tokens of a sequence."""
        return seq_len - 1

    def backward(self, ids: torch.Tensor) -> float:
        """Run ``ids`` (sequence, position) forward and backward. Returns the summed loss in nats.

        Raises:
            ModelError: The model cannot run sequences of this length.
            torch.OutOfMemoryError: Memory runs out, on any device.
        """
        with explained(tokens_at_once(ids)):
            return self._backward(ids)

    @torch.no_grad()
    def value(self, ids: torch.Tensor) -> float:
        """Summed loss of ``ids`` (sequence, position) in nats, by a forward pass alone. Raises the errors of `backward`."""
        with explained(tokens_at_once(ids)):
            return self._value(ids)

    def _backward(self, ids: torch.Tensor) -> float:
        if not self.chunked:
            return differentiated(nll(run_text(self.model, ids).logits[:, :-1], ids[:, 1:]))
        rows = self.states(ids)
        targets = ids[:, 1:].reshape(-1)
        gradient = torch.empty_like(rows)
        total = 0.0
        for start, stop in self._chunks(len(targets)):
            nats, gradient[start:stop] = self.through_head(rows[start:stop], targets[start:stop])
            total += nats
        rows.backward(gradient)
        return total

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """The states (row, dimension) behind the last block that predict a token each, if the loss has chunks."""
        hidden = self._decoder(ids)
        return hidden[:, :-1].reshape(-1, hidden.shape[-1])

    def through_head(self, rows: torch.Tensor, targets: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The summed loss of ``targets`` (row,) in nats, and its gradient by the states ``rows`` (row, dimension)."""
        part = rows.detach().requires_grad_(True)
        loss = nll(self.head(part), targets)
        loss.backward()
        assert part.grad is not None
        return float(loss.detach()), part.grad

    @property
    def rows_at_once(self) -> int:
        """Rows in a chunk of logits: a multiple of 128, which matrix products of a GPU are made of, or fewer for a huge vocabulary."""
        rows = max(1, LOGIT_BYTES // (4 * int(self.head.weight.shape[0])))
        return rows - rows % _TILE if rows > _TILE else rows

    def _value(self, ids: torch.Tensor) -> float:
        if not self.chunked:
            return summed_nll(run_text(self.model, ids).logits[:, :-1], ids[:, 1:])
        hidden = self._decoder(ids)
        rows, targets = hidden[:, :-1].reshape(-1, hidden.shape[-1]), ids[:, 1:].reshape(-1)
        return sum(summed_nll(self.head(rows[start:stop]), targets[start:stop]) for start, stop in self._chunks(len(targets)))

    def _decoder(self, ids: torch.Tensor) -> torch.Tensor:
        return run_text(self.model.base_model, ids)[0]

    def _chunks(self, rows: int) -> list[tuple[int, int]]:
        step = self.rows_at_once
        return [(start, min(start + step, rows)) for start in range(0, rows, step)]

    @torch.no_grad()
    def _head_is_plain(self, example: torch.Tensor) -> bool:
        if self.model.base_model is self.model:
            return False
        try:
            hidden = self._decoder(example)
        except (RuntimeError, ValueError, TypeError, AttributeError):
            return False
        if not isinstance(hidden, torch.Tensor) or hidden.shape[-1] != self.head.weight.shape[-1]:
            return False
        expected = run_text(self.model, example).logits.float()
        # In bfloat16 two kernels may round apart; a scale or a soft cap would show far above this.
        tolerance = 1e-5 if hidden.dtype in (torch.float32, torch.float64) else 1e-2
        found = self.head(hidden).float().to(expected.device)
        return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
