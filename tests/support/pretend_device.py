"""A pretend accelerator, so that code for GPUs is tested without one.

Importing this module gives torch the device type ``pretend``. Its tensors hold their values on the CPU, and compute there. They
fail where those of a GPU fail: if tensors of two devices meet in one operation, or if numpy reads one of them. A process
cannot give the device back, so tests use the process that `pretending` starts.

    python -m tests.support.pretend_device     runs the commands that come as JSON lines; see `Pretending.run`
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import traceback
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from surgery.cut.in_place import WHOLE_TENSORS

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "pretend"
COUNT = 2
"""Number of devices: ``pretend:0`` and ``pretend:1``."""
aten = torch.ops.aten
MOVING = frozenset({aten.copy_.default, aten._to_copy.default})
INDEXING = frozenset(
    {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default, aten._unsafe_index.Tensor}
)
"""Operations that take index tensors from the CPU, on a GPU too."""
MAKING = ("empty.memory_format", "empty_strided", "arange", "arange.start", "arange.start_step", "eye", "eye.m", "randperm")
"""Operations that make a tensor. All others of this kind are made of these."""
PRODUCTS = ("linear", "matmul", "mm", "addmm", "bmm", "baddbmm")
"""Operations that autocast computes in 16 bits."""
SAID = sys.stdout
"""Where a worker answers. Commands print elsewhere."""
operations = 0
"""Operations that ran on the device."""
largest = 0
"""Bytes of the largest tensor on the device since the peak began anew."""


class PretendTensor(torch.Tensor):
    """A tensor on the pretend device. ``held`` has its values, on the CPU."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor, device: torch.device) -> PretendTensor:
        tensor: PretendTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=device
        )
        tensor.held = held
        global largest
        largest = max(largest, held.nbytes)
        return tensor

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, value: PretendTensor) -> None:
        torch.Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, **kwargs: Any) -> str:
        return f"PretendTensor({tuple(self.shape)}, {self.dtype}, {self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        global operations
        operations += 1
        return _computed(func, args, dict(kwargs or {}))


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result of ``func``, which has a tensor of the device among its arguments or is asked to make one there."""
    tensors = _tensors((args, kwargs))
    _check_together(func, args, tensors)
    if func is aten._fused_sdp_choice.default:
        return 0  # The attention that is written out: the fused ones are kernels of real devices.
    asked = kwargs.get("device")
    target = _numbered(asked) if asked is not None else next(t.device for t in tensors if isinstance(t, PretendTensor))
    if asked is not None:
        kwargs["device"] = torch.device("cpu")
    kwargs.pop("pin_memory", None)
    result = func(*_mapped(_held, args), **_mapped(_held, kwargs))
    if func in MOVING and func is not aten.copy_.default:
        # A tensor that arrives at another device is a copy.
        shared = any(result is _held(tensor) for tensor in tensors)
        result = result.clone() if shared else result
    before = {id(_held(tensor)): tensor for tensor in tensors}

    def placed(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) in before:
            return before[id(value)]
        return PretendTensor(value, target) if target.type == NAME else value

    return _mapped(placed, result)


def _check_together(func: Any, args: Any, tensors: list[torch.Tensor]) -> None:
    """Raise `RuntimeError`, as torch does, if ``tensors`` lie on several devices and ``func`` does not carry them across."""
    if func in MOVING:
        return
    if func in INDEXING:
        tensors = [args[0], *(item for item in _tensors(args[2:]))]
    # A number may lie on the CPU.
    devices = {str(tensor.device) for tensor in tensors if tensor.ndim or isinstance(tensor, PretendTensor)}
    if len(devices) > 1:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but found at least two devices, {' and '.join(sorted(devices))}! "
            f"(in {func})"
        )


def _held(value: Any) -> Any:
    return value.held if isinstance(value, PretendTensor) else value


def _mapped(function: Any, value: Any) -> Any:
    """``value`` with ``function`` applied to everything in its tuples, lists and dicts."""
    if isinstance(value, tuple):
        return tuple(_mapped(function, item) for item in value)
    if isinstance(value, list):
        return [_mapped(function, item) for item in value]
    if isinstance(value, dict):
        return {name: _mapped(function, item) for name, item in value.items()}
    return function(value)


def _tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    _mapped(lambda item: found.append(item) if isinstance(item, torch.Tensor) else None, value)
    return found


def _numbered(device: Any) -> torch.device:
    device = torch.device(device)
    return torch.device(NAME, device.index or 0) if device.type == NAME else device


def _cast(func: Any, *args: Any, **kwargs: Any) -> Any:
    dtype = torch.get_autocast_dtype(NAME)
    with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)):
        return func(*_mapped(lambda item: item.to(dtype) if isinstance(item, torch.Tensor) else item, args), **kwargs)


def _copied(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    _held(target).copy_(_held(source))
    return target


class _Module(_DummyBackendModule):
    """What ``torch.pretend`` offers, as ``torch.cuda`` does."""

    def device_count(self) -> int:
        return COUNT

    def set_device(self, device: Any) -> None:
        pass

    def synchronize(self, device: Any = None) -> None:
        pass

    def empty_cache(self) -> None:
        pass

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        global largest
        largest = 0

    def max_memory_allocated(self, device: Any = None) -> int:
        """Bytes of the largest tensor that was made: the peak of a GPU is not smaller."""
        return largest

    def manual_seed(self, seed: int) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        pass


def register() -> tuple[torch.library.Library, ...]:
    """Give torch the device. Returns what must live as long as the device."""
    WHOLE_TENSORS.add(PretendTensor)
    _setup_privateuseone_for_python_backend(rename=NAME, backend_module=_Module())
    # Modules whose parameters are tied must stay so when they are moved, as on a GPU.
    torch.__future__.set_swap_module_params_on_conversion(True)
    library = torch.library.Library("aten", "IMPL")
    # Only operations that make tensors come here: those that take one come to `PretendTensor` before.
    for name in MAKING:
        packet, _, overload = name.partition(".")
        func = getattr(getattr(aten, packet), overload or "default")
        library.impl(name, partial(_made, func), "PrivateUse1")
    library.impl("_copy_from", _copied, "PrivateUse1")
    for name in PRODUCTS:
        library.impl(name, partial(_cast, getattr(aten, name)), "AutocastPrivateUse1")
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    return library, others


def _made(func: Any, *args: Any, **kwargs: Any) -> Any:
    # torch leaves out what has its usual value, the device among it if a tensor of the device gave it.
    return _computed(func, args, {"device": torch.device(NAME), **kwargs})


@dataclass(frozen=True)
class Done:
    """A command that has run.

    Attributes:
        code: Exit code.
        output, errors: Text of stdout and stderr.
        operations: Operations that ran on the pretend device.
    """

    code: int
    output: str
    errors: str
    operations: int


class Pretending:
    """A process with the pretend device."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def run(self, program: str, *arguments: object) -> Done:
        """Run ``program``, ``atlas`` or ``surgery``, with ``arguments``."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([program, *map(str, arguments)]), file=self._process.stdin, flush=True)
        return Done(**json.loads(self._process.stdout.readline()))


@contextlib.contextmanager
def pretending() -> Iterator[Pretending]:
    """Start a process with the pretend device, for the body."""
    command = [sys.executable, "-m", "tests.support.pretend_device"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Pretending(process)
        assert process.stdin is not None
        process.stdin.close()


def _serve() -> None:
    from chanfmt.cli.main import main as atlas
    from surgery.cli.main import main as surgery

    global operations
    for line in sys.stdin:
        program, *arguments = json.loads(line)
        operations, output, errors = 0, io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            try:
                code: Any = {"atlas": atlas, "surgery": surgery}[program](arguments)
            except SystemExit as stop:
                code = stop.code
            except Exception:
                traceback.print_exc()
                code = 99
        answer = {"code": int(code or 0), "output": output.getvalue(), "errors": errors.getvalue(), "operations": operations}
        print(json.dumps(answer), file=SAID, flush=True)


if __name__ == "__main__":
    _KEPT = register()
    _serve()
