"""A loaded model, its atlas's FFNs in it and a text: what experiments remove channels of and measure, in place."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import AtlasError, ModelError, UsageError
from surgery.cut.matching import match_ffns
from surgery.cut.source import check_fingerprint, find_model
from surgery.evaluation.protocol import PROTOCOLS, prepare_text
from surgery.experiments.results import loss_columns

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import numpy as np

    from chanfmt.format.reader import Atlas
    from chanfmt.models.ffn import FFN
    from chanfmt.models.source import ModelSource
    from surgery.recovery.refit import FittedWrite


@dataclass(frozen=True)
class SubjectOptions:
    """Which model is measured, and on what."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, directory or .gguf file of the atlas's model (default: the one the atlas names, from the Hub)",
            "metavar": "MODEL",
        },
    )
    data: str = field(
        default="wikitext2",
        metadata={
            "help": "text: wikitext2, pydoc (its held-out part), a .txt, .jsonl or .parquet file, or any data set",
            "metavar": "SOURCE",
        },
    )
    seq_len: int = field(default=2048, metadata={"help": "tokens in a block"})
    max_tokens: int = field(default=0, metadata={"help": "stop after this many tokens, 0 for all"})
    device: str = field(default="auto", metadata={"help": "auto, cpu, cuda, cuda:1, ..."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32, bfloat16, float16 or float64"})

    def check(self) -> None:
        """Raise `UsageError` for a value that cannot be."""
        if self.seq_len < 2:
            raise UsageError(f"--seq-len must be at least 2, not {self.seq_len}")
        if self.max_tokens < 0:
            raise UsageError(f"--max-tokens must be 0 or more, not {self.max_tokens}")


@dataclass(frozen=True, eq=False)
class Subject:
    """See the module.

    Attributes:
        model: In evaluation mode; nothing here changes it.
        ffns: Block index to the model's FFN.
        source: The model's files.
        token_ids: The text, int32 (token,).
        seq_len: Tokens in a block.
        identity: What numbers must have in common to be compared, as JSON-ready data.
        mixed: Modules whose FFNs compute numbers from all their channels.
    """

    model: Any
    ffns: Mapping[int, FFN]
    source: ModelSource
    token_ids: np.ndarray
    seq_len: int
    identity: dict[str, Any]
    mixed: tuple[str, ...]

    def measure(
        self,
        removed: Mapping[int, np.ndarray],
        means: Mapping[int, np.ndarray] | None = None,
        progress: Callable[[int], object] | None = None,
        weights: Mapping[int, tuple[np.ndarray, FittedWrite]] | None = None,
    ) -> dict[str, Any]:
        """The `surgery.experiments.results.loss_columns` with ``removed`` gone; with none it is dense.

        Args:
            removed, means: As for `surgery.experiments.masking.masked`.
            weights: As for `surgery.experiments.masking.refitted_writes`.
        """
        from surgery.evaluation.perplexity import block_losses
        from surgery.experiments.masking import masked, refitted_writes

        started = time.monotonic()
        with contextlib.ExitStack() as stack:
            if weights:
                stack.enter_context(refitted_writes(self.model, self.ffns, weights))
            if removed:
                stack.enter_context(masked(self.model, self.ffns, removed, means))
            losses = block_losses(self.model, self.token_ids, self.seq_len, progress=progress)
        return loss_columns(losses, time.monotonic() - started)


def open_subject(atlas: Atlas, options: SubjectOptions) -> Subject:
    """Load the model and the text, and find the FFNs.

    Raises:
        UsageError: The options cannot mean anything.
        ModelError: The model cannot be had, is not the atlas's, or is no causal language model.
        AtlasError: The atlas is unfinished, or lists no FFN.
    """
    options.check()
    check_atlas(atlas)
    from chanfmt.data.text import read_text
    from chanfmt.models.causal import check_causal
    from chanfmt.models.find.discover import find_ffns
    from chanfmt.models.load import load_model

    source = find_model(atlas.model, options.model)
    name = options.model or source.id
    check_fingerprint(atlas.model, source.directory, source.fingerprint)
    text = read_text(options.data, "evaluate")
    _, tokens = prepare_text(name, source, text, PROTOCOLS["paper"], options.seq_len, options.max_tokens)
    model = load_model(source, dtype=options.dtype, device=options.device)
    check_causal(model)
    ffns = {}
    for block, ffn in zip(atlas.blocks, match_ffns(atlas.blocks, find_ffns(model)), strict=True):
        if ffn is None:
            raise ModelError(f"{name} has no FFN {block.module} of {block.n_channels} channels, which the atlas lists")
        ffns[block.index] = ffn
    identity = {
        "atlas_sha256": atlas.content_sha256,
        "model": atlas.model.id,
        "fingerprint": atlas.model.fingerprint,
        "data": text.source,
        "tokens_sha256": tokens.sha256,
        "tokens": len(tokens.ids),
        "seq_len": options.seq_len,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
    }
    mixed = tuple(ffn.container for ffn in ffns.values() if ffn.mixed)
    return Subject(model, ffns, source, tokens.ids, options.seq_len, identity, mixed)


def check_atlas(atlas: Atlas) -> None:
    """Raise `AtlasError` where ``atlas`` has nothing that channels could be chosen by."""
    if atlas.status != "complete":
        raise AtlasError(f"{atlas.path} is unfinished", hint="finish it with: atlas build ... --resume")
    if not atlas.blocks:
        raise AtlasError(f"{atlas.path} lists no FFN")
