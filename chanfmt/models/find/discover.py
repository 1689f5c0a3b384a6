"""Find the FFNs of a loaded model by what the model computes, not by the names of its modules.

A write projection is a linear map whose input is an elementwise, nonlinear function of the outputs of read projections of
the same width, and of nothing else that differs from channel to channel. The write projection maps back to the space that
the reads read from, and its output is added to that space without another nonlinear function.
`chanfmt.models.find.trace` says what the input of each product depends on; `chanfmt.models.find.probe` then checks with
numbers, on the instance, what the trace concluded.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from chanfmt.base.errors import ModelError, first_line
from chanfmt.models.causal import is_causal
from chanfmt.models.ffn import FFN, Matrix, Member, Projection, Read
from chanfmt.models.find.intercept import Interceptor
from chanfmt.models.find.probe import probe
from chanfmt.models.find.trace import Call, decode, trace
from chanfmt.models.run import TEST_TOKENS, run_arrays, run_text, test_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

_EXPERT = re.compile(r"(.*experts?[._])([0-9]+)([.].*)", re.IGNORECASE)
"""Name of a parameter of one expert in a list or table of modules: ``experts.3.``, ``experts.expert_3.``."""

Site = tuple[str, int | None, int]


@dataclass(frozen=True)
class Found:
    """A write projection and its reads, as one call of the write projection showed them."""

    member: Member
    mixed: bool


def find_ffns(model: Any) -> list[FFN]:
    """Find every FFN that text reaches in ``model``, and verify it on the instance. Returns them in model order.

    Raises:
        ModelError: The model cannot run or has no FFN, or a block has none although its siblings have one. The message
            names the module.
    """
    ids = test_tokens(model)
    try:
        calls = trace(model, [ids], lambda: run_text(model, ids))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
        raise ModelError(f"{type(model).__name__} cannot run {ids.shape[1]} tokens of text: {first_line(error)}") from error
    ffns = assemble(model, examined(calls), lambda: is_causal(model), calls)
    check_complete(model, ffns, calls)
    probe(model, ffns, lambda: run_text(model, ids))
    return ffns


def find_ffns_given(model: Any, samples: Mapping[str, torch.Tensor]) -> tuple[list[FFN], list[int]]:
    """Find every FFN that ``samples`` reach in a model that takes arrays. Returns them, and the rows of one sample in each.

    Args:
        samples: Arrays by the argument names of the model's ``forward``, samples along the first axis. As many samples are
            run as the proof needs.

    Raises:
        ModelError: As for `find_ffns`. An error that the model itself raises over the samples passes through.
    """
    one = {name: values[:1] for name, values in samples.items()}
    calls = trace(model, one.values(), lambda: run_arrays(model, one))
    ffns = assemble(model, examined(calls), lambda: False, calls)
    check_complete(model, ffns, calls)
    rows = _rows(model, ffns, lambda: run_arrays(model, one))
    # The probe changes other channels in each row, so a single sample of few rows would prove little.
    count = -(-TEST_TOKENS // max(1, min(rows)))
    some = {name: values[:count] for name, values in samples.items()}
    probe(model, ffns, lambda: run_arrays(model, some))
    return ffns, rows


def _rows(model: Any, ffns: Sequence[FFN], run: Callable[[], object]) -> list[int]:
    """Rows that each of ``ffns`` sees in one call of ``run``: those of the busiest expert, and of the largest of several uses."""
    most = [0] * len(ffns)

    def count(number: int, u: torch.Tensor) -> None:
        most[number] = max(most[number], u.shape[:-1].numel())

    interceptor = Interceptor(model)
    for number, ffn in enumerate(ffns):
        for member in ffn.members:
            interceptor.on(member.write.matrix, before=partial(count, number))
    with torch.no_grad(), interceptor:
        run()
    return most


def examined(calls: Sequence[Call], since: int = 0) -> list[Found]:
    """The write projections among ``calls``, from number ``since`` on."""
    return [item for call in calls[since:] if (item := _examine(call, calls)) is not None]


def block_of(name: str) -> str | None:
    """The element of the model's layer list that ``name`` lies in: ``model.layers.3.mlp`` -> ``model.layers.3``."""
    parts = name.split(".")
    for index, part in enumerate(parts):
        if part.isdigit():
            return ".".join(parts[: index + 1])
    return None


def _examine(call: Call, calls: Sequence[Call]) -> Found | None:
    """The FFN that ``call`` closes; None if ``call`` is another kind of linear map."""
    label, matrix = call.label, call.matrix
    if label.opaque or not label.parts or not label.curved or call.bent:
        return None
    reads = []
    for part in label.parts:
        numbers, channels = decode(part.codes.reshape(-1, matrix.inputs))
        if not len(channels) or bool((numbers != numbers[0, 0]).any()):
            return None
        first = channels[0]
        step = int(first[1] - first[0]) if len(first) > 1 else 1
        expected = first[0] + step * torch.arange(len(first), device=first.device)
        if step < 1 or not torch.equal(channels, expected.expand_as(channels)):
            return None
        reads.append((calls[int(numbers[0, 0])], int(first[0]), step, part.curved))
    # Reads of the space that the write writes to come first; an adapter beside them reads another space.
    reads.sort(key=lambda item: item[0].matrix.inputs != matrix.outputs)
    if reads[0][0].matrix.index != matrix.index or reads[0][0].matrix.inputs != matrix.outputs:
        return None
    return Found(Member(Projection(matrix, call.bias), _roles(reads)), label.mixed)


def _roles(reads: Sequence[tuple[Call, int, int, int]]) -> tuple[Read, ...]:
    """The reads with their roles. The gate consists of the reads whose output passes through the least linear function."""

    def read(item: tuple[Call, int, int, int], role: str) -> Read:
        source, start, step, _ = item
        return Read(Projection(source.matrix, source.bias), role, start, step)

    most = max(item[3] for item in reads)
    gates = [item for item in reads if item[3] == most]
    if len(gates) == len(reads) and len({(item[0].matrix.parameter, item[1]) for item in reads}) > 1:
        # All pass through equally linear functions, so only their names can tell which one is the gate.
        gates = [item for item in reads if "gate" in item[0].matrix.parameter.rpartition(".")[0].rpartition(".")[2]] or gates
        gates = gates[:1] if len(gates) == len(reads) else gates
    if len(gates) == len(reads):
        return tuple(read(item, "up") for item in reads)
    return (*(read(item, "gate") for item in gates), *(read(item, "up") for item in reads if item not in gates))


def assemble(model: Any, found: Sequence[Found], causal: Callable[[], bool], calls: Sequence[Call] = ()) -> list[FFN]:
    """Join write projections to FFNs, in model order: experts of one layer together, with the number of uses of a matrix.

    Nothing is verified yet; only names and shapes of ``model`` are read.

    Args:
        causal: Says whether ``model`` is causal. It runs the model, so it is called once at most.
        calls: All products of the model, if the other linear maps of the blocks are wanted too.
    """
    causal = functools.cache(causal)
    parameters = dict(model.named_parameters())
    groups: dict[str, list[Found]] = defaultdict(list)
    for item in found:
        groups[_group(item.member.write.matrix, parameters)].append(item)
    lists = {_list_of(item.member.write.matrix.parameter) for item in found}
    ffns = []
    for items in groups.values():
        members: dict[Site, Member] = {}
        for item in items:
            members.setdefault(_site(item.member.write.matrix), item.member)
        first = items[0].member
        stacked = parameters[first.write.matrix.parameter].ndim == 3 or len(members) > 1 or _is_listed(first)
        whole = _all_experts(first, members, parameters) if stacked else [first]
        uses = max(Counter(_site(item.member.write.matrix) for item in items).values())
        container = _container(whole)
        ffns.append(
            FFN(
                _layer_of(container),
                _place(container, lists, causal),
                _kind(container, stacked),
                container,
                tuple(whole),
                first.write.matrix.inputs,
                uses,
                any(item.mixed for item in items),
            )
        )
    return _with_other_maps(ffns, calls)


def _with_other_maps(ffns: Sequence[FFN], calls: Sequence[Call]) -> list[FFN]:
    """``ffns`` with the other linear maps of their blocks, from all products of the model."""
    projections = {
        projection.matrix.parameter
        for ffn in ffns
        for member in ffn.members
        for projection in (member.write, *(read.projection for read in member.reads))
    }
    maps: dict[str, dict[str, Matrix]] = defaultdict(dict)
    for matrix in (call.matrix for call in calls):
        block = block_of(matrix.parameter)
        # A slice of a parameter is one of several maps, whose inputs may differ.
        whole = matrix.index is None and not matrix.row and not matrix.batched
        if block is not None and whole and matrix.parameter not in projections:
            maps[block].setdefault(matrix.parameter, matrix)
    return [replace(ffn, other_maps=tuple(maps.pop(block_of(ffn.container) or "", {}).values())) for ffn in ffns]


def _site(matrix: Matrix) -> Site:
    return matrix.parameter, matrix.index, matrix.row


def _group(matrix: Matrix, parameters: dict[str, torch.Tensor]) -> str:
    """The part of a name that the experts of one layer share: their parameter, or its name without the expert's number."""
    if parameters[matrix.parameter].ndim == 3:
        return matrix.parameter
    head, number, tail = _expert_number(matrix.parameter)
    return matrix.parameter if number is None else f"{head}*{tail}"


def _expert_number(name: str) -> tuple[str, int | None, str]:
    """``model.layers.0.mlp.experts.3.down.weight`` -> its parts around the 3. The number is None if the name has none."""
    found = _EXPERT.fullmatch(name)
    return (found[1], int(found[2]), found[3]) if found else (name, None, "")


def _is_listed(member: Member) -> bool:
    return _expert_number(member.write.matrix.parameter)[1] is not None


def _all_experts(first: Member, seen: dict[Site, Member], parameters: dict[str, torch.Tensor]) -> list[Member]:
    """Every expert of a layer, also those that no token of the test input was routed to."""
    name = first.write.matrix.parameter
    parameter = parameters[name]
    if parameter.ndim == 3:
        return [_at_index(first, index) for index in range(parameter.shape[0])]
    head, number, tail = _expert_number(name)
    if number is None:
        # The experts are runs of rows of one parameter.
        rows = first.write.matrix.inputs if first.write.matrix.transposed else first.write.matrix.outputs
        return [_at_row(first, index * rows) for index in range(parameter.shape[0] // rows)]
    parts = (_expert_number(other) for other in parameters)
    numbers = sorted(index for start, index, end in parts if index is not None and (start, end) == (head, tail))
    return [_renamed(first, f"{head}{number}.", f"{head}{index}.") for index in numbers]


def _at_index(member: Member, index: int) -> Member:
    def at(projection: Projection) -> Projection:
        bias = projection.bias
        return Projection(replace(projection.matrix, index=index), bias and replace(bias, index=index))

    return Member(at(member.write), tuple(replace(read, projection=at(read.projection)) for read in member.reads))


def _at_row(member: Member, row: int) -> Member:
    def at(projection: Projection) -> Projection:
        return replace(projection, matrix=replace(projection.matrix, row=row))

    return Member(at(member.write), tuple(replace(read, projection=at(read.projection)) for read in member.reads))


def _renamed(member: Member, old: str, new: str) -> Member:
    def other(projection: Projection) -> Projection:
        matrix, bias = projection.matrix, projection.bias
        return Projection(
            replace(matrix, parameter=matrix.parameter.replace(old, new)),
            bias and replace(bias, parameter=bias.parameter.replace(old, new)),
        )

    return Member(other(member.write), tuple(replace(read, projection=other(read.projection)) for read in member.reads))


def _container(members: Sequence[Member]) -> str:
    """Smallest module that holds every matrix of ``members``."""
    names = [
        projection.matrix.parameter
        for member in members
        for projection in (member.write, *(read.projection for read in member.reads))
    ]
    modules = zip(*(name.rpartition(".")[0].split(".") for name in names), strict=False)
    return ".".join(part[0] for part in itertools.takewhile(lambda part: len(set(part)) == 1, modules))


def _layer_of(container: str) -> int:
    """Position of ``container`` in its list of layers; 0 if it lies in none."""
    block = block_of(container)
    return 0 if block is None else int(block.rpartition(".")[2])


def _list_of(name: str) -> str:
    return (block_of(name) or name).rpartition(".")[0]


def _place(container: str, lists: Iterable[str], causal: Callable[[], bool]) -> str:
    """``decoder``, ``encoder`` or ``other``: by the name of the layer list if there are several, otherwise by the model."""
    path = _list_of(container).lower()
    if len(set(lists)) > 1:
        if "decoder" in path:
            return "decoder"
        if "encoder" in path:
            return "encoder"
        if any("decoder" in other for other in lists):
            return "other"
    return "decoder" if causal() else "encoder"


def _kind(container: str, stacked: bool) -> str:
    if stacked:
        return "experts"
    return "shared" if "shared_expert" in container or "shared_mlp" in container else "dense"


def check_complete(model: Any, ffns: Sequence[FFN], calls: Sequence[Call]) -> None:
    """Raise `ModelError` if ``model`` would be measured in part, and so be cut in part. The message names the module."""
    kind = type(model).__name__
    if not ffns:
        raise ModelError(
            f"{kind} has no FFN that can be measured: no linear map reads a nonlinear elementwise function of other linear maps"
        )
    blocks: dict[str, list[str]] = defaultdict(list)
    for call in calls:
        block = block_of(call.matrix.parameter)
        if block is not None and block not in blocks[block.rpartition(".")[0]]:
            blocks[block.rpartition(".")[0]].append(block)
    writes = {id(model.get_parameter(ffn.write)) for ffn in ffns}
    # A block may use another block's FFN, so every name of a parameter counts.
    have = {block_of(name) for name, parameter in model.named_parameters(remove_duplicate=False) if id(parameter) in writes}
    kinds: dict[str, set[str]] = defaultdict(set)
    modules = dict(model.named_modules())
    for members in blocks.values():
        for block in members:
            if block in have:
                kinds[type(modules[block]).__name__].add(block)
    for members in blocks.values():
        for block in members:
            siblings = kinds.get(type(modules[block]).__name__, set())
            if block not in have and siblings and _same_parameters(modules, block, siblings):
                raise ModelError(
                    f"{kind}: {block} has no FFN that can be measured, but {min(siblings)} has one; "
                    "a model measured in part would be cut in part"
                )


def _same_parameters(modules: dict[str, Any], block: str, siblings: Iterable[str]) -> bool:
    names = {name for name, _ in modules[block].named_parameters()}
    return any({name for name, _ in modules[other].named_parameters()} == names for other in siblings)
