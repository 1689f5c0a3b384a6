"""Open a model as a verified chain of blocks, and find its FFNs: from its files if it is larger than memory, or loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import _disable_current_modes

from chanfmt.base.errors import ModelError, first_line
from chanfmt.models.accounting import check_accounted
from chanfmt.models.causal import causal_rows, shows_causal
from chanfmt.models.classes import auto_class
from chanfmt.models.find.discover import Found, assemble, check_complete, examined
from chanfmt.models.find.probe import probe
from chanfmt.models.find.trace import Tracer
from chanfmt.models.load import check_finite, pick_device, pick_dtype
from chanfmt.models.out_of_memory import is_out_of_memory
from chanfmt.models.run import eager_experts, run_text, test_tokens
from chanfmt.models.streaming.chain import Chain, equal, state_of
from chanfmt.models.streaming.parameters import StoredParameters, return_freed_memory, stored_dtype, weightless

if TYPE_CHECKING:
    from collections.abc import Callable

    from chanfmt.models.ffn import FFN
    from chanfmt.models.source import ModelSource


@dataclass(frozen=True)
class StreamedModel:
    """A model that is run block by block.

    Attributes:
        chain: The model as a chain of blocks.
        ffns: The FFNs, verified on the instance, in model order. Each lies in a block.
        causal: Whether the model is causal: no token sees a later one.
    """

    chain: Chain
    ffns: list[FFN]
    causal: bool


def open_streamed(source: ModelSource, *, dtype: str = "auto", device: str = "auto") -> StreamedModel:
    """Open the model that the config of ``source`` names, with the weights of one block at a time. All weights are read once.

    While a block has its weights, they are checked for NaN, and its FFNs are found and probed. The block is run both by the
    model's own forward pass and by itself, and the results must agree.

    Args:
        dtype, device: As for `chanfmt.models.load.load_model`.

    Raises:
        ModelError: The model is not a chain of blocks, a tensor of its files would be ignored, weights are missing or not
            finite, or an FFN cannot be verified.
    """
    check_accounted(source)
    return_freed_memory()
    place = pick_device(device)
    wanted = pick_dtype(dtype, place)
    kind = stored_dtype(source) if wanted == "auto" else wanted
    model = weightless(auto_class(source.config), source.config, kind, trust_remote_code=source.trust_remote_code)
    chain = Chain(model, StoredParameters(model, source, kind), place)
    with eager_experts(model), torch.no_grad():
        return _Opening(chain).opened()


def open_resident(model: Any) -> StreamedModel:
    """Open ``model``, which is loaded on one device, as a chain of blocks that keep their weights.

    The chain is verified as `open_streamed` verifies it. `Chain.close` gives the model back as it was.

    Raises:
        ModelError: The model is not a chain of blocks, or an FFN cannot be verified. The model is as it was.
    """
    chain = Chain(model, None, next(model.parameters()).device)
    try:
        with eager_experts(model), torch.no_grad():
            return _Opening(chain).opened()
    except BaseException:
        chain.close()
        raise


class _Opening:
    """The pass of test tokens through all blocks that verifies a chain.

    Besides the model's own forward pass, each block runs by itself on the same tokens, and on two rows that differ in their
    last token. The outputs of a causal model for these rows differ at the last token only.
    """

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.model = chain.model
        self.ids = test_tokens(self.model)
        self.tracer = Tracer(self.model)
        self.reached = self.start = 0
        self.found: list[Found] = []
        self.rows = causal_rows(self.model)
        try:
            self.hidden, self.calls = chain.learn(lambda: run_text(self.model, self.ids))
            self.rows_hidden, self.rows_calls = chain.calls(lambda: run_text(self.model, self.rows))
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError) as error:
            raise chain.refused(f"does not run without its blocks ({first_line(error)})") from error

    def opened(self) -> StreamedModel:
        try:
            # The tracer knows tensors by their identity, so the input must not be the tensor of another pass.
            ids = self.ids.clone()
            with self.chain.running(self._inside), self.tracer:
                self.tracer.begin(ids)
                output = run_text(self.model, ids)
        except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, MemoryError) as error:
            kind = type(self.model).__name__
            if is_out_of_memory(error):
                raise ModelError(
                    f"{kind}: even one block at a time is too large for the memory",
                    hint="use --dtype bfloat16, or a larger machine",
                ) from None
            raise ModelError(f"{kind} cannot run {self.ids.shape[1]} tokens of text: {first_line(error)}") from error
        self.tracer.end()
        with self.chain.ending(self.hidden):
            if not _close(_result(run_text(self.model, self.ids)), _result(output)):
                raise self.chain.refused("computes its output from more than the output of its last block")
        with self.chain.ending(self.rows_hidden):
            causal = shows_causal(run_text(self.model, self.rows))
        ffns = assemble(self.model, self.found, lambda: causal, self.tracer.calls)
        check_complete(self.model, ffns, self.tracer.calls)
        outside = next((ffn for ffn in ffns if self.chain.number_of(ffn.container) is None), None)
        if outside is not None:
            raise self.chain.refused(f"has the FFN {outside.container} outside its list of blocks")
        return StreamedModel(self.chain, ffns, causal)

    def _inside(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any], forward: Callable[[], Any]) -> Any:
        name, call = self.chain.names[number], self.calls[number]
        if number != self.reached:
            raise self.chain.refused(f"applies {name} more than once")
        self.reached += 1
        self.start = self.start or self.tracer.mark()
        with self.chain.loaded(number) as block:
            if not self.chain.resident:
                check_finite(block, name)
            done = len(self.tracer.calls)
            given, given_kwargs = call.filled(self.hidden)
            if not (equal(args, given) and equal(kwargs, given_kwargs)):
                raise self.chain.refused(f"calls {name} with something that depends on other blocks than the preceding one")
            with self.tracer.visiting(block.named_parameters(prefix=name)):
                output = forward()
            with _disable_current_modes():
                alone = self.chain.run(number, call, self.hidden)
                if not _close(alone, state_of(output)):
                    raise self.chain.refused(f"has {name} compute something else when it runs by itself")
                before, self.hidden = self.hidden, state_of(output)
                self.rows_hidden = self.chain.run(number, self.rows_calls[number], self.rows_hidden)
                found = examined(self.tracer.calls, done)
                if found:
                    ffns = assemble(self.model, found, lambda: True)
                    probe(self.model, ffns, lambda: self.chain.run(number, call, before))
                self.found += found
            self.tracer.rewind(self.start, self.hidden)
            return output


def _result(output: Any) -> Any:
    return output.logits if hasattr(output, "logits") else output[0]


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two results are the same up to the order in which an accelerator adds."""
    tolerance = 1e-5 if one.dtype in (torch.float32, torch.float64) else 1e-2
    return one.shape == other.shape and float((one - other).abs().max()) <= tolerance * float(other.abs().max())
