"""Run a model on text or on given arrays, whatever its kind."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

TEST_TOKENS = 32
"""Tokens of the input that FFNs are found and verified with."""
_CAUSAL_TOKENS = 8


def run_text(model: Any, ids: torch.Tensor, *, decoder_ids: torch.Tensor | None = None) -> Any:
    """One forward pass over token ids (sequence, position), nothing cached. Returns the model's own output.

    Args:
        decoder_ids: What the decoder of an encoder-decoder reads; ``ids`` where that does not matter.
    """
    known = inspect.signature(model.forward).parameters
    extra: dict[str, Any] = {}
    if model.config.is_encoder_decoder and "decoder_input_ids" in known:
        extra["decoder_input_ids"] = ids if decoder_ids is None else decoder_ids
    if "use_cache" in known:
        extra["use_cache"] = False
    with eager_experts(model):
        return model(input_ids=ids, **extra)


def run_arrays(model: Any, arrays: Mapping[str, torch.Tensor]) -> Any:
    """One forward pass over ``arrays``, by the names that the model's forward has for them, nothing cached."""
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with eager_experts(model):
        return model(**arrays, **extra)


def array_names(model: Any) -> tuple[str, ...]:
    """Arrays that the model's forward takes, its main one first."""
    parameters = inspect.signature(model.forward).parameters.values()
    names = [item.name for item in parameters if item.kind is item.POSITIONAL_OR_KEYWORD and not _is_switch(item)]
    return tuple(sorted(names, key=lambda name: name != model.main_input_name))


def _is_switch(parameter: inspect.Parameter) -> bool:
    """Whether a parameter of forward says how to run, or what earlier runs left, rather than on what."""
    name = parameter.name
    return (
        "bool" in str(parameter.annotation)
        or name.startswith(("output_", "return_", "use_", "past_"))
        or name in ("cache_position", "encoder_outputs", "logits_to_keep")
    )


def test_tokens(model: Any) -> torch.Tensor:
    """Random token ids (1, position), on the model's device."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary(model), (1, TEST_TOKENS), generator=generator)
    return ids.to(next(model.parameters()).device)


def vocabulary(model: Any) -> int:
    """Token ids that the model has an embedding for."""
    embedding: Any = model.get_input_embeddings()
    # Music models have one table per codebook; a few have none that is a plain matrix.
    embedding = embedding[0] if isinstance(embedding, torch.nn.ModuleList) else embedding
    if isinstance(getattr(embedding, "weight", None), torch.Tensor):
        return int(embedding.weight.shape[0])
    return int(model.config.get_text_config().vocab_size)


@torch.no_grad()
def is_causal(model: Any) -> bool:
    """Whether no token sees a later one and it predicts tokens.

    Asked of the instance: two dozen encoder types pass for causal language models by their class.
    """
    return not model.config.is_encoder_decoder and shows_causal(run_text(model, causal_rows(model)))


def causal_rows(model: Any) -> torch.Tensor:
    """Token ids of two sequences that differ in their last token only, for `shows_causal`."""
    rows = test_tokens(model)[:, :_CAUSAL_TOKENS].repeat(2, 1)
    rows[1, -1] = (rows[1, -1] + 1) % vocabulary(model)
    return rows


def shows_causal(output: Any) -> bool:
    """Whether a model's output for `causal_rows` predicts tokens, and differs at the last one only."""
    if not hasattr(output, "logits"):
        return False
    first, second = output.logits[:, :-1].float()
    return float((first - second).abs().max()) <= 1e-3 * float(first.abs().max())


@contextlib.contextmanager
def eager_experts(model: Any) -> Iterator[None]:
    """Experts one after the other, each a plain product of its own tokens, which is what can be followed."""
    configs = [
        module.config
        for module in model.modules()
        if getattr(getattr(module, "config", None), "_experts_implementation", None) not in (None, "eager")
    ]
    before = [config._experts_implementation for config in configs]
    for config in configs:
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._experts_implementation = implementation
