"""Remove channels of a loaded model, physically and in memory.

Tracing the model shows where its FFNs lie in its parameters. From there on, the cut is planned as for a checkpoint,
whose tensors are the parameters: the widths, the zero channels and the config fields are the same as in the directory
that `surgery.cut.apply` writes for the same plan.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from chanfmt.base.errors import CheckError, ModelError, first_line
from chanfmt.format.records import TensorSlice
from chanfmt.models.quantised import check_loaded
from chanfmt.models.quiet import quiet_transformers
from chanfmt.models.safetensors import CheckpointIndex, TensorEntry
from surgery.cut.checkpoint.cuts import plan_cuts
from surgery.cut.config_width import check_layout, find_layout
from surgery.cut.inputs import check_inputs
from surgery.cut.matching import match_ffns
from surgery.cut.relocate import relocated_in_memory
from surgery.cut.stock import parse_config
from surgery.planning.layouts import UNIFORM

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from chanfmt.models.ffn import FFN, Bias, Matrix, Read
    from surgery.cut.checkpoint.cuts import Cut
    from surgery.cut.config_width import Layout
    from surgery.cut.stock import Shapes
    from surgery.planning.plan import Change, PruningPlan

WHOLE_TENSORS: set[type[torch.Tensor]] = {torch.Tensor}
"""Classes of tensors that hold all their numbers, one by one. A device that is written in Python adds a class of its own."""
_DTYPES = {1: "I8", 2: "F16", 4: "F32", 8: "F64"}
"""A safetensors dtype of each element size: a cut only moves bits."""


@dataclass(frozen=True)
class Narrowed:
    """What `prune_` did to a model.

    Attributes:
        ffns: FFNs that lost channels.
        channels_before, channels_after: Channels of all FFNs, over all experts. Zero channels that fill a narrower FFN up
            to the width of the widest are not counted.
        parameters_before, parameters_after: Parameters of the model, tied ones once.
        config: Config fields that changed, dotted if nested.
    """

    ffns: int
    channels_before: int
    channels_after: int
    parameters_before: int
    parameters_after: int
    config: Mapping[str, Change]


@dataclass(frozen=True, eq=False)
class Placed:
    """What `narrow` did to a model.

    Attributes:
        narrowed: The numbers before and after.
        plan: The plan, whose tensors are the parameters of the model.
        cuts: Name of each parameter that changed to its cut.
    """

    narrowed: Narrowed
    plan: PruningPlan
    cuts: Mapping[str, Cut]


def prune_(model: Any, plan: PruningPlan, *, allow_padding: bool = False) -> Narrowed:
    """Remove from a loaded transformers ``model``, in place, the channels that ``plan`` does not keep.

    Weights, biases, the sizes that the modules know (such as ``out_features``) and the config change.
    ``model.save_pretrained(directory)`` afterwards writes the tensors that `surgery.cut.prune.apply` writes for the same
    plan, and stock ``from_pretrained`` loads them. Devices, dtypes, ``requires_grad`` and the training mode stay. Gradients
    of the parameters that change are dropped; an optimizer that holds these parameters must be made anew.

    The model runs once on a few tokens (or random inputs), to find its FFNs. Nothing can tell whether its weights are
    those that the atlas measured.

    Raises:
        ModelError: The model is not the plan's (another model type, other FFNs or shapes), is quantised, sharded or not
            loaded, or its class cannot have the planned widths. The model is then unchanged.
        UsageError: The model would shrink by less than half of what was asked, and ``allow_padding`` is False.
    """
    return narrow(model, plan, allow_padding=allow_padding).narrowed


def narrow(model: Any, plan: PruningPlan, *, allow_padding: bool = False) -> Placed:
    """`prune_`, which also says where in the parameters of ``model`` the kept channels are afterwards."""
    _check_loaded(model, plan)
    # A class in memory cannot become another one, so uneven widths are padded here.
    plan = relocated_in_memory(
        replace(plan, layout=UNIFORM), {name for name, _ in model.named_parameters(remove_duplicate=False)}
    )
    plan = replace(plan, blocks=tuple(_blocks_in_memory(model, plan)))
    config = _config_of(model)
    index = _index_of(model)
    layout = find_layout(plan, config, index)
    if not allow_padding:
        check_layout(plan, layout, index)
    cuts = plan_cuts(plan, layout.widths, index)
    before, after = (_stock(type(model), fields) for fields in (config, layout.config))
    _check_shapes(model, cuts, before, after)
    sizes, parameters = _new_sizes(model, before, after), _count(model)
    for name, cut in cuts.items():
        parameter = model.get_parameter(name)
        parameter.grad = None
        parameter.data = _cut(parameter.data, cut)
    for module, name, value in sizes:
        setattr(module, name, value)
    _set_config(model, layout)
    narrowed = Narrowed(
        sum(block.is_cut for block in plan.blocks), plan.channels, plan.channels_kept, parameters, _count(model), layout.fields
    )
    return Placed(narrowed, plan, cuts)


def _check_loaded(model: Any, plan: PruningPlan) -> None:
    import transformers

    name = type(model).__name__
    if not isinstance(model, transformers.PreTrainedModel):
        raise ModelError(f"{name} is not a transformers model", hint="pass the model that from_pretrained returned, unwrapped")
    if model.config.model_type != plan.model.model_type:
        raise ModelError(f"the plan is for a {plan.model.model_type!r} model, and {name} is a {model.config.model_type!r} model")
    check_loaded(model, name)
    for parameter_name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ModelError(
                f"{name} is not in memory: {parameter_name} is on the meta device", hint="load it without offloading"
            )
        if type(parameter.data) not in WHOLE_TENSORS:
            raise ModelError(f"{name} is sharded or quantised: {parameter_name} is a {type(parameter.data).__name__}")


def _blocks_in_memory(model: Any, plan: PruningPlan) -> Iterator[Any]:
    """The FFNs of ``plan``, with the slices of the parameters that hold them in place of those of checkpoint tensors."""
    ffns = _find_ffns(model, plan)
    name = type(model).__name__
    if len(ffns) != len(plan.blocks):
        raise ModelError(f"{name} has {len(ffns)} FFNs, and the plan is for a model of {len(plan.blocks)}")
    for block, ffn in zip(plan.blocks, match_ffns(plan.blocks, ffns), strict=True):
        if ffn is None:
            raise ModelError(f"{name} has no FFN {block.module} of {block.n_channels} channels, which the plan names")
        slices = tuple(_slices(ffn))
        if {item.parameter for item in slices} != {item.parameter for item in block.tensors}:
            raise ModelError(f"the parameters of {block.module} in {name} are not those that the plan names")
        if ffn.mixed and block.is_cut:
            raise ModelError(
                f"{block.module} computes numbers from all its channels (a norm, a threshold) between its projections, so "
                "the kept channels would compute something else than before"
            )
        yield replace(block, tensors=slices)


def _find_ffns(model: Any, plan: PruningPlan) -> Sequence[FFN]:
    first = next(model.parameters())
    with _evaluating(model), torch.no_grad(), quiet_transformers():
        try:
            inputs = check_inputs(model, plan.check_tokens, plan.seed)
        except CheckError as error:
            raise ModelError(error.message) from None
        arrays = {
            name: values.to(first.device, first.dtype if values.is_floating_point() else values.dtype)
            for name, values in inputs.arrays.items()
        }
        try:
            return replace(inputs, arrays=arrays).find_ffns(model)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
            raise ModelError(f"{type(model).__name__} cannot run {inputs.text}: {first_line(error)}") from error


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Have ``model`` in evaluation mode in the body, and every module in its own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _slices(ffn: FFN) -> Iterator[TensorSlice]:
    """Every read and write weight and bias of ``ffn`` as a slice of a parameter, expert by expert."""
    for member in ffn.members:
        reads: dict[str, Read] = {}
        for read in member.reads:
            # An adapter beside a read projection comes later and has rows of its own.
            reads.setdefault(read.role, read)
        for role, read in reads.items():
            matrix, bias = read.projection.matrix, read.projection.bias
            positions = range(read.start, read.start + (ffn.width - 1) * read.step + 1, read.step)
            yield _slice_of_matrix(role, matrix, 1 if matrix.transposed else 0, positions)
            if bias is not None:
                yield _slice_of_bias(f"{role}_bias", bias, positions)
        matrix, bias = member.write.matrix, member.write.bias
        yield _slice_of_matrix("write", matrix, 0 if matrix.transposed else 1, range(ffn.width))
        if bias is not None:
            yield _slice_of_bias("write_bias", bias, None)


def _slice_of_matrix(role: str, matrix: Matrix, axis: int, positions: range) -> TensorSlice:
    row = matrix.row if axis == 0 else 0
    if matrix.index is None and matrix.row != row:
        raise ModelError(f"{matrix.parameter} holds several experts, each in rows of its own, and cannot be cut in memory")
    start, stop = row + positions.start, row + positions.stop
    axis += matrix.index is not None
    return TensorSlice(role, matrix.parameter, matrix.parameter, axis, start, stop, positions.step, matrix.index)


def _slice_of_bias(role: str, bias: Bias, positions: range | None) -> TensorSlice:
    if positions is None:
        return TensorSlice(role, bias.parameter, bias.parameter, None, index=bias.index)
    axis = 0 if bias.index is None else 1
    return TensorSlice(role, bias.parameter, bias.parameter, axis, positions.start, positions.stop, positions.step, bias.index)


def _config_of(model: Any) -> dict[str, Any]:
    """The content of the ``config.json`` that ``model`` would be saved with."""
    return json.loads(model.config.to_json_string()) | {"architectures": [type(model).__name__]}


def _index_of(model: nn.Module) -> CheckpointIndex:
    """The parameters of ``model`` as if they were the tensors of a checkpoint."""
    nowhere = Path("memory")
    return CheckpointIndex(
        nowhere,
        {
            name: TensorEntry(nowhere, _DTYPES[parameter.element_size()], tuple(parameter.shape), 0, parameter.nbytes)
            for name, parameter in model.named_parameters(remove_duplicate=False)
        },
    )


def _stock(kind: type, config: dict[str, Any]) -> nn.Module:
    """A ``kind`` of ``config`` on the meta device: names, shapes and sizes without numbers."""
    try:
        with quiet_transformers(), torch.device("meta"):
            return kind(parse_config(config))
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{kind.__name__} cannot be built from its config: {first_line(error)}") from None


def _shapes(model: nn.Module) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _check_shapes(model: nn.Module, cuts: Mapping[str, Cut], before: nn.Module, after: nn.Module) -> None:
    """Raise `ModelError` unless ``model`` has the shapes of ``before``, and those of ``after`` once ``cuts`` are made."""
    shapes, now, then = _shapes(model), _shapes(before), _shapes(after)
    for name in sorted(shapes.keys() | now.keys()):
        if shapes.get(name) != now.get(name):
            raise ModelError(
                f"{type(model).__name__} is not as its config says: {name} has shape {shapes.get(name)}, not {now.get(name)}"
            )
    storages = {name: model.get_parameter(name) for name in cuts}
    new = {
        name: next((cuts[own].shape for own, parameter in storages.items() if _value(model, name) is parameter), shape)
        for name, shape in shapes.items()
    }
    if new != then:
        name = min(name for name in new.keys() | then.keys() if new.get(name) != then.get(name))
        raise ModelError(
            f"{type(model).__name__} cannot have the planned widths: {name} would have shape {new.get(name)}, and stock code "
            f"needs {then.get(name)}"
        )


def _value(model: nn.Module, name: str) -> Any:
    """The parameter or buffer ``name``; None if it is neither."""
    place, _, last = name.rpartition(".")
    return getattr(model.get_submodule(place), last, None)


def _cut(data: torch.Tensor, cut: Cut) -> torch.Tensor:
    """``data`` after ``cut``, a tensor of its own on the same device."""
    if not cut.by_expert:
        return _taken(data, cut.axis, torch.from_numpy(cut.positions[0]))
    new = data.new_empty(cut.shape)
    for expert, positions in enumerate(cut.positions):
        new[expert] = _taken(data[expert], cut.axis - 1, torch.from_numpy(positions))
    return new


def _taken(data: torch.Tensor, axis: int, positions: torch.Tensor) -> torch.Tensor:
    positions = positions.to(data.device)
    new = data.index_select(axis, positions.clamp(min=0))
    return new.index_fill_(axis, (positions < 0).nonzero().flatten(), 0)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _new_sizes(model: nn.Module, before: nn.Module, after: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """The numbers of modules that the stock class derives from widths, such as ``out_features``: module, name, new value."""
    found = []
    for name, module in after.named_modules():
        try:
            old, mine = vars(before.get_submodule(name)), model.get_submodule(name)
        except AttributeError:
            raise ModelError(f"{type(model).__name__} is not as its config says: it has no module {name}") from None
        for key, value in vars(module).items():
            if not key.startswith("_") and _is_size(value) and _is_size(old.get(key)) and old[key] != value:
                found.append((mine, key, value))
    return found


def _is_size(value: Any) -> bool:
    """Whether ``value`` is a number, or a list or tuple of numbers."""
    if isinstance(value, list | tuple):
        return all(map(_is_size, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def _set_config(model: nn.Module, layout: Layout) -> None:
    """Edit the config of ``model``, and the copies of it that parts of the model hold."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for field, change in layout.fields.items():
        *path, last = field.split(".")
        for config in configs.values():
            if type(config) is type(model.config):
                place: Any = config
                for name in path:
                    place = place[name] if isinstance(place, dict) else getattr(place, name)
                if isinstance(place, dict):
                    place[last] = change.after
                else:
                    setattr(place, last, change.after)
