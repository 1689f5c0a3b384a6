"""An unfinished refit, kept beside its output. The same command continues from it.

The directory ``OUTPUT.partial`` holds files of raw tensors, and ``state.json``, which lists them. A save writes and flushes
new files first. Then ``state.json`` is replaced in one step. Then the files that it does not list any more are removed. So
``state.json`` lists complete files, whenever the process is killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from chanfmt.base.errors import ChanfmtError, CheckError, UsageError, first_line
from chanfmt.base.files import atomic_file, fsync_path, remove_stale
from chanfmt.base.narrate import say, warn
from chanfmt.base.parsed import check_type
from chanfmt.base.publishing import OutputAppearedError
from chanfmt.base.schedule import FIRST_SECONDS, Schedule
from chanfmt.base.version import __version__
from surgery.recovery.leftover import OURS, STATE_FILE, SUFFIX, is_ours, partial_path, remove_partial
from surgery.recovery.options import LayerRecovery  # noqa: TC001 (msgspec reads the annotations)
from surgery.recovery.tensor_file import TensorFile, check_tensors, read_tensors, write_tensors

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from chanfmt.models.source import ModelSource
    from chanfmt.models.streaming.spool import Spool
    from surgery.planning.plan import PruningPlan
    from surgery.recovery.options import Refit

    Key = tuple[str, str | int]

_LAYOUT = 1
_UNKEYED = ("tokens", "source_of", "sources", "text", "device", "spool_bytes", "save_every")
"""Fields of `Refit` that do not decide the numbers, or that `request_of` treats by themselves."""


@dataclass(frozen=True)
class RefitState:
    """A refit between two blocks, without its tensors.

    Attributes:
        block: Number of the next block.
        layers: What was done to each FFN before that block.
        roles: Name of each of these FFNs to the roles of its fitted weights.
    """

    block: int
    layers: tuple[LayerRecovery, ...]
    roles: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class _Record:
    """The content of ``state.json``.

    Attributes:
        weights: Name of an FFN to the file of its fitted weights.
        hidden: The file of the hidden states that pass through the blocks.
    """

    layout: int
    request: dict[str, str]
    environment: dict[str, str]
    block: int
    layers: tuple[LayerRecovery, ...]
    roles: dict[str, tuple[str, ...]]
    weights: dict[str, TensorFile]
    hidden: TensorFile

    @property
    def files(self) -> tuple[TensorFile, ...]:
        return (*self.weights.values(), self.hidden)


class PartialRefit:
    """What a refit keeps beside its output. A failure to write it does not end the refit.

    Args:
        output: The output of the command.
        request: What decides the numbers of the refit: its names in messages to texts that must be the same to continue.
        environment: What may change their last bits, in the same form.
        every: As for `chanfmt.base.schedule.Schedule`.

    Attributes:
        path: The directory.

    Raises:
        UsageError: Something else lies at ``path``.
    """

    def __init__(self, output: Path, request: Mapping[str, str], environment: Mapping[str, str], every: float | None) -> None:
        self.path = partial_path(output)
        self._shown = output.with_name(output.name + SUFFIX)
        self._request = dict(request)
        self._environment = dict(environment)
        self._prefix = hashlib.sha256(json.dumps(self._request, sort_keys=True).encode()).hexdigest()[:12]
        self._every = every
        self._reserved = 0
        self._started = time.monotonic()
        self._schedule = Schedule(every, self._started)
        self._off = False
        if not is_ours(self.path):
            raise UsageError(
                f"{self._shown} is in the way: an unfinished refit is kept there",
                hint="move it away, or choose another -o",
            )
        self._record = self._taken_up()

    @property
    def state(self) -> RefitState | None:
        """The last saved state; None if there is none of this refit."""
        record = self._record
        return None if record is None else RefitState(record.block, record.layers, record.roles)

    def restore(self, spool: Spool) -> None:
        """Put the saved tensors into ``spool`` under their keys. Raises `ChanfmtError` if they cannot be read."""
        assert self._record is not None
        for file in self._record.files:
            path = self.path / file.name
            try:
                for key, tensor in read_tensors(path, file):
                    spool.put(key, tensor)
            except OSError as error:
                raise ChanfmtError(f"cannot read {path}: {error.strerror}", hint=f"remove {self._shown} to start over") from None

    def begin(self, hidden: int, weights: int, reserved: int) -> None:
        """Check, before the work, that the disk has room for the saved state. Without it, nothing is saved.

        Args:
            hidden: Largest number of bytes of hidden states.
            weights: Bytes of all fitted weights.
            reserved: Bytes that the command will write to the same file system besides.
        """
        self._reserved = reserved
        if self._every == math.inf:
            self._off = True
            return
        # While a state is saved, the one before it is still there.
        needed, free = 2 * hidden + weights, shutil.disk_usage(self.path.parent).free
        if free < needed + reserved:
            self._off = True
            warn(
                f"an interrupted refit will have to start over: saving it in {self._shown} takes up to {needed / 1e6:,.0f} MB "
                f"besides {reserved / 1e6:,.0f} MB for the output, and {free / 1e6:,.0f} MB are free"
            )

    def save_if_due(self, state: RefitState, spool: Spool, hidden: Sequence[Key], *, last: bool = False) -> None:
        """Save ``state`` and its tensors if it is time.

        Args:
            spool: Holds the fitted weights under (role, name of the FFN), and the hidden states.
            hidden: Keys of the hidden states.
            last: The work is done, and the state is small.
        """
        now = time.monotonic()
        new = [name for name in state.roles if self._record is None or name not in self._record.weights]
        weights = {name: [(role, name) for role in state.roles[name]] for name in new}
        nbytes = sum(spool.nbytes(key) for keys in (*weights.values(), hidden) for key in keys)
        worth = last and self._every is None and now - self._started >= FIRST_SECONDS
        if self._off or not (worth or self._schedule.due(now, nbytes)):
            return
        try:
            if shutil.disk_usage(self.path.parent).free < nbytes + self._reserved:
                raise ChanfmtError(f"the disk of {self.path.parent} is almost full")
            self._save(state, spool, weights, hidden, nbytes)
        except (ChanfmtError, OSError) as error:
            self._off = True
            text = error.message if isinstance(error, ChanfmtError) else first_line(error)
            warn(f"the refit is not saved any more: {text}")
        finally:
            self._schedule.tried(now, time.monotonic(), nbytes)

    def remove(self) -> None:
        """Remove what was saved."""
        remove_partial(self.path)

    def way_out(self) -> str | None:
        """How to continue after an interruption; None if nothing was saved."""
        if self._record is None:
            return None
        count = len(self._record.layers)
        return f"{self._shown} holds the refit of {count} FFN{'' if count == 1 else 's'}: run the same command again to continue"

    def _save(
        self, state: RefitState, spool: Spool, weights: Mapping[str, Sequence[Key]], hidden: Sequence[Key], nbytes: int
    ) -> None:
        first = self._record is None
        with contextlib.suppress(FileExistsError):
            os.mkdir(self.path)
            fsync_path(self.path.parent)
        known = {} if self._record is None else dict(self._record.weights)
        for name, keys in weights.items():
            known[name] = write_tensors(self.path / f"{self._prefix}.{len(known)}.weights", spool, keys)
        record = _Record(
            _LAYOUT,
            self._request,
            self._environment,
            state.block,
            state.layers,
            {name: tuple(roles) for name, roles in state.roles.items()},
            known,
            write_tensors(self.path / f"{self._prefix}.{state.block}.hidden", spool, hidden),
        )
        with atomic_file(self.path / STATE_FILE, overwrite=True) as temporary:
            temporary.write_text(json.dumps(dataclasses.asdict(record)), encoding="utf-8")
        self._record = record
        listed = {STATE_FILE, *(file.name for file in record.files)}
        for name in os.listdir(self.path):
            if name not in listed and OURS.fullmatch(name):
                with contextlib.suppress(OSError):
                    os.unlink(self.path / name)
        if first:
            say(
                f"the refit is saved in {self._shown} ({nbytes / 1e6:,.0f} MB); after an interruption, run the same command again"
            )

    def _taken_up(self) -> _Record | None:
        """The saved state of this refit, with a note on what cannot be used."""
        remove_stale(self.path / STATE_FILE)
        # A name may be too long for the file system, and then nothing lies there.
        if not os.path.isfile(self.path / STATE_FILE):
            return None
        try:
            record = _read(self.path)
            changed = sorted(
                name for name in {**record.request, **self._request} if record.request.get(name) != self._request.get(name)
            )
            if changed:
                say(f"note: {self._shown} holds a refit that differs in {', '.join(changed)}; starting over")
                return None
            for file in record.files:
                check_tensors(self.path / file.name, file)
        except (OSError, ValueError, KeyError) as error:
            say(f"note: {self._shown} is damaged ({first_line(error)}); starting over")
            return None
        others = [name for name, value in self._environment.items() if record.environment.get(name) != value]
        if others:
            say(f"note: {', '.join(others)} changed: the last bits may differ from those of an uninterrupted refit")
        return record


@contextlib.contextmanager
def kept_beside(partial: PartialRefit) -> Iterator[None]:
    """Remove ``partial`` if the body ends without an error. Otherwise, add to the error how to continue."""
    try:
        yield
    except (OutputAppearedError, CheckError):
        # The result is finished, and kept under another name; or the fitted weights are wrong.
        partial.remove()
        raise
    except KeyboardInterrupt:
        way_out = partial.way_out()
        if way_out is not None:
            raise KeyboardInterrupt(way_out) from None
        raise
    except ChanfmtError as error:
        way_out = partial.way_out()
        if way_out is not None:
            error.add_hint(way_out)
        raise
    partial.remove()


def request_of(plan: PruningPlan, source: ModelSource, refit: Refit, device: torch.device, dtype: str | None) -> dict[str, str]:
    """What decides the numbers of a refit: its names in messages to texts."""
    assert refit.tokens is not None
    tokens = [refit.tokens, *([] if refit.source_of is None else [refit.source_of])]
    cut = [
        (block.name, block.module, block.tensors, block.kept.shape, block.kept.astype("<i4").tobytes())
        for block in plan.blocks
        if block.is_cut
    ]
    return {
        "the plan": _digest(repr(cut).encode()),
        "the model": _digest(source.fingerprint.encode(), source.config_text.encode()),
        "the tokens": _digest(
            repr((refit.tokens.shape, refit.sources)).encode(), *(item.astype("<i4").tobytes() for item in tokens)
        ),
        "--dtype": str(dtype),
        "the device": device.type,
    } | {
        f"--recover ({item.name})": str(getattr(refit, item.name))
        for item in dataclasses.fields(refit)
        if item.name not in _UNKEYED
    }


def environment_of(device: torch.device) -> dict[str, str]:
    """What may change the last bits of a refit: its names in messages to texts."""
    import transformers

    cuda = device.type == "cuda"
    return {
        "chanfmt": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "the number of threads": str(torch.get_num_threads()),
        "the hardware": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
    }


def _read(path: Path) -> _Record:
    """Read ``state.json``. Raises `ValueError` and `OSError`."""
    record = check_type(json.loads((path / STATE_FILE).read_bytes()), _Record)
    if record.layout != _LAYOUT:
        raise ValueError("another version of chanfmt wrote it")
    return record


def _digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()
