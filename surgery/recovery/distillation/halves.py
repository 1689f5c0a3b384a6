"""A causal language model in two halves: up to its last hidden states, and from there to its logits."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import ModelOutput

from chanfmt.base.errors import ModelError
from chanfmt.models.causal import is_causal, why_not_causal
from chanfmt.models.run import run_text, test_tokens
from surgery.recovery.writes import is_close

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HINT = "use --recover block, which needs no logits"


class _Reached(Exception):
    """Raised behind the first half, because the second is not wanted."""


class Halves:
    """The two halves of ``model``, which is causal. They share its weights, and follow them if they change.

    The model's own ``forward`` runs with the ``forward`` of its body replaced, so that scales and caps behind the output
    matrix are those of the model.

    Raises:
        ModelError: The model does not predict tokens, or computes its logits from more than its last hidden states.
    """

    def __init__(self, model: Any) -> None:
        kind = type(model).__name__
        if not is_causal(model):
            raise ModelError(
                f"--recover distill compares distributions of the next token, and {kind} {why_not_causal(model)}", hint=HINT
            )
        self.model = model
        self._body: Any = None
        self._kind: Callable[..., Any] | None = None
        ids = test_tokens(model)
        with torch.no_grad():
            try:
                whole = self._learned(ids)
                hidden = self.hidden(ids)
                worked = all(_same(self.logits(hidden[:, part]), whole[:, part]) for part in (slice(None), slice(3, 7)))
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError):
                # The class does not call its body as other classes do.
                worked = False
        if not worked:
            raise ModelError(f"{kind} computes its logits from more than its last hidden states", hint=HINT)

    def _learned(self, ids: torch.Tensor) -> torch.Tensor:
        """The model's logits for ``ids``. The outermost module that gives last hidden states is the body from now on."""

        def note(module: torch.nn.Module, args: object, output: object) -> None:
            if module is not self.model and isinstance(output, ModelOutput) and "last_hidden_state" in output:
                # Of two modules one inside the other, the outer one ends later.
                self._body, self._kind = module, type(output)

        handles = [module.register_forward_hook(note) for module in self.model.modules()]
        try:
            logits: torch.Tensor = run_text(self.model, ids).logits
        finally:
            for handle in handles:
                handle.remove()
        return logits

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """The last hidden states (sequence, position, feature) for token ids (sequence, position)."""
        found: list[Any] = []
        forward = self._body.forward

        def inside(*args: Any, **kwargs: Any) -> Any:
            found.append(forward(*args, **kwargs))
            raise _Reached

        with self._replaced(inside), contextlib.suppress(_Reached):
            run_text(self.model, ids)
        return found[0].last_hidden_state

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits (sequence, position, vocabulary) for last hidden states (sequence, position, feature)."""
        assert self._kind is not None
        output = self._kind(last_hidden_state=hidden)
        ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device)
        with self._replaced(lambda *args, **kwargs: output):
            return run_text(self.model, ids).logits

    @contextlib.contextmanager
    def _replaced(self, forward: Callable[..., Any]) -> Iterator[None]:
        """In the body, ``forward`` runs in place of the forward of the model's body."""
        if self._body is None:
            raise TypeError("no module of the model gives last hidden states")
        before = self._body.__dict__.get("forward")
        self._body.forward = forward
        try:
            yield
        finally:
            if before is None:
                del self._body.forward
            else:
                self._body.forward = before


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and is_close(one, other, other)
