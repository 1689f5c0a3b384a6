"""Recoveries that others published, written anew in plain torch for `bench/recover.py`.

Every function changes a loaded model in place: the removed channels go, and the write projections of the kept channels become
what the method makes of them. The functions share the loop over the model's layers and nothing with `surgery.recovery`, except
for the settings that make products fast. Statistics are sums of float32 products in float64, and systems are solved in float64:
the authors' programs use float32 or float16 there, which is never better.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from chanfmt.base.errors import ModelError
from chanfmt.base.narrate import counted
from chanfmt.models.streaming.parameters import freed_memory_reused
from surgery.recovery.precision import fast_products, full_products

if TYPE_CHECKING:
    import numpy as np

    from surgery.planning.plan import BlockPlan, PruningPlan


@dataclass(frozen=True)
class Rule:
    """A method that gives the write projection of every FFN new weights by a linear fit.

    Attributes:
        inputs: Where the activations of the kept channels come from: ``dense`` (the dense model) or ``cut`` (the model whose
            earlier layers are cut and fitted already).
        target: Whose output the fit has to give: that of the layer's ``own`` dense FFN on the same inputs, or that of the FFN in
            the ``dense`` model.
        towards: What the penalty draws the weights to: ``zero`` or ``kept``, the weights before the fit.
        ridge: The penalty, as a share of the mean squared activation.
        source: The method in words, with its publication.
    """

    inputs: str
    target: str
    towards: str
    ridge: float
    source: str


GRAIL = Rule(
    "cut",
    "own",
    "zero",
    1e-3,
    "GRAIL (Tang et al., CPAL 2026, arXiv 2602.23795; github.com/TWWinde/GRAIL_Compensation, `grail-llm/lib`): layer by layer, "
    "the Gram matrix of the down projection's inputs in the model that is cut and compensated so far gives the linear map from "
    "the kept to all channels, by ridge regression, and the map is merged into the down projection. The penalty is `ridge_lambda` "
    "times the mean of the diagonal; the program's default is 0.001, and the README's commands pass 0. GRAIL treats the output "
    "projection of attention in the same way after it has removed heads. No head is removed here, so that map is the identity. "
    "The bias that the program adds for FLAP and SlimGPT is left out, as it is for Wanda",
)
OSSCAR = Rule(
    "cut",
    "own",
    "kept",
    1e-2,
    "OSSCAR's update of the weights (Meng et al., ICML 2024, arXiv 2403.12983; github.com/mazumder-lab/OSSCAR): as GRAIL, but the "
    "penalty, `lambda2` times the mean of the diagonal over all channels (default 0.01), is on the distance from the weights before. "
    "OSSCAR's own search for the channels is not part of this bench",
)
FULLSEQ = Rule(
    "cut",
    "dense",
    "kept",
    1e-2,
    "OSSCAR with `--fullseq`: the target is the FFN's output in the dense model, so that each layer makes up for the errors of "
    "earlier ones",
)
DENSE = Rule(
    "dense",
    "own",
    "kept",
    1e-2,
    "least squares on the dense model's activations only, so that no layer makes up for the errors of earlier ones: OSSCAR with "
    "`--parallel`, which is the layer-wise problem of SparseGPT (Frantar and Alistarh, ICML 2023, arXiv 2301.00774) for whole columns. "
    "The penalty is 0.01 of the mean of the diagonal, the default of both programs",
)
FLAP = (
    "FLAP's bias (An et al., AAAI 2024, arXiv 2312.11983; github.com/CASIA-IVA-Lab/FLAP, `lib/prune.py`): the removed channels' mean "
    "output, with means from the dense model, is added to the bias of the down projection"
)
RULES = {"grail": GRAIL, "osscar": OSSCAR, "osscar-fullseq": FULLSEQ, "dense-lstsq": DENSE}


def find_rule(name: str) -> Rule | None:
    """The rule called ``name``, such as ``grail`` or ``grail:0.01`` for another penalty; None if there is none."""
    stem, _, ridge = name.partition(":")
    rule = RULES.get(stem)
    return dataclasses.replace(rule, ridge=float(ridge)) if rule and ridge else rule


@torch.no_grad()
def cut_only(model: Any, plan: PruningPlan) -> None:
    """Remove the channels that ``plan`` does not keep, and leave the others as they are."""
    for block in plan.blocks:
        if block.is_cut:
            Projection(model, block).narrow()


@torch.no_grad()
def flap_bias(model: Any, plan: PruningPlan, tokens: np.ndarray) -> None:
    """Remove channels, and add their mean output to the bias of the write projection, see `FLAP`.

    Args:
        tokens: Token ids, int32 (sequence, position).
    """
    with freed_memory_reused(), fast_products(torch.device("cpu")):
        layers = Layers(model, plan)
        hidden = [layers.embedded(row) for row in torch.from_numpy(tokens).long()]
        for number in counted(layers.numbers, "layer", "flap"):
            block = layers.cut.get(number)
            write = None if block is None else Projection(model, block)
            total = None
            for place, states in enumerate(hidden):
                activations, hidden[place] = layers.run(number, states, write)
                if write is not None:
                    part = activations.double().sum(0)
                    total = part if total is None else total + part
            if write is not None:
                bias = write.weight[:, write.gone].double() @ (total / tokens.size)[write.gone]
                write.narrow()
                write.add_bias(bias)


@torch.no_grad()
def fit(model: Any, plan: PruningPlan, tokens: np.ndarray, rule: Rule) -> None:
    """Remove channels, and fit the write projections as ``rule`` says.

    Args:
        tokens: Token ids, int32 (sequence, position).
    """
    with freed_memory_reused(), fast_products(torch.device("cpu")):
        layers = Layers(model, plan)
        start = [layers.embedded(row) for row in torch.from_numpy(tokens).long()]
        streams = {name: list(start) for name in ("dense", "cut") if name in (rule.inputs, rule.target)}
        for number in counted(layers.numbers, "layer", "fitting"):
            block = layers.cut.get(number)
            if block is None:
                for stream in streams.values():
                    stream[:] = [layers.run(number, states)[1] for states in stream]
                continue
            write = Projection(model, block)
            gram = torch.zeros(write.width, write.width, dtype=torch.float64)
            cross = torch.zeros_like(gram) if rule.target == "dense" else gram
            for place in range(len(start)):
                found = {}
                for name, stream in streams.items():
                    found[name], output = layers.run(number, stream[place], write)
                    if name == "dense":
                        stream[place] = output
                inputs = found[rule.inputs]
                with full_products():
                    gram += (inputs.T @ inputs).double()
                    if cross is not gram:
                        cross += (inputs.T @ found["dense"]).double()
            write.narrow(solve(gram, cross, write.weight, write.kept, rule))
            if "cut" in streams:
                streams["cut"][:] = [layers.run(number, states)[1] for states in streams["cut"]]


def solve(gram: torch.Tensor, cross: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, rule: Rule) -> torch.Tensor:
    """New weights of the kept channels, float64 (outputs, kept).

    Args:
        gram: Sum over tokens of u u^T with u the inputs, float64 (channels, channels).
        cross: Sum over tokens of u v^T with v the activations whose output is wanted, float64 (channels, channels).
        weight: The weights before, (outputs, channels).
        kept: Ids of the kept channels, int64 (kept,).
    """
    weight = weight.double()
    left, right = gram[kept][:, kept], cross[kept] @ weight.T
    # GRAIL takes the mean over the kept channels, OSSCAR over all of them.
    diagonal = left.diagonal().mean() + 1e-3 if rule.towards == "zero" else gram.diagonal().mean()
    damping = rule.ridge * float(diagonal)
    if rule.towards == "kept":
        right = right + damping * weight[:, kept].T
    left = left + damping * torch.eye(len(kept), dtype=torch.float64)
    factor, failed = torch.linalg.cholesky_ex(left)
    if not failed:
        found = torch.cholesky_solve(right, factor).T
        if found.isfinite().all():
            return found
    # Without a penalty, dead channels or few tokens make the system singular. The authors fall back to this call, too.
    return torch.linalg.lstsq(left, right, driver="gelsd").solution.T


class Projection:
    """The write projection of a dense FFN in a loaded model.

    Attributes:
        weight: Write vectors as columns before any change, float32 (outputs, channels).
        kept, gone: Ids of the kept and of the removed channels, int64.
        width: Number of channels.
        module: The module that holds the projection.
    """

    def __init__(self, model: Any, block: BlockPlan) -> None:
        self._model = model
        self._block = block
        item = next(item for item in block.tensors if item.role == "write")
        name, _, last = item.parameter.rpartition(".")
        self.width = block.n_channels
        if block.n_experts or last != "weight" or item.index is not None:
            raise ModelError(f"{block.module} is not a dense FFN with a write projection of its own, which this bench needs")
        self._parameter, self._transposed = model.get_parameter(item.parameter), item.axis == 0
        self.module: nn.Module = model.get_submodule(name)
        self.weight = self._parameter.detach().T.clone() if self._transposed else self._parameter.detach().clone()
        self.kept = torch.from_numpy(block.kept).long()
        mask = torch.ones(self.width, dtype=torch.bool)
        mask[self.kept] = False
        self.gone = mask.nonzero().flatten()

    def narrow(self, weight: torch.Tensor | None = None) -> None:
        """Keep the kept channels only, with ``weight`` (outputs, kept) as their write vectors; None for those before."""
        positions: dict[tuple[str, int], list[torch.Tensor]] = defaultdict(list)
        for item in self._block.tensors:
            if item.axis is not None:
                positions[item.parameter, item.axis].append(torch.from_numpy(item.indices(self._block.kept)))
        for (name, axis), rows in positions.items():
            parameter = self._model.get_parameter(name)
            if parameter.shape[axis] != len(rows) * self.width:
                raise ModelError(f"{name} holds more than one FFN's channels, which this bench cannot cut")
            parameter.data = parameter.data.index_select(axis, torch.cat(rows).sort().values)
        if weight is not None:
            self._parameter.data = (weight.T if self._transposed else weight).to(self._parameter.dtype).contiguous()

    def add_bias(self, values: torch.Tensor) -> None:
        """Add ``values`` (outputs,) to the bias, or give the projection this bias if it has none."""
        bias = self.module.bias
        if bias is None:
            self.module.bias = nn.Parameter(values.to(self._parameter.dtype), requires_grad=False)
        else:
            bias.data = (bias.data.double() + values).to(bias.dtype)


class _Reached(Exception):
    """The first layer was reached."""


class Layers:
    """The layers of a loaded model, run one at a time on one sequence.

    Attributes:
        cut: Number of a layer to the FFN in it that is cut.
        numbers: Numbers of the layers up to the last one with a cut.
    """

    def __init__(self, model: Any, plan: PruningPlan) -> None:
        self._model = model
        path = _list_of(model, next(block.module for block in plan.blocks if block.is_cut))
        self._layers = list(model.get_submodule(path))
        self.cut: dict[int, BlockPlan] = {}
        for block in plan.blocks:
            if block.is_cut:
                number = int(block.module.removeprefix(f"{path}.").partition(".")[0])
                if not block.module.startswith(f"{path}.") or number in self.cut:
                    raise ModelError(f"{block.module} is not the only cut FFN of one of the layers in {path}")
                self.cut[number] = block
        self.numbers = range(max(self.cut) + 1)
        self._calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self._length = 0

    def embedded(self, ids: torch.Tensor) -> torch.Tensor:
        """What the first layer reads for the token ids (position,), float32 (1, position, feature).

        All sequences have the same length, and nothing is padded. The other arguments of each layer (masks, positions) are thus
        the same for all of them. The first sequence passes through the whole model, and these arguments are recorded.
        """
        seen: list[torch.Tensor] = []

        def before(number: int) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if number == 0:
                    seen.append(args[0])
                    if self._calls:
                        raise _Reached
                self._calls[number] = (args[1:], kwargs)

            return hook

        if self._length not in (0, len(ids)):
            raise ValueError("the sequences have different lengths")
        self._length = len(ids)
        handles = [layer.register_forward_pre_hook(before(number), with_kwargs=True) for number, layer in enumerate(self._layers)]
        try:
            self._model.base_model(ids[None], use_cache=False)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen[0]

    def run(self, number: int, hidden: torch.Tensor, write: Projection | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Run layer ``number`` on ``hidden`` (1, position, feature).

        Returns:
            The activations that ``write`` reads, (position, channels), empty without ``write``; and the layer's output.
        """
        seen: list[torch.Tensor] = [hidden.new_empty(0, 0)]
        handle = None
        if write is not None:
            handle = write.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        args, kwargs = self._calls[number]
        try:
            output = self._layers[number](hidden, *args, **kwargs)
        finally:
            if handle is not None:
                handle.remove()
        return seen[-1].flatten(0, -2), output[0] if isinstance(output, tuple) else output


def _list_of(model: Any, module: str) -> str:
    """Name of the `nn.ModuleList` that holds ``module``."""
    parts = module.split(".")
    for count in range(1, len(parts)):
        if isinstance(model.get_submodule(".".join(parts[:count])), nn.ModuleList):
            return ".".join(parts[:count])
    raise ModelError(f"{module} is not in a list of layers")
