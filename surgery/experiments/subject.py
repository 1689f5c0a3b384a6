"""A loaded model, the FFNs of an atlas in it, and a text: what experiments remove channels of and measure, in place."""

from __future__ import annotations

import contextlib
import hashlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.algebra.rewrite import measured_sha256
from chanfmt.base.errors import AtlasError, ModelError, UsageError
from chanfmt.base.narrate import warn
from surgery.cut.matching import match_ffns
from surgery.cut.source import check_fingerprint, find_model
from surgery.evaluation.given import check_given, check_running, given_model, given_text, runnable
from surgery.evaluation.loaded import LoadedModel
from surgery.evaluation.options import TextOptions
from surgery.evaluation.protocol import PROTOCOLS, before_text, prepare_text
from surgery.experiments.columns import loss_columns

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Mapping, Sequence

    import numpy as np

    from chanfmt.data.text import Text
    from chanfmt.format.reader import Atlas
    from chanfmt.models.ffn import FFN
    from chanfmt.models.source import ModelSource
    from surgery.evaluation.given import GivenModel
    from surgery.experiments.weight import Weight
    from surgery.recovery.refit import FittedFFN

_SAMPLED = 1024
"""Values of each parameter that `weights_digest` reads at most."""


@dataclass(frozen=True)
class SubjectOptions(TextOptions):
    """Which model is measured, and on which text."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, directory or .gguf file of the atlas's model (default: the model that the atlas names, from the Hub)",
            "metavar": "MODEL",
            "kind": "model",
        },
    )


@dataclass(frozen=True, eq=False, repr=False)
class Subject:
    """A loaded model, its FFNs and a text.

    Attributes:
        model: The model. A measurement leaves its weights, device and mode as they were.
        ffns: Block index to the FFN of the model.
        source: The files of the model; None for a model that was passed in memory.
        token_ids: Tokens of the text, int32 (token,).
        seq_len: Tokens in a block.
        identity: What two numbers must have in common to be compared, as JSON-ready data.
        mixed: Modules whose FFNs compute numbers from all their channels.
    """

    model: Any
    ffns: Mapping[int, FFN]
    source: ModelSource | None
    token_ids: np.ndarray
    seq_len: int
    identity: dict[str, Any]
    mixed: tuple[str, ...]

    def __repr__(self) -> str:
        return (
            f"<Subject {self.identity['model']!r} on {self.identity['data']!r}: "
            f"{len(self.ffns)} FFNs, {len(self.token_ids):,} tokens>"
        )

    def measure(
        self,
        removed: Mapping[int, np.ndarray],
        means: Mapping[int, np.ndarray] | None = None,
        progress: Callable[[int], object] | None = None,
        weights: Mapping[int, tuple[np.ndarray, FittedFFN]] | None = None,
        zeroed: Sequence[Weight] = (),
    ) -> dict[str, Any]:
        """Measure the loss without the channels ``removed``; with none removed, the loss of the dense model.

        Args:
            removed, means: As for `surgery.experiments.masking.masked`.
            progress: Called after each block of tokens with its number of tokens.
            weights: As for `surgery.experiments.masking.refitted_weights`.
            zeroed: As for `surgery.experiments.masking.zeroed_weights`.

        Returns:
            The `surgery.experiments.columns.LOSS_COLUMNS` of a row.
        """
        from chanfmt.models.frozen import frozen
        from surgery.evaluation.perplexity import block_losses
        from surgery.experiments.masking import masked, refitted_weights, zeroed_weights

        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            stack.enter_context(frozen(self.model))
            if weights:
                stack.enter_context(refitted_weights(self.model, self.ffns, weights))
            if zeroed:
                stack.enter_context(zeroed_weights(self.model, self.ffns, zeroed))
            if removed:
                stack.enter_context(masked(self.model, self.ffns, removed, means))
            losses = block_losses(self.model, self.token_ids, self.seq_len, progress=progress)
        return loss_columns(losses, time.monotonic() - started)


def open_subject(
    atlas: Atlas,
    model: Subject | GivenModel | None = None,
    text: str | os.PathLike[str] | Text = "wikitext2",
    *,
    seq_len: int = 2048,
    max_tokens: int = 0,
    device: str = "auto",
    device_map: str | None = None,
    dtype: str = "auto",
) -> Subject:
    """Load the model of ``atlas`` and a text, and find the FFNs that the atlas lists.

    Args:
        model: As for `surgery.evaluation.evaluate.evaluate`; None for the model that the atlas names, from the Hub. A
            `Subject` is returned as it is.
        text: As for `surgery.evaluation.evaluate.evaluate`.
        seq_len: Tokens in a block, at least 2.
        max_tokens: Tokens of the text to use at most; 0 means all.
        device, device_map, dtype: For a model that is loaded here.

    Raises:
        UsageError: An option is not possible, the text cannot be read, or a `Subject` was opened with another atlas.
        MissingPackageError: ``device_map`` without accelerate.
        ModelError: The model cannot be loaded, is not causal, or is not the model of the atlas.
        AtlasError: The atlas is unfinished, or lists no FFN.
    """
    if isinstance(model, Subject):
        if model.identity["atlas_sha256"] != measured_sha256(atlas):
            raise UsageError(
                "the subject was opened with another atlas", hint="open a subject with this atlas: open_subject(atlas, ...)"
            )
        return model
    check_subject(model, text, seq_len=seq_len, max_tokens=max_tokens, device=device, device_map=device_map, dtype=dtype)
    check_atlas(atlas)
    from chanfmt.models.find.discover import find_ffns

    read = given_text(text)
    name, given = _model_of(atlas, model)
    if not isinstance(given, LoadedModel):
        check_fingerprint(atlas.model, given)
    tokens = prepare_text(name, given, read, PROTOCOLS["paper"], seq_len, max_tokens)
    ffns = {}
    with runnable(given, dtype=dtype, device=device, device_map=device_map) as loaded:
        for block, ffn in zip(atlas.blocks, match_ffns(atlas.blocks, find_ffns(loaded)), strict=True):
            if ffn is None:
                raise ModelError(
                    f"{name} does not have the FFN {block.module} with {block.n_channels} channels that the atlas lists",
                    hint="pass the model that the atlas was built from",
                )
            ffns[block.index] = ffn
    identity = {
        "atlas_sha256": measured_sha256(atlas),
        "model": atlas.model.id,
        "fingerprint": weights_digest(loaded) if isinstance(given, LoadedModel) else atlas.model.fingerprint,
        "data": read.source,
        "tokens_sha256": tokens.sha256,
        "tokens": len(tokens.ids),
        "seq_len": seq_len,
        "dtype": str(next(loaded.parameters()).dtype).removeprefix("torch."),
    }
    if before_text(given, seq_len):
        warn(
            f"the tokenizer of {name} puts BOS before a text, but the blocks of this protocol do not begin with it; "
            "surgery eval prints the perplexity with BOS too"
        )
    mixed = tuple(ffn.container for ffn in ffns.values() if ffn.mixed)
    if mixed:
        warn(
            f"{len(mixed)} FFNs, {mixed[0]} among them, compute numbers from all their channels between their projections, "
            "removed channels too; a model that is cut there would compute something else"
        )
    return Subject(loaded, ffns, None if isinstance(given, LoadedModel) else given, tokens.ids, seq_len, identity, mixed)


def check_subject(
    model: Subject | GivenModel | None,
    text: str | os.PathLike[str] | Text,
    *,
    seq_len: int,
    max_tokens: int,
    device: str,
    device_map: str | None,
    dtype: str,
) -> None:
    """Raise the errors of `open_subject` that need neither the atlas, nor the network, nor a weight."""
    if isinstance(model, Subject):
        return
    TextOptions(seq_len=seq_len, max_tokens=max_tokens, device=device, device_map=device_map, dtype=dtype).check()
    check_running(text, device)
    if model is not None:
        check_given(model)


def check_atlas(atlas: Atlas) -> None:
    """Raise `AtlasError` if ``atlas`` holds nothing to choose channels by."""
    if atlas.status != "complete":
        raise AtlasError(f"{atlas.path} is unfinished", hint="finish it with: atlas build ... --resume")
    if not atlas.blocks:
        raise AtlasError(f"{atlas.path} lists no FFN")


def weights_digest(model: Any) -> str:
    """SHA-256 of the names, shapes, dtypes and a sample of the values of the parameters of a loaded model.

    It tells whether rows in a directory belong to the same weights. It differs from the fingerprint of a checkpoint.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        sample = values[:: max(1, len(values) // _SAMPLED)].double().cpu().numpy()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode() + sample.astype("<f8").tobytes())
    return f"loaded-{digest.hexdigest()}"


def _model_of(atlas: Atlas, model: GivenModel | None) -> tuple[str, ModelSource | LoadedModel]:
    """The name and the model to measure: ``model``, or the model that ``atlas`` names."""
    if model is None or isinstance(model, str):
        source = find_model(atlas.model, model)
        return model or source.id, source
    return given_model(model)
