"""Run a model's own forward pass with the weights of one block in memory: each block is loaded when its turn comes.

Unlike `chanfmt.models.streaming.chain.Chain`, nothing is assumed about what blocks pass to each other. A block may see
several earlier blocks, or run twice, and encoder-decoders run too. Only forward passes are possible.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from chanfmt.models.streaming.blocks import Blocks, UnstreamableError, check_unshared, outer_lists
from chanfmt.models.streaming.parameters import StoredParameters, weightless

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from chanfmt.models.source import ModelSource

    Inside = Callable[[str, nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class OnDemand(Blocks):
    """A model whose blocks, and embeddings that share no weight, have weights while they run in the body of `running`."""

    @property
    def keys(self) -> dict[str, set[str]]:
        """Names in which the checkpoint and the model differ, as ``from_pretrained`` reports them."""
        assert self._stored is not None
        return {"missing_keys": self._stored.missing, "unexpected_keys": self._stored.unexpected}

    @contextlib.contextmanager
    def running(self, inside: Inside) -> Iterator[None]:
        """In the body, forward passes of the model load its parts, each when its turn comes.

        Args:
            inside: Called instead of a part's ``forward`` while the part is loaded, with the part's name, the part, the part's
                ``forward``, and the positional and named arguments. It returns the part's output.

        Raises:
            UnstreamableError: The model uses a weight of a part that does not run.
        """
        forwards = [block.forward for block in self._blocks]
        for number, block in enumerate(self._blocks):
            block.forward = partial(self._run, number, forwards[number], inside)
        try:
            with _OnlyValues(type(self.model).__name__):
                yield
        finally:
            for block, forward in zip(self._blocks, forwards, strict=True):
                block.forward = forward

    def _run(self, number: int, forward: Callable[..., Any], inside: Inside, /, *args: Any, **kwargs: Any) -> Any:
        with contextlib.ExitStack() as stack:
            with _disable_current_modes():
                block = stack.enter_context(self.loaded(number))
            return inside(self.names[number], block, forward, args, kwargs)


class _OnlyValues(TorchDispatchMode):
    """In the body, an operation on a tensor without values raises `UnstreamableError`.

    torch itself raises no error for some of these operations: an embedding returns arbitrary numbers for indices without values.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self._kind = kind

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in tree_leaves((args, kwargs, result))):
            raise UnstreamableError(f"{self._kind} uses weights of a block that does not run")
        return result


def open_on_demand(
    loader: Any,
    config: Any,
    source: ModelSource,
    dtype: torch.dtype,
    *,
    embeddings: bool = True,
    check_memory: Callable[[int], None] = lambda needed: None,
) -> OnDemand:
    """Open the model of ``config`` on the CPU, with the files of ``source``.

    Args:
        loader: An Auto class, or the model's own class.
        embeddings: Whether embeddings that share no weight are parts as well. Otherwise, they have their weights from the
            beginning.
        check_memory: Called with the bytes of memory that a forward pass needs, before any weight is read. It may raise.

    Raises:
        UnstreamableError: The model has no list of blocks, blocks share weights, or the checkpoint lacks weights.
        ModelError: transformers cannot build the model, or a weight cannot be read or has another shape.
    """
    model = weightless(loader, config, dtype, trust_remote_code=source.trust_remote_code)
    parts = _parts(model, embeddings)
    stored = StoredParameters(model, source, dtype)
    _check_stored(model, stored)
    check_unshared(model, parts)
    sizes = [_elements(module) for module in parts.values()]
    # While a part is loaded, its stored tensors are in memory beside the converted weights.
    stored_size = source.index.nbytes / max(1, source.index.parameters)
    check_memory(round((_elements(model) - sum(sizes) + max(sizes)) * dtype.itemsize + max(sizes) * stored_size))
    return OnDemand(model, stored, torch.device("cpu"), parts)


def _check_stored(model: Any, stored: StoredParameters) -> None:
    """Raise `UnstreamableError` if a parameter is not in the checkpoint. ``from_pretrained`` computes some (sinusoids)."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    missing = stored.missing
    for of_one in names.values():
        if missing.issuperset(of_one):
            raise UnstreamableError(f"the checkpoint of {type(model).__name__} lacks {of_one[0]}")


def _parts(model: Any, embeddings: bool) -> dict[str, nn.Module]:
    parts: dict[str, nn.Module] = {}
    for name, modules in outer_lists(model):
        parts |= _elements_of(name, modules)
    if not parts:
        raise UnstreamableError(f"{type(model).__name__} has no list of blocks")
    return parts | {name: module for name, module in _lone_embeddings(model).items() if embeddings and not _within(name, parts)}


def _within(name: str, parts: Iterable[str]) -> bool:
    return any(f"{name}.".startswith(f"{part}.") for part in parts)


def _lone_embeddings(model: Any) -> dict[str, nn.Module]:
    """The modules that turn tokens into vectors, and vectors into logits, if they share no weight and the model names them."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for method in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):
            module = getattr(model, method)()
            if module in names and all(uses[id(parameter)] == 1 for parameter in module.parameters()):
                found[names[module]] = module
    return found


def _elements_of(name: str, modules: nn.ModuleList) -> dict[str, nn.Module]:
    """The modules in a list of layers, and in the lists that are its elements."""
    found: dict[str, nn.Module] = {}
    for child, module in modules.named_children():
        place = f"{name}.{child}"
        found |= _elements_of(place, module) if isinstance(module, nn.ModuleList) else {place: module}
    return found


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
