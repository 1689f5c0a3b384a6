"""Load a resolved model for measuring: frozen, in evaluation mode, refused where it cannot be measured."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from chanfmt.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from transformers import PreTrainedModel

    from chanfmt.models.resolve import ResolvedModel

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


def load_config(resolved: ResolvedModel, *, trust_remote_code: bool = False) -> Any:
    """The model's config, after refusing what cannot be measured.

    Raises:
        ModelError: Unknown model type, remote code without consent, quantised weights, or a model
            that predicts no next token.
    """
    import transformers

    with quiet_transformers():
        try:
            config = transformers.AutoConfig.from_pretrained(resolved.directory, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            text = str(error)
            if "trust_remote_code" in text:
                raise ModelError(
                    f"{resolved.id} needs code from its repository", hint="read that code, then add --trust-remote-code"
                ) from None
            raise ModelError(f"{resolved.id}: transformers cannot read its config: {text.splitlines()[0]}") from None
    if getattr(config, "quantization_config", None):
        method = config.quantization_config
        name = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", "unknown")
        raise ModelError(
            f"{resolved.id} is quantised ({name}); its weights cannot be measured or cut channel by channel",
            hint="use the unquantised checkpoint it was made from",
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{resolved.id} is an encoder-decoder ({config.model_type}); only causal models are measured")
    if config.model_type in ("bert", "roberta", "electra", "camembert") and not config.is_decoder:
        raise ModelError(
            f"{resolved.id} is an encoder ({config.model_type}); it has no next-token loss to measure against",
            hint="causal language models, and BERT-like ones with is_decoder=true, can be measured",
        )
    return config


def load_model(
    resolved: ResolvedModel, *, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """A stock causal LM on its device, in evaluation mode, with every parameter frozen.

    Args:
        dtype: One of `DTYPES`; ``auto`` is float32 on a CPU and the checkpoint's own elsewhere.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...

    Raises:
        ModelError: transformers cannot load it, weights are missing, or memory runs out.
    """
    import torch
    import transformers

    place = pick_device(device)
    if dtype not in DTYPES:
        raise ModelError(f"--dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    wanted: Any = dtype
    if dtype != "auto":
        wanted = getattr(torch, dtype)
    elif place.type == "cpu":
        wanted = torch.float32
    try:
        with quiet_transformers():
            model, info = transformers.AutoModelForCausalLM.from_pretrained(
                resolved.directory, dtype=wanted, use_safetensors=True,
                trust_remote_code=trust_remote_code, output_loading_info=True,
            )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"{resolved.id}: transformers cannot load it: {str(error).splitlines()[0]}") from None
    if info["missing_keys"]:
        name = sorted(info["missing_keys"])[0]
        raise ModelError(
            f"{resolved.id}: the checkpoint lacks {len(info['missing_keys'])} weights, {name} among them",
            hint="a model with random weights cannot be measured; is this the complete causal-LM checkpoint?",
        )
    try:
        model = model.to(place)
    except torch.OutOfMemoryError:
        raise ModelError(
            f"{resolved.id} does not fit on {place}", hint="use --dtype bfloat16, --device cpu, or a larger GPU"
        ) from None
    model.eval()
    model.requires_grad_(False)
    return model


def load_tokenizer(resolved: ResolvedModel, *, trust_remote_code: bool = False) -> Any:
    """The model's tokenizer. Raises `ModelError` where it has none."""
    import transformers

    with quiet_transformers():
        try:
            return transformers.AutoTokenizer.from_pretrained(
                resolved.directory, trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(
                f"{resolved.id} has no tokenizer that transformers can load: {str(error).splitlines()[0]}",
                hint="save the tokenizer into the same directory",
            ) from None


def pick_device(device: str) -> torch.device:
    """``auto`` is the first GPU where there is one. Raises `ModelError` for a device that is not there."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ModelError(f"--device {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return place


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars and log lines off stderr; what goes wrong still raises."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
