"""A transformers model in memory, measured without a change to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from chanfmt.base.errors import UsageError


@dataclass(frozen=True, eq=False, repr=False)
class LoadedModel:
    """A transformers model in memory, with its tokenizer.

    Attributes:
        model: A `transformers.PreTrainedModel`. It stays on its device, in its dtype and in its mode.
        tokenizer: The tokenizer of the model.
        name: What results and errors call the model; by default the name it was loaded by.
        directory, fingerprint: None, because the weights in memory may differ from those in any files.
    """

    model: Any
    tokenizer: Any
    name: str = ""
    directory: ClassVar[None] = None
    fingerprint: ClassVar[None] = None

    def __post_init__(self) -> None:
        if not is_model(self.model) or not callable(self.tokenizer) or is_model(self.tokenizer):
            kinds = f"{type(self.model).__name__} and {type(self.tokenizer).__name__}"
            raise UsageError(f"{kinds} are not a model and its tokenizer", hint="pass a pair: (model, tokenizer)")
        if not self.name:
            # The class is frozen; this is how a field gets a default that depends on another.
            object.__setattr__(self, "name", getattr(self.config, "_name_or_path", "") or type(self.model).__name__)

    def __repr__(self) -> str:
        return f"<LoadedModel {self.name!r}: {type(self.model).__name__}>"

    @property
    def config(self) -> Any:
        """The config of the model."""
        return self.model.config


def is_model(value: Any) -> bool:
    """Whether ``value`` is a transformers model."""
    return hasattr(value, "named_modules") and hasattr(value, "config")
