"""Run a model on text or on given arrays, whatever its kind."""

from __future__ import annotations

import contextlib
import inspect
from typing import TYPE_CHECKING, Any

import torch

from chanfmt.base.errors import ModelError, first_line
from chanfmt.models.out_of_memory import out_of_memory_recognised

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

TEST_TOKENS = 32
"""Tokens of the input that FFNs are found and verified with."""
BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens in a batch if the user does not give its size: enough to fill the device, no more."""


def run_text(model: Any, ids: torch.Tensor, *, decoder_ids: torch.Tensor | None = None) -> Any:
    """Run one forward pass over token ids (sequence, position) without a cache. Returns the model's own output.

    Args:
        decoder_ids: Token ids that the decoder of an encoder-decoder reads; by default ``ids``.
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
    """Run one forward pass over ``arrays``, by the argument names of the model's ``forward``, without a cache."""
    extra = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    with eager_experts(model):
        return model(**arrays, **extra)


def array_names(model: Any) -> tuple[str, ...]:
    """Names of the arrays that the model's ``forward`` takes, the main input first."""
    parameters = inspect.signature(model.forward).parameters.values()
    names = [item.name for item in parameters if item.kind is item.POSITIONAL_OR_KEYWORD and not _is_switch(item)]
    return tuple(sorted(names, key=lambda name: name != model.main_input_name))


def _is_switch(parameter: inspect.Parameter) -> bool:
    """Whether a parameter of ``forward`` says how to run, or is what an earlier run left, rather than an input."""
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
    """Number of token ids that the model has an embedding for."""
    embedding: Any = model.get_input_embeddings()
    # Music models have one table per codebook; the tables of a few models are not plain matrices.
    embedding = embedding[0] if isinstance(embedding, torch.nn.ModuleList) else embedding
    if isinstance(getattr(embedding, "weight", None), torch.Tensor):
        return int(embedding.weight.shape[0])
    return int(model.config.get_text_config().vocab_size)


@contextlib.contextmanager
def eager_experts(model: Any) -> Iterator[None]:
    """Run experts one after the other in the body, each as a plain product of its own tokens, which can be followed."""
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


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn the errors of a model that runs ``what`` in the body into `ModelError`, or into `torch.OutOfMemoryError` on any device."""
    try:
        with out_of_memory_recognised():
            yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        raise ModelError(f"the model cannot run {what}: {first_line(error)}") from error


def tokens_at_once(ids: torch.Tensor) -> str:
    """Token ids (sequence, position) as `explained` describes them in an error."""
    return f"{ids.shape[1]} tokens at a time"


def usual_batch(device: torch.device, rows: int) -> int:
    """Sequences in a batch if the user does not give their number, each of ``rows`` tokens."""
    return max(1, BATCH_TOKENS.get(device.type, 4096) // rows)
