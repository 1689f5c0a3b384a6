"""Whole commands whose system calls are interrupted in turn: ``python -m tests.support.crash.commands``.

Each command replaces an older output. A call is interrupted by SIGKILL, or it fails with an error of the disk. Afterwards each
output is the old one or the new one, stderr holds no traceback, and the exit code says what happened.
"""

from __future__ import annotations

import os

# Threads do not survive a fork.
os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import contextlib
import json
import multiprocessing
import re
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from tests.support.crash.trace import CALLS, trace
from tests.support.hub.client import UNSET
from tests.support.hub.server import Hub

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

REMOVES = ("unlink", "unlinkat", "rmdir")
CLAIM = re.compile(r"\.claim$")
MAKES = re.compile(r"openat\(.*O_CREAT")
CHANGES = (
    *CALLS,
    "writev",
    "pwritev",
    "sendfile",
    "copy_file_range",
    "symlink",
    "symlinkat",
    "mkdirat",
    "fchmod",
    "fchmodat",
    "chown",
    "fchownat",
    "setxattr",
    "openat",
    "sendto",
)
"""Calls that change the disk or the Hub. Of openat, only those that make a file are interrupted."""
# The client of the Hub waits for the answer to what it could not send, and a failed call here is no broken connection: the test
# Hub has faults of that kind.
FAILING = dict.fromkeys(CHANGES, ("ENOSPC", "EIO")) | {
    "sendto": (),
    "flock": ("ENOLCK", "EIO"),
    "openat": ("ENOSPC", "EACCES"),
}
"""The errors that a call returns, one in each run."""
TOKEN = "hf_SecretTokenOfAnn123"


@dataclass(frozen=True)
class Command:
    """A command that replaces outputs.

    Attributes:
        main: The entry point.
        words: Its arguments, in a directory that has the old outputs.
        outputs: Names of the files and directories that are replaced, each whole or not at all.
        look: Makes something comparable of an output.
        check: Looks at everything else that the command changed; it is told whether the command has succeeded.
        reset: Undoes that.
    """

    name: str
    main: Callable[[list[str]], int]
    words: tuple[str, ...]
    outputs: tuple[str, ...]
    look: Callable[[Path], object]
    check: Callable[[bool], object] = lambda done: None
    reset: Callable[[], object] = lambda: None


@dataclass
class Seen:
    """What one command did when its calls were interrupted."""

    calls: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    codes: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def interrupt(command: Command, old: Path, directory: Path, *, kill: bool, every: int = 1) -> Seen:
    """Run ``command`` once for each of its calls, and interrupt that call.

    Args:
        old: Directory with the inputs and the old outputs.
        directory: Where copies of ``old`` are made.
        kill: Interrupt by SIGKILL; otherwise by each error in `FAILING`.
    """
    place, log, said = directory / "place", directory / "trace", directory / "stderr"

    def states() -> list[object]:
        return [command.look(place / name) for name in command.outputs]

    def everything() -> set[str]:
        return {str(item.relative_to(place)) for item in place.rglob("*")}

    def run(*options: str) -> tuple[int, str, str]:
        """Run the command from its start. Returns exit code, trace, and stderr."""
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(old, place, symlinks=True)
        command.reset()
        with said.open("w") as stderr:
            code, text = trace(lambda: _main(command, place, stderr.fileno()), log, ("-f", *options))
        return code, text, said.read_text(errors="replace")

    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(old, place, symlinks=True)
    before = states()
    code, text, error = run("-e", f"trace={','.join(CHANGES)}")
    assert code == 0, error
    after, whole = states(), everything()
    assert all(one != other for one, other in zip(before, after, strict=True)), "the test cannot tell old from new"
    seen = Seen()
    for name, nth, call in _points(text)[::every]:
        for error_name in ("",) if kill else FAILING[name]:
            how = "signal=KILL" if kill else f"error={error_name}"
            code, _, error = run("-e", f"trace={name}", "-e", f"inject={name}:{how}:when={nth}")
            told = f"{command.name}: {name} {nth} {how}: exit {code}: {error.strip()[-300:]} [{call}]"
            seen.calls[name] += 1
            seen.codes[code] += 1
            with contextlib.suppress(AssertionError):
                there = [
                    "new" if found == new else "old" if found == was else "third"
                    for found, was, new in _looked(states, before, after)
                ]
                seen.outcomes["+".join(there)] += 1
                if "third" in there:
                    seen.wrong.append(f"a third thing: {told}")
                seen.wrong += [f"{what}: {told}" for what in _complaints(code, error, there, kill=kill)]
                more = everything() - whole
                if kill or name in REMOVES:
                    # The next writer removes what could not be removed.
                    more = {item for item in more if not any(part.startswith(".") for part in Path(item).parts)}
                if more:
                    seen.wrong.append(f"left behind {sorted(more)[:3]}: {told}")
            seen.wrong += _problems(lambda code=code: command.check(code == 0), told)
            if kill:
                # What a user does after a kill: the same command again.
                done = states() == after
                code = _again(command, place, said)
                # Without --overwrite, a command that was killed after its output was in place is refused.
                refused = done and code == 2 and " exists" in said.read_text()
                extra = {item for item in everything() ^ whole if not (refused and CLAIM.search(item))}
                if (code and not refused) or states() != after or extra:
                    seen.wrong.append(f"again: exit {code}, {sorted(extra)[:3]}, {said.read_text()[-200:]}: {told}")
                seen.wrong += _problems(lambda: command.check(True), f"again: {told}")
    return seen


def _looked(states: Callable[[], list[object]], before: list[object], after: list[object]) -> list[tuple[object, object, object]]:
    try:
        found = states()
    except Exception as error:
        found = [f"unreadable: {error}"] * len(before)
    return list(zip(found, before, after, strict=True))


def _problems(look: Callable[[], object], told: str) -> list[str]:
    try:
        look()
    except AssertionError as problem:
        return [f"{problem}: {told}"]
    return []


def _complaints(code: int, error: str, there: list[str], *, kill: bool) -> list[str]:
    wrong = []
    if "Traceback" in error or "Exception ignored" in error:
        wrong.append("traceback")
    if code == -9 and kill:
        return wrong
    if code not in (0, 1, 2):
        wrong.append("exit code")
    if code == 0 and set(there) != {"new"}:
        wrong.append("success that is none")
    if code in (1, 2) and len(re.findall(r"^[a-z-]+: error: ", error, re.MULTILINE)) != 1:
        wrong.append("not one error line")
    return wrong


def _points(text: str) -> list[tuple[str, int, str]]:
    """Every call in a trace: its name, its number among the calls of its thread and name, and how it looks."""
    counts: Counter[tuple[str, str]] = Counter()
    points = {}
    for line in text.splitlines():
        found = re.match(r"(\d+)\s+(\w+)\((.*)", line)
        if found is None or found[2] not in CHANGES:
            continue
        process, name = found[1], found[2]
        counts[process, name] += 1
        if name != "openat" or MAKES.search(line):
            points.setdefault((name, counts[process, name]), found[0][:160])
    return [(name, nth, call) for (name, nth), call in points.items()]


def _main(command: Command, place: Path, stderr: int) -> None:
    """Run the command in this process, which is a forked one, and end the process with its exit code."""
    os.chdir(place)
    os.dup2(stderr, 2)
    # Processes share the lock that tqdm makes, and a killed one would keep it.
    tqdm.set_lock(threading.RLock())
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    try:
        code = command.main(list(command.words))
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        code = 99
    os._exit(code)


def _again(command: Command, place: Path, said: Path) -> int:
    from tests.support.crash.harness import child

    with said.open("w") as stderr:
        pid = child(lambda: _main(command, place, stderr.fileno()))
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def bytes_of(target: Path) -> object:
    """Everything in a file or a directory; None if there is none."""
    if not target.exists():
        return None
    items = [target] if target.is_file() else sorted(target.rglob("*"))
    return {str(item.relative_to(target)): item.read_bytes() for item in items if item.is_file()}


def weights_of(target: Path) -> object:
    """Names of a result's files, and its weights, which must be what its record says; None if there is no result."""
    from surgery.result.result import check_unchanged, open_result

    if not target.exists():
        return None
    check_unchanged(open_result(target))
    return {
        str(item.relative_to(target)): item.read_bytes() if item.suffix == ".safetensors" else None
        for item in sorted(target.rglob("*"))
        if item.is_file()
    }


def channels_of(target: Path) -> object:
    """The channels that a plan keeps. The order of keys in a plan's header differs from run to run."""
    from surgery.planning.file import load_plan

    return [block.kept.tolist() for block in load_plan(target).blocks] if target.exists() else None


def sums_of(target: Path) -> object:
    """The numbers of an atlas, its digest checked; its time and its command differ from run to run."""
    from tests.support.crash.harness import content

    if not target.exists():
        return None
    found = content(target)
    return [*(stack.variables["lp"].tobytes() for stack in found.stacks), *found.calibration.sequence_sha256]


def make_old(home: Path) -> None:
    """Write the inputs of all commands: a model, its atlas, a result, and two atlases that can be merged."""
    from chanfmt.format.reader import Atlas
    from chanfmt.format.writer import write_atlas
    from chanfmt.models.source import ModelSource
    from surgery.cut.apply import apply_plan
    from surgery.cut.options import CutOptions
    from surgery.planning.options import PlanOptions
    from surgery.planning.plan import make_plan
    from tests.support.cut_models import save_atlas, save_model
    from tests.support.factory import random_content, with_other_tokens

    model = save_model("llama", home / "model")
    atlas = save_atlas("llama", model, home / "atlas.h5", source="hub", revision="c0ffee")
    with Atlas.open(atlas) as opened:
        apply_plan(make_plan(opened, PlanOptions(0.25)), ModelSource(model), home / "result", CutOptions(), atlas=opened)
    first = random_content(layers=2, channels=24)
    for name, content in (("a.h5", first), ("b.h5", with_other_tokens(first))):
        write_atlas(content, home / name)


def make_commands(hub: HubProcess) -> list[tuple[Command, tuple[str, ...]]]:
    """Every command, and the words that made its older output."""
    from chanfmt.cli.main import main as atlas
    from surgery.cli.main import main as surgery

    prune = ("prune", "atlas.h5", "--model", "model", "-o", "out")
    found = [
        (Command("prune", surgery, (*prune, "--sparsity", "0.5"), ("out",), weights_of), (*prune, "--sparsity", "0.25")),
        (
            Command("plan", surgery, ("plan", "atlas.h5", "--sparsity", "0.5", "-o", "out"), ("out",), channels_of),
            ("plan", "atlas.h5", "--sparsity", "0.25", "-o", "out"),
        ),
        (
            Command("merge", atlas, ("merge", "a.h5", "b.h5", "-o", "out"), ("out",), sums_of),
            ("strip", "a.h5", "-o", "out"),
        ),
        (
            Command("report", atlas, ("report", "b.h5", "-o", "out"), ("out",), pages_of),
            ("report", "atlas.h5", "-o", "out"),
        ),
    ]
    for suffix in ("csv", "npz", "json", "parquet"):
        words = ("-o", f"out.{suffix}", "--metrics", "lp")
        found.append(
            (
                Command(f"export {suffix}", atlas, ("export", "b.h5", *words), (f"out.{suffix}",), bytes_of),
                ("export", "atlas.h5", *words),
            )
        )
    return [*found, (push_command(hub, surgery), ())]


def pages_of(target: Path) -> object:
    """The pages and tables of a report; of its figures, the names."""
    found = bytes_of(target)
    assert found is None or isinstance(found, dict)
    return found and {name: None if name.startswith("figures") or name == "report.html" else data for name, data in found.items()}


class HubProcess:
    """A test Hub in a process of its own: a fork of a process with a thread may wait forever for a lock of that thread.

    Attributes:
        url: What ``HF_ENDPOINT`` should be.
    """

    def __init__(self) -> None:
        self._here, there = multiprocessing.Pipe()
        self._pid = os.fork()
        if self._pid == 0:
            self._here.close()
            _serve(there)
            os._exit(0)
        there.close()
        self.url: str = self._here.recv()

    def close(self) -> None:
        self._here.close()
        os.waitpid(self._pid, 0)

    def reset(self) -> None:
        """Forget all repositories."""
        self._here.send("reset")
        self._here.recv()

    def check(self, done: bool) -> None:
        """Raise `AssertionError` for a repository that is public, or that holds some files of a result but not all."""
        self._here.send("look")
        found = self._here.recv()
        assert not done or any(files for _, files in found), "the Hub does not hold the result"
        for private, files in found:
            assert private, "the repository is public"
            assert not files or {"surgery.json", "config.json", "README.md"} <= files, "half of the result is on the Hub"


def _serve(pipe: Any) -> None:
    with Hub() as hub, contextlib.suppress(EOFError):
        hub.add_user(TOKEN, "ann")
        pipe.send(hub.url)
        while True:
            if pipe.recv() == "reset":
                hub.store.repos.clear()
            pipe.send([(repo.private, set(repo.head.files) - {".gitattributes"}) for repo in hub.store.repos.values()])


def push_command(hub: HubProcess, main: Callable[[list[str]], int]) -> Command:
    """`surgery push` to a repository that does not exist yet. The card is written again, because it names the repository."""
    words = ("push", "result", "thing")
    return Command("push", main, words, ("result/README.md",), bytes_of, hub.check, hub.reset)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commands", nargs="+", metavar="COMMAND", help="all by default")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="interrupt every N-th call only")
    arguments = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="commands-"))
    for name in UNSET:
        os.environ.pop(name, None)
    hub = HubProcess()
    os.environ |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(directory / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_TOKEN": TOKEN,
        "NO_PROXY": "*",
    }
    result = _interrupt_all(hub, directory, arguments.commands, arguments.every)
    hub.close()
    shutil.rmtree(directory)
    print(json.dumps(result, indent=2))


def _interrupt_all(hub: HubProcess, directory: Path, wanted: Sequence[str] | None, every: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    home = directory / "old"
    home.mkdir()
    make_old(home)
    result = {}
    for command, older in make_commands(hub):
        if wanted and command.name.split()[0] not in wanted and command.name not in wanted:
            continue
        for fresh in (False, True) if older else (False,):
            name = command.name + (" anew" if fresh else "")
            inputs, place = directory / f"{name} inputs", directory / name
            shutil.copytree(home, inputs)
            place.mkdir()
            words = command.words
            if not fresh and older:
                assert _quietly(command.main, older, inputs) == 0
                words = (*words, "--overwrite")
            else:
                # Modules that a command imports are imported once, in this process.
                shutil.copytree(home, place / "warm")
                assert _quietly(command.main, words, place / "warm") == 0
                shutil.rmtree(place / "warm")
            run = replace(command, name=name, words=words)
            for kill in (True, False):
                started = time.monotonic()
                seen = interrupt(run, inputs, place, kill=kill, every=every)
                result[f"{name}, {'killed' if kill else 'failing'}"] = {
                    "interruptions": sum(seen.calls.values()),
                    "outputs": dict(seen.outcomes),
                    "exit codes": {str(code): count for code, count in sorted(seen.codes.items())},
                    "wrong": seen.wrong,
                    "seconds": round(time.monotonic() - started),
                }
                print(list(result)[-1], list(result.values())[-1], file=sys.stderr, flush=True)
            shutil.rmtree(place)
            shutil.rmtree(inputs)
    return result


def _quietly(main: Callable[[list[str]], int], words: Sequence[str], place: Path) -> int:
    before = os.getcwd()
    os.chdir(place)
    try:
        with open(os.devnull, "w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
            return main(list(words))
    finally:
        os.chdir(before)


if __name__ == "__main__":
    main()
