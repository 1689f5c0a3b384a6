"""`surgery.shrink`: the facts of ``surgery shrink --json`` from a function, its refusals, and ``--push``."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import surgery
from chanfmt.base.errors import ModelError, UsageError
from chanfmt.base.narrate import LOGGER
from surgery.cli.main import main
from surgery.cli.shrinking.run import Runner, StepError
from surgery.cli.shrinking.steps import Places, Step
from surgery.result.result import open_result
from tests.support.hub.client import environment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from surgery.cli.shrinking.outcome import Shrunk
    from tests.support.hub.server import Hub

ROOT = str(Path(__file__).parents[3])
TOKEN = "hf_SecretTokenOfAnn123"
SETTINGS: dict[str, Any] = {
    "seq_len": 64,
    "methods": "activation,magnitude",
    "try_recover": "none",
    "try_tokens": 128,
    "eval_tokens": 192,
    "recover": "bias",
    "other": "none",
}


@pytest.fixture(scope="module", autouse=True)
def steps_find_this_tree() -> Iterator[None]:
    """The steps are processes, which import what this process imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]))
        yield


@pytest.fixture(scope="module")
def shrunk(tiny_checkpoint: Any, tiny_atlas: Any, tmp_path_factory: pytest.TempPathFactory) -> Shrunk:
    out = tmp_path_factory.mktemp("shrunk") / "small"
    return surgery.shrink(tiny_checkpoint("llama"), "90%", out, atlas=tiny_atlas("llama"), progress=False, **SETTINGS)


def words(shrunk: Shrunk, tiny_atlas: Any, *more: str) -> list[str]:
    """The command line of the call that made ``shrunk``."""
    options = [word for name, value in SETTINGS.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    out = str(shrunk.result.directory)
    return ["shrink", shrunk.model, "--to", "90%", "-o", out, "--atlas", str(tiny_atlas("llama")), *options, *more]


def run(arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """``surgery`` with a test Hub as its Hub. It starts processes of its own, so it may take long on a busy machine."""
    command = [sys.executable, "-m", "surgery", *arguments]
    return subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)


def test_the_function_returns_what_the_command_prints(shrunk: Shrunk, tiny_atlas: Any, capfd: Any) -> None:
    assert main([*words(shrunk, tiny_atlas), "--json"]) == 0
    printed = capfd.readouterr()
    # The command finds the steps of the call: both run the same commands.
    assert printed.err.count("done before") == 3
    command, function = json.loads(printed.out), json.loads(json.dumps(shrunk.to_json()))
    assert [item["step"] for item in function["steps"]] == ["try uniform", "cut", "evaluate"]
    for found in (command, function):
        # These were probed twice.
        del found["estimate"]["seconds"], found["estimate"]["probed_flops"]
    assert command == function
    assert shrunk.verdict == open_result(shrunk.result.directory).report.verdict
    assert shrunk.tried[0].above <= shrunk.tried[1].above
    assert shrunk.result.report.parameters_after <= 0.9 * shrunk.result.report.parameters_before
    assert os.fspath(shrunk) == str(shrunk.result.directory)
    assert shrunk.verdict.words in repr(shrunk)


def test_the_healing_command_runs_as_it_is_printed(shrunk: Shrunk, tmp_path: Path) -> None:
    """It trains, from the dense model, on more text; only its number of steps and its output are changed here."""
    program, *arguments = shrunk.next["heal"].split()
    assert program == "surgery"
    assert arguments[arguments.index("--recover") + 1] == "distill"
    arguments[arguments.index("-o") + 1] = str(tmp_path / "healed")
    arguments[arguments.index("--recover-tokens") + 1] = "2k"
    assert main([*arguments, "--recover-steps", "2", "--quiet"]) == 0
    healed = open_result(tmp_path / "healed").report
    assert healed.recovery is not None
    assert healed.recovery.method == "distill"
    assert healed.plan.channels_kept == shrunk.result.report.plan.channels_kept


def test_a_result_is_pushed_at_the_end_of_the_run(shrunk: Shrunk, tiny_atlas: Any, hub: Hub, tmp_path: Path) -> None:
    hub.add_user(TOKEN, "ann")
    env = environment(hub, tmp_path / "home", TOKEN)
    done = run(words(shrunk, tiny_atlas, "--push", "ann/small", "--json"), env)
    assert done.returncode == 0, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["steps"][-1]["command"] == f"surgery push {shrunk.result.directory} ann/small"
    assert "[4/4] publish the result:" in done.stderr
    repo = hub.repo("ann/small")
    assert repo.private
    files = hub.files("ann/small")
    assert files == {path.name: path.read_bytes() for path in shrunk.result.directory.iterdir() if path.is_file()}
    # The verdict and the losses are in the card, and no file of the work directory went along.
    assert f"**Verdict: {shrunk.verdict.words}.**" in files["README.md"].decode()
    assert json.loads(files["surgery.json"])["verdict"] == json.loads(json.dumps(shrunk.verdict.to_json()))
    # A finished push is not made again, and the request for it is checked before any step.
    again = run(words(shrunk, tiny_atlas, "--push", "ann/small"), env)
    assert again.stderr.count("done before") == 4
    nobody = environment(hub, tmp_path / "nobody")
    refused = run(words(shrunk, tiny_atlas, "--push", "ann/small"), nobody)
    assert refused.returncode == 1
    assert "log in" in refused.stderr
    assert "done before" not in refused.stderr


def test_a_failed_step_tells_its_error_where_nobody_sees_its_stderr(tmp_path: Path, capfd: Any) -> None:
    places = Places(tmp_path / "small")
    step = Step("plan", "plan", ("surgery", "plan", str(tmp_path / "none.h5"), "--sparsity", "0.5"), places.work / "plan.json")
    with pytest.raises(StepError, match="ended with 2") as shown:
        Runner(places, 1, None, overwrite=False, quiet=False).run(step)
    told = capfd.readouterr().err.splitlines()[0]
    assert "none.h5" in told
    assert told not in shown.value.message
    with pytest.raises(StepError, match="ended with 2") as hidden:
        Runner(places, 1, None, overwrite=False, quiet=False, shown=False).run(step)
    assert told in hidden.value.message
    assert capfd.readouterr().err == ""


def test_a_warning_of_a_hidden_step_is_logged(tmp_path: Path, caplog: Any) -> None:
    """The atlas holds no redundancy, and the command says that its default method needs it."""
    places = Places(tmp_path / "small")
    out = places.work / "plan.json"
    words = ("surgery", "plan", str(Path(ROOT) / "spec" / "conformance" / "valid" / "minimal.h5"), "--sparsity", "0.5")
    with caplog.at_level(logging.WARNING, logger=LOGGER.name):
        Runner(places, 1, None, overwrite=False, quiet=False, shown=False).run(Step("plan", "plan", words, out, stdout=out))
    assert ["scar-prot ranks channels as scar-lp does" in record.message for record in caplog.records].count(True) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"to": "75"}, "--to"),
        ({"methods": ["wandaa"]}, "wandaa"),
        ({"public": True}, "push"),
        ({"calib": "pydoc", "atlas": "a.h5"}, "--calib"),
        ({"dtype": "float8"}, "float8"),
    ],
)
def test_options_are_checked_before_the_model(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=message):
        surgery.shrink("absent", **({"to": "75%", "out": tmp_path / "small"} | changes))
    assert not list(tmp_path.iterdir())


def test_a_loaded_model_and_an_absent_one_are_refused(tmp_path: Path) -> None:
    from tests.support.tiny import tiny_model

    with pytest.raises(UsageError, match="in memory"):
        surgery.shrink(tiny_model("llama"), "75%", tmp_path / "small")
    with pytest.raises((UsageError, ModelError)):
        surgery.shrink(str(tmp_path / "absent"), "75%", tmp_path / "small", calib="pydoc")
