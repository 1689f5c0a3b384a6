"""Measure a model that is in memory already."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import UsageError
from chanfmt.base.processes import processes
from chanfmt.building.build import build
from chanfmt.models.memory import in_memory

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

    from chanfmt.building.options import BuildOptions
    from chanfmt.format.records import LabelSettings
    from chanfmt.models.source import ModelSource


def build_loaded(model: PreTrainedModel, tokenizer: Any, options: BuildOptions, settings: LabelSettings, *, id: str = "") -> Path:
    """Measure ``model``, which is in memory, and write its atlas. Returns the path of the atlas.

    The atlas is the one that `chanfmt.building.build.build` writes for the checkpoint that ``model.save_pretrained`` makes.
    ``model`` is left as it was (`chanfmt.models.memory.in_memory`).

    Args:
        tokenizer: The model's tokenizer; None if the model is not measured on text.
        options: As for `build`. ``options.model`` is not used. The dtype and the device are the model's.
        id: Name of the model in the atlas; by default the name that its config holds.

    Raises:
        UsageError: ``options`` ask for streaming or for other files, or torchrun started several processes.
        ChanfmtError, KeyboardInterrupt: As for `build` and `chanfmt.models.memory.in_memory`.
    """
    options.check_in_memory()
    if processes() > 1:
        raise UsageError(
            "a model in memory is measured in one process, and torchrun started several", hint="run it without torchrun"
        )
    with in_memory(model, tokenizer, id=id) as source:

        def found(model: str, *, revision: str | None, trust_remote_code: bool) -> ModelSource:
            return source

        return build(dataclasses.replace(options, model=source.id), settings, found)
