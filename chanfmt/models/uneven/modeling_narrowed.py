"""A stock transformers model whose FFNs have widths of their own, as the list ``narrowed_ffns`` in its config says.

This file was written by chanfmt and belongs to the model in this directory. Licence: Apache-2.0.
"""

import copy
from typing import Any

import torch
import transformers
from torch import nn


class Narrowed:
    """What this file adds to a stock class: each FFN of the list gets its own width.

    Each entry of the list names a module, and the values of config fields with which the stock class gives the module its width:
    ``{"module": "model.layers.3.mlp", "fields": {"intermediate_size": 96}}``.
    """

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        stock = next(kind for kind in type(self).__mro__ if kind.__module__.startswith("transformers."))
        samples: dict[str, Any] = {}
        for entry in getattr(config, "narrowed_ffns", None) or ():
            key = repr(entry["fields"])
            if key not in samples:
                # The meta device holds shapes and no numbers, so another model costs nothing.
                with torch.device("meta"):
                    samples[key] = stock(_with(config, entry["fields"]), *args, **kwargs)
            _narrow(self.get_submodule(entry["module"]), samples[key].get_submodule(entry["module"]))  # type: ignore[attr-defined]

    @classmethod
    def is_custom_code(cls) -> bool:
        """Say no: the tensors have the names of the stock class, so transformers should rename and merge them as for that class."""
        return False


def _with(config: Any, fields: dict[str, Any]) -> Any:
    """A copy of ``config`` with other values of fields, whose names are dotted if they are nested."""
    config = copy.deepcopy(config)
    for path, value in fields.items():
        *parents, last = path.split(".")
        place = config
        for name in parents:
            place = getattr(place, name)
        setattr(place, last, value)
    return config


def _narrow(module: nn.Module, sample: nn.Module) -> None:
    """Give ``module`` the shapes of ``sample``, and the numbers that its modules derive from them, such as ``out_features``."""
    for name, like in sample.named_modules():
        own = module.get_submodule(name)
        for key, parameter in like.named_parameters(recurse=False):
            old = getattr(own, key)
            if old.shape != parameter.shape:
                values = old.detach()[tuple(slice(size) for size in parameter.shape)].clone()
                setattr(own, key, nn.Parameter(values, requires_grad=old.requires_grad))
        for key, value in vars(like).items():
            if not key.startswith("_") and _is_size(value) and _is_size(vars(own).get(key)):
                setattr(own, key, value)


def _is_size(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_size, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def __getattr__(name: str) -> Any:
    """The stock class ``name`` with narrowed FFNs. It is made once, when transformers asks for it."""
    stock = getattr(transformers, name, None)
    if name.startswith("_") or not (isinstance(stock, type) and issubclass(stock, transformers.PreTrainedModel)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    kind = type(name, (Narrowed, stock), {"__module__": __name__, "__doc__": f"`transformers.{name}` with narrowed FFNs."})
    globals()[name] = kind
    return kind
