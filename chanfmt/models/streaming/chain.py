"""A model as a chain of blocks whose weights come and go, between parts that stay.

The model's own ``forward`` runs with the ``forward`` of its blocks replaced. It makes the arguments of every block (masks,
position embeddings), and computes everything before the first block and behind the last. The blocks themselves are run by
`Chain`, one by one. `chanfmt.models.streaming.streamed` checks that the result is the model's own.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chanfmt.models.streaming.blocks import HINT, Blocks, UnstreamableError, outer_lists

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from chanfmt.models.streaming.parameters import StoredParameters

    Handler = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]

_MAX_RETURNED = 3


@dataclass(frozen=True)
class Call:
    """The arguments of a block besides the hidden state.

    Attributes:
        slot: Position or name of the argument that is the hidden state. In ``args`` or ``kwargs``, None stands in its place.
        args, kwargs: The arguments.
    """

    slot: int | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def same(self, other: Call) -> bool:
        """Whether ``other`` has the same arguments."""
        return self.slot == other.slot and equal(self.args, other.args) and equal(self.kwargs, other.kwargs)

    def filled(self, hidden: torch.Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with ``hidden`` in its place."""
        if isinstance(self.slot, str):
            return self.args, self.kwargs | {self.slot: hidden}
        return (*self.args[: self.slot], hidden, *self.args[self.slot + 1 :]), self.kwargs


class _Recorded(Exception):
    """Raised when the last block is reached, because nothing behind it is wanted."""


class Chain(Blocks):
    """The blocks of a model, and the parts around them.

    A block has weights in the body of `loaded` only; the other parts of the model always have them. If the model runs outside
    the methods of this class, its blocks return their hidden state as it is.

    Args:
        model: A model without weights, as `chanfmt.models.streaming.parameters.weightless` makes it.
        stored: Gives the model its weights; None if ``model`` has all of them already, and keeps them.
        device: The device that the model runs on.

    Attributes:
        names: Names of the blocks, in order.

    Raises:
        ModelError: The model is not a chain of blocks, or weights are missing.
    """

    def __init__(self, model: Any, stored: StoredParameters | None, device: torch.device) -> None:
        super().__init__(model, stored, device, _blocks(model))
        self._forwards = [block.forward for block in self._blocks]
        self._own = [block.__dict__.get("forward") for block in self._blocks]
        self._handler: Handler = self._pass_on
        self._returned = 0
        """Length of the tuple that a block returns, the hidden state first; 0 if it returns the hidden state itself."""
        for number, block in enumerate(self._blocks):
            block.forward = self._replacement(number)

    def close(self) -> None:
        """Give the blocks back the ``forward`` that they had. The chain cannot be run after that."""
        for block, own in zip(self._blocks, self._own, strict=True):
            if own is not None:
                block.forward = own
            else:
                block.__dict__.pop("forward", None)

    def run(self, number: int, call: Call, hidden: torch.Tensor) -> torch.Tensor:
        """Run block ``number``, which is loaded, on ``hidden`` (sequence, position, feature). Returns its hidden state."""
        args, kwargs = call.filled(hidden)
        return state_of(self._forwards[number](*args, **kwargs))

    def learn(self, run: Callable[[], object]) -> tuple[torch.Tensor, list[Call]]:
        """Do as `calls` for the first time: find out by trying whether a block returns the hidden state or a tuple, and how long."""
        errors = []
        for self._returned in range(_MAX_RETURNED + 1):
            try:
                return self.calls(run)
            except Exception as error:
                errors.append(error)
        raise errors[0]

    def calls(self, run: Callable[[], object]) -> tuple[torch.Tensor, list[Call]]:
        """The hidden state that ``run()``, a forward pass of the model, gives the first block, and the calls of all blocks.

        Raises:
            ModelError: The model does not call its blocks one after the other, each with the state before.
        """
        seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        given: list[Any] = []

        def record(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if number != len(seen):
                raise self.refused(f"calls {self.names[number]} out of order")
            seen.append((args, kwargs))
            if len(seen) == len(self):
                raise _Recorded
            # The next block's argument is known by its identity, so each block returns a tensor of its own.
            given.append(self._first(args, kwargs).clone())
            return self._wrapped(given[-1])

        with self._handled(record), contextlib.suppress(_Recorded):
            run()
        if len(seen) < len(self):
            raise self.refused(f"leaves out {self.names[len(seen)]}")
        slots: list[Any] = [_slot(state, *arguments) for state, arguments in zip(given, seen[1:], strict=True)]
        slots.insert(0, slots[0] if slots else (0 if seen[0][0] else "hidden_states"))
        calls = []
        for name, slot, (args, kwargs) in zip(self.names, slots, seen, strict=True):
            if slot is None:
                raise self.refused(f"does not give {name} what the block before it returned")
            calls.append(Call(slot, *Call(slot, args, kwargs).filled(None)))
        args, kwargs = seen[0]
        return kwargs[slots[0]] if isinstance(slots[0], str) else args[slots[0]], calls

    @contextlib.contextmanager
    def ending(self, hidden: torch.Tensor) -> Iterator[None]:
        """In the body, forward passes of the model continue from ``hidden`` as the output of the last block."""

        def end(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._wrapped(hidden) if number == len(self) - 1 else self._pass_on(number, args, kwargs)

        with self._handled(end):
            yield

    @contextlib.contextmanager
    def running(self, inside: Callable[[int, tuple[Any, ...], dict[str, Any], Callable[[], Any]], Any]) -> Iterator[None]:
        """In the body, forward passes of the model run the blocks.

        Args:
            inside: Called for every block with its number, its arguments and a function that runs it; returns the function's
                result.
        """

        def through(number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return inside(number, args, kwargs, lambda: self._forwards[number](*args, **kwargs))

        with self._handled(through):
            yield

    def refused(self, what: str) -> UnstreamableError:
        """The error that says why the model cannot be run block by block."""
        return UnstreamableError(f"{type(self.model).__name__} cannot be run block by block: it {what}", hint=HINT)

    def _replacement(self, number: int) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._handler(number, args, kwargs)

    @contextlib.contextmanager
    def _handled(self, handler: Handler) -> Iterator[None]:
        before, self._handler = self._handler, handler
        try:
            yield
        finally:
            self._handler = before

    def _pass_on(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self._wrapped(self._first(args, kwargs))

    def _first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        value = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(value, torch.Tensor):
            raise self.refused("calls its blocks with something other than a hidden state")
        return value

    def _wrapped(self, hidden: torch.Tensor) -> Any:
        return (hidden, *[None] * (self._returned - 1)) if self._returned else hidden


def state_of(output: Any) -> torch.Tensor:
    """The hidden state in the output of a block."""
    return output[0] if isinstance(output, tuple) else output


def equal(one: Any, other: Any) -> bool:
    """Whether two arguments, or containers of them, are the same; tensors by value."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.shape == other.shape and bool(torch.equal(one, other))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


def _slot(hidden: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | str | None:
    """Position or name of the argument that is ``hidden`` itself; None if there is none."""
    places: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return next((place for place, value in places if value is hidden), None)


def _blocks(model: Any) -> dict[str, nn.Module]:
    """Names and modules of the largest list of layers, by parameters, among the lists that lie in no other list."""
    kind = type(model).__name__
    if model.config.is_encoder_decoder:
        what = "its decoder's blocks read its encoder as well as each other"
        raise UnstreamableError(f"{kind} cannot be run block by block: {what}", hint=HINT)
    lists = outer_lists(model)
    if not lists:
        raise UnstreamableError(f"{kind} cannot be run block by block: it has no list of blocks", hint=HINT)
    name, largest = max(lists, key=lambda item: sum(parameter.numel() for parameter in item[1].parameters()))
    return {f"{name}.{child}": module for child, module in largest.named_children()}
