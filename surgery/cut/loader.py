"""The transformers class that a user loads a result with."""

from __future__ import annotations

from typing import Any

from chanfmt.models.classes import auto_class
from chanfmt.models.own import is_own
from surgery.cut.stock import parse_config


def loader_name(config: dict[str, Any]) -> str:
    """Name of the Auto class that loads a checkpoint of ``config`` with its head.

    The checks load heads that are not measured (of classifiers, for example) as ``AutoModel``, without the head. A user wants
    the head too.

    Raises:
        ModelError: The config cannot be read.
    """
    from transformers.models.auto import modeling_auto

    parsed = parse_config(config)
    if is_own(config):
        return "AutoModelForCausalLM"
    saved = str((parsed.architectures or [""])[0])
    for task, loader in (
        ("SEQUENCE_CLASSIFICATION", "AutoModelForSequenceClassification"),
        ("TOKEN_CLASSIFICATION", "AutoModelForTokenClassification"),
        ("QUESTION_ANSWERING", "AutoModelForQuestionAnswering"),
        ("MULTIPLE_CHOICE", "AutoModelForMultipleChoice"),
    ):
        known = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").get(parsed.model_type, ())
        if saved in ((known,) if isinstance(known, str) else known):
            return loader
    return auto_class(parsed).__name__
