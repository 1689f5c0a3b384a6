"""Find the FFNs of a loaded model by what its modules do, not by what they are called.

A write projection is a linear map whose input is an elementwise function of the outputs of read
projections of the same width, and of nothing else. Shapes and execution order propose; a probe on
the instance decides. The probe reruns the smallest module that holds both, with the reads' outputs
replaced by numbers of ours, and looks at the write's input:

* closure: other inputs to the module, same read outputs: the write's input must not change;
* tokens: a read output changed at one token moves the write's input at that token only;
* channels: token t gets its channels changed by bit t of the channel index (and by its
  complement); exactly the channels with that bit must move. Over all bits this proves that
  every channel of the write depends on its own channel of the reads and on no other.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from chanfmt.errors import ModelError, first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

HALVES, INTERLEAVED, WHOLE = "halves", "interleaved", "whole"


@dataclass(frozen=True)
class Read:
    """One role of a read projection: channel i is output ``start + i * step`` of ``module``."""

    module: str
    role: str
    start: int
    step: int


@dataclass(frozen=True)
class FFN:
    """One FFN as found in a model.

    Attributes:
        layer_index: Position of its block in the model.
        container: Smallest module that holds reads and write.
        write: Name of the write projection.
        reads: One `Read` per role, ``gate`` first where there is one.
        width: Number of channels.
    """

    layer_index: int
    container: str
    write: str
    reads: tuple[Read, ...]
    width: int

    @property
    def gated(self) -> bool:
        return any(read.role == "gate" for read in self.reads)


def find_ffns(model: nn.Module, vocab_size: int) -> list[FFN]:
    """Every FFN of ``model``, verified on the instance, in model order.

    Raises:
        ModelError: None was found, a block has none where its siblings have one, or a block holds
            FFN weights that are not plain linear modules; the message names the module.
    """
    _refuse_experts(model)
    finder = _Finder(model, vocab_size)
    ffns = [ffn for name in finder.order if (ffn := finder.examine(name)) is not None]
    _check_complete(model, finder, ffns)
    return ffns


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is a linear map with its weight as a plain matrix."""
    return isinstance(module, nn.Linear | Conv1D)


def widths(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear module."""
    rows, columns = module.weight.shape  # type: ignore[misc]
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


class _Stop(Exception):
    """Ends a probe once the write's input is known; the rest of the module is of no interest."""


class _Finder:
    def __init__(self, model: nn.Module, vocab_size: int) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.linears = {name: module for name, module in self.modules.items() if is_linear(module)}
        if not self.linears:
            raise ModelError(f"{type(model).__name__} has no linear modules, so no FFN can be found")
        largest = max(max(widths(module)) for module in self.linears.values())
        self.bits = max(1, (largest - 1).bit_length())
        self.generator = torch.Generator().manual_seed(0)
        device = next(model.parameters()).device
        self.ids = torch.randint(0, vocab_size, (1, 2 * self.bits), generator=self.generator).to(device)
        self.order: list[str] = []
        self.calls: dict[str, int] = dict.fromkeys(self.linears, 0)
        self.captured: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._record_order()

    def examine(self, write: str) -> FFN | None:
        """The FFN that ``write`` closes, or None where it is another kind of linear map."""
        block = block_of(write)
        if block is None or self.calls[write] != 1:
            return None
        width = widths(self.linears[write])[0]
        before = self.order[: self.order.index(write)]
        container = write
        tried: list[str] = []
        while container != block:
            container = container.rpartition(".")[0]
            reads = [name for name in before if name.startswith(container + ".") and self.calls[name] == 1
                     and widths(self.linears[name])[1] in (width, 2 * width)]
            if reads and reads != tried:
                tried = reads
                found = self._probe(container, write, reads, width)
                if found is not None:
                    self._check_plain(write, found)
                    return FFN(layer_of(write), container, write, found, width)
        return None

    def _probe(self, container: str, write: str, reads: list[str], width: int) -> tuple[Read, ...] | None:
        probe = _Probe(self, container, write, reads, width)
        if not probe.closed():
            return None
        influential = [name for name in reads if probe.influences(name)]
        if not influential or not probe.keeps_tokens_apart(influential):
            return None
        layouts = [WHOLE] if all(probe.outputs[name] == width for name in influential) else [HALVES, INTERLEAVED]
        for layout in layouts:
            if probe.keeps_channels_apart(influential, layout):
                return probe.roles(influential, layout)
        return None

    def _record_order(self) -> None:
        def ran(name: str, *_: Any) -> None:
            self.order.append(name)
            self.calls[name] += 1

        handles = [module.register_forward_hook(partial(ran, name)) for name, module in self.linears.items()]
        try:
            with torch.no_grad():
                self.model(self.ids, use_cache=False)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise ModelError(
                f"{type(self.model).__name__} cannot run {self.ids.shape[1]} tokens: {first_line(error)}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()

    def inputs_of(self, container: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What ``container`` was called with in a forward pass; captured for a whole layer list at once."""
        if container not in self.captured:
            suffix = container[len(block_of(container) or container):]
            siblings = {block_of(name) + suffix for name in self.linears if block_of(name) is not None}  # type: ignore[operator]

            def keep(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                self.captured[name] = (args, kwargs)

            handles = [self.modules[name].register_forward_pre_hook(partial(keep, name), with_kwargs=True)
                       for name in siblings if name in self.modules]
            with torch.no_grad():
                self.model(self.ids, use_cache=False)
            for handle in handles:
                handle.remove()
        return self.captured[container]

    def _check_plain(self, write: str, reads: tuple[Read, ...]) -> None:
        for name in {write, *(read.module for read in reads)}:
            module = self.linears[name]
            inputs, _ = widths(module)
            weight: torch.Tensor = module.weight.detach()
            x = torch.randn(4, inputs, generator=self.generator).to(weight)
            matrix = weight if isinstance(module, Conv1D) else weight.T
            with torch.no_grad():
                expected = (x @ matrix + (module.bias if module.bias is not None else 0)).float()
                result = module(x).float()
            if not torch.allclose(result, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max())):
                raise ModelError(f"{name} is not a plain linear map ({type(module).__name__}); it cannot be cut")


class _Probe:
    """Runs of one container with the outputs of its candidate reads under our control."""

    def __init__(self, finder: _Finder, container: str, write: str, reads: list[str], width: int) -> None:
        self.finder = finder
        self.container = finder.modules[container]
        self.write = finder.linears[write]
        self.reads = {name: finder.linears[name] for name in reads}
        self.outputs = {name: widths(module)[1] for name, module in self.reads.items()}
        self.width = width
        self.args, self.kwargs = finder.inputs_of(container)
        weight: torch.Tensor = self.write.weight
        # Positive and away from zero, where every activation in use rises: a rectifier's flat
        # half would hide a dependence.
        self.base = {
            name: (0.5 + torch.rand(finder.ids.shape[1], size, generator=finder.generator)).to(weight)
            for name, size in self.outputs.items()
        }
        self.reference = self.run(self.base)

    def run(self, values: dict[str, torch.Tensor], *, disturb: bool = False) -> torch.Tensor | None:
        """The write's input, (token, channel), with read outputs ``values``; None where it cannot be run."""
        seen: list[torch.Tensor] = []

        def give(name: str, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
            return values[name].reshape(output.shape)

        def take(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            seen.append(args[0].detach().clone())
            raise _Stop

        handles = [module.register_forward_hook(partial(give, name)) for name, module in self.reads.items()]
        handles.append(self.write.register_forward_pre_hook(take))
        args, kwargs = self._disturbed() if disturb else (self.args, self.kwargs)
        try:
            with torch.no_grad():
                self.container(*args, **kwargs)
        except _Stop:
            pass
        except (RuntimeError, ValueError, TypeError, IndexError):
            return None
        finally:
            for handle in handles:
                handle.remove()
        if not seen or seen[0].numel() != self.finder.ids.shape[1] * self.width:
            return None
        return seen[0].reshape(-1, self.width)

    def closed(self) -> bool:
        """Whether the write's input is a function of the candidate reads' outputs alone."""
        if self.reference is None:
            return False
        other = self.run(self.base, disturb=True)
        return other is not None and torch.equal(other, self.reference)

    def influences(self, name: str) -> bool:
        """Whether the output of read ``name`` reaches the write's input."""
        moved = self._moved({name: torch.ones_like(self.base[name], dtype=torch.bool)})
        return moved is not None and bool(moved.any())

    def keeps_tokens_apart(self, names: list[str]) -> bool:
        """Whether a change at the first token stays there."""
        marks = {}
        for name in names:
            marks[name] = torch.zeros_like(self.base[name], dtype=torch.bool)
            marks[name][0] = True
        moved = self._moved(marks)
        return moved is not None and bool(moved[0].all()) and not bool(moved[1:].any())

    def keeps_channels_apart(self, names: list[str], layout: str) -> bool:
        """Whether each channel of the write follows its own channel of each read, and no other."""
        tokens, bits = self.finder.ids.shape[1], self.finder.bits
        channel = torch.arange(self.width)
        pattern = torch.stack([
            ((channel >> (token % bits)) & 1 == (1 if token < bits else 0)) for token in range(tokens)
        ]).to(self.base[names[0]].device)
        marks = {name: self._spread(pattern, self.outputs[name], layout) for name in names}
        together = self._moved(marks)
        if together is None or not torch.equal(together, pattern):
            return False
        for name in names:
            for start, step in _parts(layout, self.outputs[name], self.width):
                alone = torch.zeros_like(marks[name])
                alone[:, start::step][:, : self.width] = pattern
                moved = self._moved({name: alone})
                if moved is None or bool((moved & ~pattern).any()):
                    return False
        return True

    def roles(self, names: list[str], layout: str) -> tuple[Read, ...] | None:
        """Which part is the gate: the one that does not pass through linearly."""
        parts = [(name, start, step) for name in names
                 for start, step in _parts(layout, self.outputs[name], self.width)]
        if len(parts) == 1:
            return (Read(*_named(parts[0], "up")),)
        if len(parts) != 2:
            return None
        linear = [self._is_linear_in(*part) for part in parts]
        named = 1 if "gate" in parts[1][0].rpartition(".")[2] else 0
        gate = named if linear[0] == linear[1] else linear.index(False)
        return (Read(*_named(parts[gate], "gate")), Read(*_named(parts[1 - gate], "up")))

    def _is_linear_in(self, name: str, start: int, step: int) -> bool:
        values = dict(self.base)
        values[name] = values[name].clone()
        values[name][:, start::step][:, : self.width] *= 2
        result = self.run(values)
        if result is None or self.reference is None:
            return False
        # Doubling is exact in binary floating point, so a linear part doubles to the last bit or nearly.
        return torch.allclose(result, 2 * self.reference, rtol=1e-3, atol=0)

    def _moved(self, marks: dict[str, torch.Tensor]) -> torch.Tensor | None:
        values = {name: torch.where(marks[name], value + 0.5, value) if name in marks else value
                  for name, value in self.base.items()}
        result = self.run(values)
        if result is None or self.reference is None:
            return None
        return result != self.reference

    def _spread(self, pattern: torch.Tensor, outputs: int, layout: str) -> torch.Tensor:
        marks = torch.zeros(pattern.shape[0], outputs, dtype=torch.bool, device=pattern.device)
        for start, step in _parts(layout, outputs, self.width):
            marks[:, start::step][:, : self.width] = pattern
        return marks

    def _disturbed(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The captured call with its hidden states changed; masks and positions stay."""
        def other(value: torch.Tensor) -> torch.Tensor:
            return value + torch.randn(value.shape, generator=self.finder.generator).to(value)

        if self.args and isinstance(self.args[0], torch.Tensor) and self.args[0].is_floating_point():
            return (other(self.args[0]), *self.args[1:]), self.kwargs
        kwargs = dict(self.kwargs)
        for name in inspect.signature(self.container.forward).parameters:
            value = kwargs.get(name)
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                kwargs[name] = other(value)
                break
        return self.args, kwargs


def block_of(name: str) -> str | None:
    """The element of the model's layer list that ``name`` lies in: ``model.layers.3.mlp`` -> ``model.layers.3``."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return None


def layer_of(name: str) -> int:
    """Layer index of a module below a layer list."""
    block = block_of(name)
    if block is None:
        raise ModelError(f"{name} does not lie in a list of layers")
    return int(block.rpartition(".")[2])


def _parts(layout: str, outputs: int, width: int) -> Iterable[tuple[int, int]]:
    if outputs == width:
        return ((0, 1),)
    return ((0, 1), (width, 1)) if layout == HALVES else ((0, 2), (1, 2))


def _named(part: tuple[str, int, int], role: str) -> tuple[str, str, int, int]:
    name, start, step = part
    return name, role, start, step


def _check_complete(model: nn.Module, finder: _Finder, ffns: list[FFN]) -> None:
    kind = type(model).__name__
    blocks: dict[str, list[str]] = {}
    for name in finder.linears:
        block = block_of(name)
        if block is not None and block not in (members := blocks.setdefault(block.rpartition(".")[0], [])):
            members.append(block)
    with_ffn = {block_of(ffn.write) for ffn in ffns}
    if not ffns:
        repeated = [name for name in finder.linears if finder.calls[name] > 1]
        reason = f"{repeated[0]} is used by several layers" if repeated else (
            "no linear map in " + (", ".join(f"{name}.*" for name in blocks) or "it")
            + " reads an elementwise function of other linear maps"
        )
        raise ModelError(f"{kind} has no FFN that can be measured: {reason}")
    idle = _first(finder.linears, lambda name: block_of(name) in with_ffn and finder.calls[name] == 0)
    if idle is not None:
        raise ModelError(f"{kind}: {idle} was not reached by a test input; a model measured in part would be cut in part")
    for prefix, members in blocks.items():
        have = [block for block in members if block in with_ffn]
        if have and len(have) < len(members):
            without = next(block for block in members if block not in with_ffn)
            raise ModelError(
                f"{kind}: {without} has no FFN that can be measured, others in {prefix} have one; "
                "a model measured in part would be cut in part"
            )
    _check_unshared(kind, finder, ffns)


def _check_unshared(kind: str, finder: _Finder, ffns: list[FFN]) -> None:
    owners: dict[tuple[Any, ...], str] = {}
    for ffn in ffns:
        for name in dict.fromkeys((ffn.write, *(read.module for read in ffn.reads))):
            weight: torch.Tensor = finder.linears[name].weight
            key = (weight.untyped_storage().data_ptr(), weight.storage_offset())
            if key in owners:
                raise ModelError(f"{kind}: {name} shares its weight with {owners[key]}; it cannot be cut on its own")
            owners[key] = name


def _refuse_experts(model: nn.Module) -> None:
    """Experts' weights lie in 3-D parameters or in lists of modules; either is named before anything runs."""
    for prefix, module in model.named_modules():
        if "expert" not in prefix.rpartition(".")[2].lower() and "expert" not in type(module).__name__.lower():
            continue
        stacked = [name for name, parameter in module.named_parameters(recurse=False) if parameter.ndim == 3]
        if stacked or isinstance(module, nn.ModuleList):
            where = f"{prefix}.{stacked[0]}" if stacked else prefix
            raise ModelError(
                f"{type(model).__name__}: {where} holds the weights of several experts; "
                "mixture-of-experts FFNs are not measured yet"
            )


def _first(names: Iterable[str], test: Callable[[str], bool]) -> str | None:
    return next((name for name in names if test(name)), None)
