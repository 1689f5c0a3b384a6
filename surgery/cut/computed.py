"""What a checkpoint computes with stock code: one forward pass, block by block if the model allows it, otherwise in memory."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from chanfmt.base.errors import ChanfmtError, CheckError, ModelError, first_line
from chanfmt.models.find.discover import assemble, examined
from chanfmt.models.find.intercept import Interceptor
from chanfmt.models.find.trace import trace
from chanfmt.models.load import auto_class
from chanfmt.models.loadable import loadable
from chanfmt.models.matrices import matrix_of
from chanfmt.models.quiet import quiet_transformers
from chanfmt.models.streaming.blocks import UnstreamableError
from chanfmt.models.streaming.on_demand import open_on_demand
from chanfmt.models.streaming.parameters import freed_memory_returned
from surgery.cut.matching import match_ffns
from surgery.cut.stock import parse_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy as np
    from torch import nn

    from chanfmt.models.ffn import FFN
    from chanfmt.models.source import ModelSource
    from chanfmt.models.streaming.on_demand import OnDemand
    from surgery.cut.inputs import Inputs
    from surgery.planning.plan import BlockPlan

    CheckMemory = Callable[[int, str], None]

KINDS = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
_FAILURES = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, NotImplementedError)
"""What a forward pass raises if it uses weights that are not in memory."""


@dataclass(frozen=True)
class Computed:
    """The result of one forward pass.

    Attributes:
        output: The model's first output, usually logits.
        inputs: What the model read.
        ties: Groups of names of parameters that are one parameter.
        keys: ``missing_keys``, ``unexpected_keys``, ...: names in which the checkpoint and the stock model differ.
        streamed: Whether the blocks were in memory one at a time.
    """

    output: torch.Tensor
    inputs: Inputs
    ties: set[frozenset[str]]
    keys: Mapping[str, set[str]]
    streamed: bool


@dataclass(frozen=True, eq=False)
class Mask:
    """Channels that are taken out of a model, and what is added in their place.

    Attributes:
        blocks: FFNs of a plan, in model order.
        added: Name of an FFN to the vector that is added to the FFN's output, (outputs,).
    """

    blocks: Sequence[BlockPlan]
    added: Mapping[str, np.ndarray]

    def put_on(self, model: Any, ffns: Sequence[FFN]) -> Interceptor:
        """Zero the write vectors of the removed channels in ``model``, whose FFNs are ``ffns``.

        Returns:
            A context manager that adds `added` while it is entered.

        Raises:
            CheckError: An FFN is not among ``ffns``, or computes numbers from all its channels.
        """
        interceptor = Interceptor(model)
        for block, ffn in zip(self.blocks, match_ffns(self.blocks, ffns), strict=True):
            if not block.is_cut:
                continue
            if ffn is None:
                raise _not_found(block)
            if ffn.mixed:
                raise CheckError(
                    f"{block.module} computes numbers from all its channels (a norm, a threshold) between its projections, so "
                    "the kept channels would compute something else than in the dense model with the others masked",
                    hint="to cut this model anyway, add --no-verify, and evaluate the result",
                )
            for expert, member in enumerate(ffn.members):
                removed = torch.from_numpy(block.removed_of(expert)).long()
                matrix_of(model, member.write.matrix).data.index_fill_(1, removed, 0.0)
                if block.name in self.added:
                    bias = torch.from_numpy(self.added[block.name]).to(model.dtype)
                    interceptor.on(member.write.matrix, after=bias.add)
        return interceptor


@dataclass(frozen=True, eq=False)
class Computation:
    """A forward pass of a checkpoint in stock code on the CPU. The model is traced to find the FFNs that a mask names.

    Attributes:
        source: The checkpoint.
        dtype: Dtype of the pass.
        inputs: Makes the inputs for a model. The model may have no weights yet.
        mask: Channels that are taken out; None for none.
        rounded: Dtype that the weights are rounded to before they are used; None for not at all.
    """

    source: ModelSource
    dtype: torch.dtype
    inputs: Callable[[Any], Inputs]
    mask: Mask | None = None
    rounded: torch.dtype | None = None

    def run(self, check_memory: CheckMemory) -> Computed:
        """Run the model block by block, or in memory if its class does not allow that.

        Args:
            check_memory: Called before weights are read with the bytes of memory that the pass needs, and with what they hold.
                It may raise an error.

        Raises:
            CheckError: Stock transformers cannot load the checkpoint, or the mask does not fit the model.
        """
        for embeddings in (True, False):
            with contextlib.suppress(UnstreamableError), freed_memory_returned():
                return self.run_streamed(check_memory, embeddings=embeddings)
        return self.run_in_memory(check_memory)

    def run_streamed(self, check_memory: CheckMemory, *, embeddings: bool = True) -> Computed:
        """Run the model with the weights of one block in memory.

        Args:
            embeddings: Whether embeddings that share no weight are in memory only while they run, like a block.

        Raises:
            UnstreamableError: The model's class does not allow that.
            CheckError: As `run`.
        """
        with self._loading():
            config = self._config
            opened = open_on_demand(
                auto_class(config),
                config,
                self.source,
                self.dtype,
                embeddings=embeddings,
                check_memory=lambda needed: check_memory(needed, f"one block at a time in {self._dtype_name}"),
            )
        model = opened.model
        self._round(model)
        masked = _Masked(opened, self.mask)

        def inside(name: str, part: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            self._round(part)
            return masked.run(name, forward, args, kwargs)

        inputs = self.inputs(model)
        # Blocks are loaded in the pass too.
        with self._loading():
            try:
                with opened.running(inside), torch.no_grad(), quiet_transformers():
                    output = inputs.run(model)[0]
            except _FAILURES as error:
                raise UnstreamableError(f"{type(model).__name__} does not run block by block: {first_line(error)}") from error
        masked.check_all_run()
        return Computed(output, inputs, _ties(model), opened.keys, True)

    def run_in_memory(self, check_memory: CheckMemory) -> Computed:
        """Run the model as ``from_pretrained`` loads it, whole. Raises `CheckError` as `run`."""
        check_memory(self.source.index.parameters * self.dtype.itemsize * 5 // 4, f"the whole model in {self._dtype_name}")
        with self._loading(), quiet_transformers(), loadable(self.source.index) as directory:
            model, info = auto_class(self._config).from_pretrained(
                directory,
                trust_remote_code=self.source.trust_remote_code,
                dtype=self.dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        model.eval()
        self._round(model)
        inputs = self.inputs(model)
        mask = self.mask.put_on(model, inputs.find_ffns(model)) if self.mask else contextlib.nullcontext()
        try:
            with mask, torch.inference_mode(), quiet_transformers():
                output = inputs.run(model)[0]
        except _FAILURES as error:
            raise CheckError(
                f"{type(model).__name__} cannot run {inputs.count} {inputs.text}: {first_line(error)}",
                hint="to cut this model anyway, add --no-verify, and evaluate the result",
            ) from error
        return Computed(output, inputs, _ties(model), {kind: {str(key) for key in info[kind]} for kind in KINDS}, False)

    @property
    def _config(self) -> Any:
        """The config of stock code, or that of the checkpoint's own code if the source says that this code may run."""
        return self.source.config if self.source.trust_remote_code else parse_config(self.source.config_fields)

    @property
    def _dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def _round(self, module: nn.Module) -> None:
        if self.rounded is not None:
            # Buffers that are stored, such as the biases of a router, are rounded too.
            for tensor in module.state_dict(keep_vars=True).values():
                if tensor.is_floating_point() and not tensor.is_meta:
                    tensor.data = tensor.data.to(self.rounded).to(tensor.dtype)

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if isinstance(error, UnstreamableError) or (isinstance(error, ChanfmtError) and not isinstance(error, ModelError)):
                raise
            text = error.message if isinstance(error, ModelError) else error
            raise CheckError(f"stock transformers cannot load {self.source.directory}: {text}") from error


class _Masked:
    """Runs the parts of a model, each with the part of a mask that belongs to it.

    Raises:
        UnstreamableError: FFNs that the mask names lie outside the parts.
    """

    def __init__(self, opened: OnDemand, mask: Mask | None) -> None:
        self._model = opened.model
        self._added = mask.added if mask else {}
        self._blocks: dict[str, list[BlockPlan]] = defaultdict(list)
        for block in mask.blocks if mask else ():
            number = opened.number_of(block.module)
            if number is not None:
                self._blocks[opened.names[number]].append(block)
            elif block.is_cut:
                raise UnstreamableError(f"{type(self._model).__name__} has {block.module} outside its lists of blocks")
        self._waiting = {name for name, blocks in self._blocks.items() if any(block.is_cut for block in blocks)}

    def run(self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the part ``name``, which is loaded. Raises `CheckError` if the mask does not fit the part."""
        blocks = self._blocks.get(name, [])
        if not any(block.is_cut for block in blocks):
            return forward(*args, **kwargs)
        self._waiting.discard(name)
        # Some blocks change their input in place.
        copied, named = tree_map_only(torch.Tensor, torch.clone, (args, kwargs))
        floating = [leaf for leaf in tree_leaves((copied, named)) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
        calls = trace(self._model, floating, lambda: forward(*copied, **named))
        ffns = assemble(self._model, examined(calls), lambda: True)
        with Mask(blocks, self._added).put_on(self._model, ffns):
            return forward(*args, **kwargs)

    def check_all_run(self) -> None:
        """Raise `CheckError` if a part with removed channels never ran."""
        for name in sorted(self._waiting):
            raise _not_found(next(block for block in self._blocks[name] if block.is_cut))


def _not_found(block: BlockPlan) -> CheckError:
    return CheckError(f"the model has no FFN {block.module} of {block.n_channels} channels, which the plan cuts")


def _ties(model: Any) -> set[frozenset[str]]:
    """Groups of names of one parameter."""
    groups: dict[int, set[str]] = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups[id(parameter)].add(name)
    return {frozenset(names) for names in groups.values() if len(names) > 1}
