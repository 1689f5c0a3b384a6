"""The loss that is differentiated: next tokens, masked tokens, the decoder's tokens, or an embedding."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from chanfmt.base.errors import ModelError, UsageError
from chanfmt.format import schema
from chanfmt.format.records import NO_SPECIAL_TOKENS, SpecialTokens
from chanfmt.models.causal import is_causal, why_not_causal
from chanfmt.models.likelihood import differentiated, nll
from chanfmt.models.next_token import NextTokenLoss
from chanfmt.models.run import explained, run_text, tokens_at_once

if TYPE_CHECKING:
    from collections.abc import Iterable

MASKED_SHARE = 0.15
"""Share of the tokens that `MaskedTokenLoss` hides."""


class Loss(Protocol):
    """A sum over the tokens of a batch, against which channels are measured.

    Attributes:
        model: The model that is run.
        definition: The loss as an atlas records it: a value of `chanfmt.format.schema.LOSSES`.
    """

    model: Any
    definition: str

    def backward(self, batch: Any, /) -> float:
        """Run ``batch`` forward and backward. Returns the summed loss in nats.

        Args:
            batch: Token ids (sequence, position), or the samples that the loss is made for.

        Raises:
            ModelError: The model cannot run sequences of this length.
            torch.OutOfMemoryError: Memory runs out, on any device.
        """

    def terms(self, seq_len: int) -> int:
        """Terms of the sum for one sequence of ``seq_len`` tokens, which a mean is taken over."""


def choose_loss(
    model: Any,
    tokenizer: Any,
    example: torch.Tensor,
    name: str = "auto",
    *,
    causal: bool | None = None,
    special: SpecialTokens = NO_SPECIAL_TOKENS,
) -> Loss:
    """The loss called ``name``, a key of `chanfmt.format.schema.LOSSES`; for ``auto``, the loss that ``model`` was made for.

    Args:
        example: Token ids (1, position) to try the model on.
        causal: Whether the model is causal, if that is known; None runs the model to find out.
        special: The tokens that every sequence begins and ends with.

    Raises:
        UsageError: The model does not have this loss.
        ModelError: The model cannot run ``example``.
    """
    if name == "embedding":
        return EmbeddingLoss(model)
    kind = type(model).__name__
    if name in ("auto", "reconstruction") and model.config.is_encoder_decoder:
        return ReconstructionLoss(model)
    with explained(tokens_at_once(example)):
        predicts = _predicts_tokens(model, run_text(model, example))
        causal = predicts and (is_causal(model) if causal is None else causal)
    if not predicts:
        raise UsageError(
            f"{kind} {why_not_causal(model)}, so there is no likelihood to differentiate",
            hint="measure it against its own embedding with --loss embedding",
        )
    if name in ("auto", "next-token") and causal:
        return NextTokenLoss(model, example)
    if name in ("auto", "masked-token") and not causal and getattr(tokenizer, "mask_token_id", None) is not None:
        return MaskedTokenLoss(model, tokenizer.mask_token_id, special)
    if name == "auto":
        raise UsageError(
            f"{kind} {why_not_causal(model)}, and its tokenizer has no mask token: "
            "it can predict neither next tokens nor masked tokens",
            hint="measure it against its own embedding with --loss embedding",
        )
    raise UsageError(f"{kind} has no {name} loss", hint="leave out --loss, or use --loss embedding")


def _predicts_tokens(model: Any, output: Any) -> bool:
    """Whether ``output`` of ``model`` holds a row of logits for every token, with a logit for every token of the vocabulary."""
    logits = getattr(output, "logits", None)
    return isinstance(logits, torch.Tensor) and logits.ndim >= 3 and not type(model).__name__.endswith("Classification")


class MaskedTokenLoss:
    """Sum of the NLL of tokens that the mask token replaces: a fixed share of each sequence, drawn by the sequence's SHA-256.

    The special tokens around a sequence stay, as in the training of these models.
    """

    definition = schema.LOSSES["masked-token"]

    def __init__(self, model: Any, mask_token: int, special: SpecialTokens = NO_SPECIAL_TOKENS) -> None:
        self.model = model
        self.mask_token = mask_token
        self.special = special

    def terms(self, seq_len: int) -> int:
        return max(1, round(MASKED_SHARE * (seq_len - len(self.special))))

    def backward(self, ids: torch.Tensor) -> float:
        read, hidden = self.masked(ids)
        with explained(tokens_at_once(ids)):
            logits = run_text(self.model, read).logits
            return differentiated(nll(logits[hidden], ids[hidden]))

    def masked(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model reads in place of ``ids`` (sequence, position), and which tokens are hidden there, bool."""
        hidden = torch.stack([self._hidden(row) for row in ids.cpu()]).to(ids.device)
        return ids.masked_fill(hidden, self.mask_token), hidden

    def _hidden(self, row: torch.Tensor) -> torch.Tensor:
        chosen = _generator(row).permutation(len(row) - len(self.special))[: self.terms(len(row))]
        hidden = torch.zeros(len(row), dtype=torch.bool)
        hidden[torch.from_numpy(chosen + len(self.special.before))] = True
        return hidden


class ReconstructionLoss:
    """Sum of the NLL of the decoder of an encoder-decoder, which repeats, token by token, what the encoder reads.

    The decoder begins as in training: the model's own shift makes its input from the labels. If the class has no such shift,
    the decoder begins with the start token of the config.
    """

    definition = schema.LOSSES["reconstruction"]

    def __init__(self, model: Any) -> None:
        self.model = model
        names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
        known = (getattr(model.config.get_text_config(decoder=True), name, None) for name in names)
        self.start = next((token for token in known if token is not None), 0)

    def terms(self, seq_len: int) -> int:
        return seq_len

    def backward(self, ids: torch.Tensor) -> float:
        with explained(tokens_at_once(ids)):
            return differentiated(nll(run_text(self.model, ids, decoder_ids=self.shifted(ids)).logits, ids))

    def shifted(self, ids: torch.Tensor) -> torch.Tensor:
        """What the decoder reads while it gives back ``ids`` (sequence, position)."""
        own = getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if own is not None:
            try:
                return own(labels=ids)
            # The config has no start token or no padding token, and every class fails over that in its own way.
            except (ValueError, TypeError, AttributeError, AssertionError):
                pass
        return torch.cat([torch.full_like(ids[:, :1], self.start), ids[:, :-1]], dim=1)


class EmbeddingLoss:
    """NLL of the last hidden state under a unit Gaussian around itself, for encoders that predict no tokens.

    The observation is drawn from the model: it is the state plus standard normal noise, which is drawn by the sequence's
    SHA-256. The gradient of the NLL is the noise. So E[s^2] says how much the state moves with u: it is the Fisher
    information of the embedding, up to sampling.
    """

    definition = schema.LOSSES["embedding"]

    def __init__(self, model: Any) -> None:
        self.model = model

    def terms(self, seq_len: int) -> int:
        return seq_len

    def backward(self, ids: torch.Tensor) -> float:
        with explained(tokens_at_once(ids)):
            state = hidden_state(self.model, run_text(self.model.base_model, ids), len(ids))
            return sampled(state, [_generator(row) for row in ids.cpu()])


def hidden_state(model: Any, output: Any, sequences: int) -> torch.Tensor:
    """The last hidden state (sequence, token, dimension) in ``output``, which ``model`` gave without its head. Raises `ModelError`."""
    state = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]
    if not isinstance(state, torch.Tensor) or state.ndim != 3 or len(state) != sequences:
        raise ModelError(f"{type(model).__name__} gives no hidden state per token")
    return state


def sampled(state: torch.Tensor, generators: Iterable[np.random.Generator]) -> float:
    """Draw an observation of ``state``, by one generator for each sequence, and run the backward pass. Returns its NLL in nats."""
    noise = torch.stack([torch.from_numpy(each.standard_normal(state.shape[1:])) for each in generators]).to(state)
    state.backward(-noise)
    return 0.5 * float(noise.double().square().sum())


def _generator(row: torch.Tensor) -> np.random.Generator:
    return generator_of(hashlib.sha256(row.numpy().astype("<i4").tobytes()).digest())


def generator_of(sha256: bytes) -> np.random.Generator:
    """Random numbers for the sequence with this SHA-256, whatever batch it is in."""
    return np.random.default_rng(list(sha256))
