"""Find a plan's tensors in another checkpoint: a fine-tune with another head, or a result that was saved again.

A checkpoint may name its tensors with the prefix of its class or without. One rule holds for all names of a checkpoint: a
prefix goes, and another comes. The rule is found from the names themselves and must be the only one that fits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from chanfmt.base.errors import ModelError
from surgery.cut.stock import meta_shapes

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from chanfmt.format.records import TensorSlice
    from chanfmt.models.safetensors import CheckpointIndex
    from surgery.planning.plan import BlockPlan, PruningPlan


@dataclass(frozen=True)
class Prefix:
    """A rule for names: the prefix ``old`` goes and ``new`` comes. Both end with a dot or are empty."""

    old: str
    new: str

    def of(self, name: str) -> str:
        """``name`` with the new prefix; unchanged if it does not begin with the old one."""
        return self.new + name.removeprefix(self.old) if name.startswith(self.old) else name


def find_prefix(wanted: Sequence[str], present: Collection[str]) -> Prefix | None:
    """The one rule under which every name in ``wanted`` is in ``present``; None if there is no such rule, or more than one.

    A prefix never contains a number, so that no layer passes for another.
    """
    if all(name in present for name in wanted):
        return Prefix("", "")
    first = wanted[0].split(".")
    found = set()
    for at in range(len(first) - 1):
        if any(part.isdigit() for part in first[:at]):
            break
        rest = ".".join(first[at:])
        for name in present:
            if name == rest or name.endswith(f".{rest}"):
                new = name.removesuffix(rest)
                if not any(part.isdigit() for part in new.split(".")):
                    found.add(Prefix("".join(f"{part}." for part in first[:at]), new))
        fitting = [rule for rule in found if all(rule.of(name) in present for name in wanted)]
        # A shorter rest fits wherever a longer one fits, so the longest rest decides.
        if fitting:
            return fitting[0] if len(fitting) == 1 else None
    return None


def relocated(plan: PruningPlan, index: CheckpointIndex, config: dict[str, Any]) -> PruningPlan:
    """``plan`` with the names that the checkpoint ``index`` and the stock class of ``config`` have for its tensors.

    Biases that a recovery gave to the plan's result, and that neither the checkpoint nor its class has, are left out.

    Raises:
        ModelError: The checkpoint has no tensors of these names under any prefix, or has them under several.
    """
    same_class = tuple(config.get("architectures") or ()) == plan.model.architectures
    if same_class and all(item.tensor in index.tensors for block in plan.blocks for item in block.tensors):
        return plan
    parameters = meta_shapes(config).keys()
    in_files = _prefix(_weights(plan, "tensor"), index.tensors.keys(), f"the checkpoint {index.directory}")
    in_class = _prefix(_weights(plan, "parameter"), parameters, f"the stock class of {index.directory}")
    return _moved(plan, in_files, in_class, parameters | index.tensors.keys())


def relocated_in_memory(plan: PruningPlan, parameters: Collection[str]) -> PruningPlan:
    """``plan`` with the names that a loaded model has for its parameters and modules; ``plan`` itself if no prefix fits.

    Args:
        parameters: Names of the model's parameters.
    """
    in_class = find_prefix(_weights(plan, "parameter"), parameters)
    return plan if in_class is None else _moved(plan, Prefix("", ""), in_class, parameters)


def _moved(plan: PruningPlan, in_files: Prefix, in_class: Prefix, known: Collection[str]) -> PruningPlan:
    """``plan`` with new names.

    Args:
        known: Tensors of the files and parameters of the class. A bias that is neither is left out.
    """

    def moved(block: BlockPlan) -> BlockPlan:
        items = [replace(item, tensor=in_files.of(item.tensor), parameter=in_class.of(item.parameter)) for item in block.tensors]
        there = [item for item in items if not _is_bias(item) or item.tensor in known or item.parameter in known]
        return replace(block, module=in_class.of(block.module), tensors=tuple(there))

    return replace(plan, blocks=tuple(map(moved, plan.blocks)))


def _weights(plan: PruningPlan, kind: str) -> list[str]:
    """The names of all weights of ``plan``, as ``tensor`` or as ``parameter``."""
    return [getattr(item, kind) for block in plan.blocks for item in block.tensors if not _is_bias(item)]


def _is_bias(item: TensorSlice) -> bool:
    return item.role.endswith("_bias")


def _prefix(wanted: Sequence[str], present: Collection[str], where: str) -> Prefix:
    found = find_prefix(wanted, present)
    if found is None:
        lacking = next(name for name in wanted if name not in present)
        raise ModelError(
            f"{where} has no tensor {lacking!r}, and no prefix gives it all tensors of the plan",
            hint="use a model with the same layers, as transformers saves it",
        )
    return found
