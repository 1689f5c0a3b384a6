"""Check found FFNs on the instance, with numbers.

One pass records the output of every write projection. Further passes replace the outputs of the write projections by the
recorded ones, so that everything else stays as it was, and replace the outputs of the read projections by numbers of ours:

* One pass changes the outputs of all reads in half of the channels. Which half differs from token to token, by the bits of
  the channel number and by their complements. At the write, exactly these channels may move. Over enough tokens that
  proves that each channel follows its own reads and no other channel's.
* One pass for each role changes the outputs of that role alone. At the write, no other channel may move.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from chanfmt.base.errors import ModelError
from chanfmt.models.find.intercept import Interceptor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from chanfmt.models.ffn import FFN, Matrix, Read

    Records = defaultdict[int, list[torch.Tensor]]


def probe(model: Any, ffns: Sequence[FFN], run: Callable[[], object]) -> None:
    """Verify that each channel of each of ``ffns`` depends on its own reads and on no other channel's.

    Args:
        run: Runs the part of the model that holds ``ffns``, always on the same input.

    Raises:
        ModelError: A channel depends on another channel's reads. The message names the module.
    """
    probe = _Probe(model, ffns, run)
    roles = {read.role for ffn in ffns for read in ffn.members[0].reads}
    probe.compare(None)
    if len(roles) > 1:
        for role in sorted(roles):
            probe.compare(role)


class _Probe:
    def __init__(self, model: Any, ffns: Sequence[FFN], run: Callable[[], object]) -> None:
        self.model = model
        self.forward = run
        self.units = [(ffn, member) for ffn in ffns for member in _distinct(ffn)]
        self.outputs: Records = defaultdict(list)
        interceptor = Interceptor(model)
        for number, (_, member) in enumerate(self.units):
            interceptor.on(member.write.matrix, after=partial(_keep, self.outputs[number]))
        self._run(interceptor)
        self.reference = self.inputs(lambda read, width, value: value)

    def compare(self, role: str | None) -> None:
        """Change the outputs of all reads, or of the reads of one role, in a pattern, and check which inputs of the writes move."""

        def change(read: Read, width: int, value: torch.Tensor) -> torch.Tensor:
            if role not in (None, read.role):
                return value
            changed = value.clone()
            part = changed[..., read.start :][..., :: read.step][..., :width]
            part += 0.5 * _pattern(part)
            return changed

        for number, seen in self.inputs(change).items():
            ffn, _ = self.units[number]
            for before, after in zip(self.reference[number], seen, strict=True):
                if _strays(before != after, _pattern(after), ffn, role):
                    raise ModelError(
                        f"{type(self.model).__name__}: the input of {ffn.write} does not follow its read projections "
                        "channel by channel; it cannot be measured",
                        hint="please report this model",
                    )

    def inputs(self, change: Callable[[Read, int, torch.Tensor], torch.Tensor]) -> Records:
        """The input of each write projection if the output of each read projection is ``change`` of positive numbers."""
        seen: Records = defaultdict(list)
        interceptor = Interceptor(self.model)
        given: dict[Matrix, list[tuple[Read, int]]] = defaultdict(list)
        for number, (ffn, member) in enumerate(self.units):
            interceptor.on(
                member.write.matrix, before=partial(_keep, seen[number]), after=partial(_again, iter(list(self.outputs[number])))
            )
            for read in member.reads:
                given[read.projection.matrix].append((read, ffn.width))
        for matrix, reads in given.items():
            interceptor.on(matrix, after=partial(_give, change, reads))
        self._run(interceptor)
        return seen

    def _run(self, interceptor: Interceptor) -> None:
        with torch.no_grad(), interceptor:
            self.forward()


def _strays(moved: torch.Tensor, pattern: torch.Tensor, ffn: FFN, role: str | None) -> bool:
    """Whether channels moved other than those that should."""
    if ffn.mixed:
        # A norm moves all channels, and a threshold may hold any channel back.
        return role is None and not bool(moved.any())
    return bool((moved & ~pattern).any()) if role else not torch.equal(moved, pattern)


def _distinct(ffn: FFN) -> Sequence[Any]:
    """The members of ``ffn`` that are called one by one. The experts of a batched product are called together, as one."""
    return ffn.members[:1] if ffn.members[0].write.matrix.batched else ffn.members


def _keep(seen: list[torch.Tensor], value: torch.Tensor) -> None:
    seen.append(value.detach().clone())


def _again(recorded: Iterator[torch.Tensor], value: torch.Tensor) -> torch.Tensor:
    return next(recorded)


def _give(
    change: Callable[[Read, int, torch.Tensor], torch.Tensor], reads: Sequence[tuple[Read, int]], output: torch.Tensor
) -> torch.Tensor:
    generator = torch.Generator().manual_seed(output.shape[-1])
    # Every activation in use rises at numbers well above zero. The flat half of a rectifier would hide a dependence.
    value = (0.5 + torch.rand(output.shape, generator=generator)).to(output)
    for read, width in reads:
        value = change(read, width, value)
    return value


def _pattern(values: torch.Tensor) -> torch.Tensor:
    """The channels that are changed at each token, bool of the shape of ``values`` (..., channel)."""
    width = values.shape[-1]
    bits = max(1, (width - 1).bit_length())
    token = torch.arange(values.shape[:-1].numel(), device=values.device)[:, None]
    channel = torch.arange(width, device=values.device)
    return ((channel >> (token % bits)) & 1 == ((token // bits + 1) % 2)).reshape(values.shape)
