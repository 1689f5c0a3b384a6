"""The transformers class that loads a saved model, and its instance without numbers."""

from __future__ import annotations

import copy
from typing import Any

from chanfmt.base.errors import ModelError, first_line
from chanfmt.models.own import own_model_class
from chanfmt.models.quiet import quiet_transformers


def auto_class(config: Any) -> Any:
    """The transformers class that loads the saved model: with its head if ``config`` names one, otherwise without."""
    import transformers
    from transformers.models.auto import modeling_auto

    if own := own_model_class(config):
        return own
    saved = str((config.architectures or [""])[0])
    for names, loader in (
        (modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForCausalLM),
        (modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES, transformers.AutoModelForSeq2SeqLM),
        (modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES, transformers.AutoModelForMaskedLM),
        (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, transformers.AutoModelForImageTextToText),
        (modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, transformers.AutoModelForImageClassification),
        (modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES, transformers.AutoModelForAudioClassification),
        (modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES, transformers.AutoModelForSpeechSeq2Seq),
        (modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES, transformers.AutoModelForCTC),
    ):
        if _names(names.get(config.model_type)) & {saved}:
            return loader
    # No automatic class knows the configs of a few text models; they are saved under the names of their own classes.
    if isinstance(getattr(transformers, saved, None), type) and saved.endswith(("CausalLM", "ConditionalGeneration", "MaskedLM")):
        return getattr(transformers, saved)
    # Remote code has classes of its own; a base model that was saved without its head names no class with a head.
    known = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if saved.endswith("CausalLM") or (not saved and config.model_type in known):
        return transformers.AutoModelForCausalLM
    return transformers.AutoModel


def _names(value: Any) -> set[str]:
    return set(value) if isinstance(value, tuple | list) else {value}


def shapes_only(loader: Any, config: Any, *, trust_remote_code: bool = False) -> Any:
    """Build the model of ``config`` on the meta device: it has names, shapes and ties, but no numbers.

    Args:
        loader: An Auto class, or the model's own class.

    Raises:
        ModelError: transformers cannot build the model.
    """
    import torch

    config = copy.deepcopy(config)
    try:
        with quiet_transformers(), torch.device("meta"):
            if hasattr(loader, "from_config"):
                return loader.from_config(config, trust_remote_code=trust_remote_code)
            return loader._from_config(config)
    except Exception as error:
        raise ModelError(f"transformers cannot build {config.model_type}: {first_line(error)}") from None
