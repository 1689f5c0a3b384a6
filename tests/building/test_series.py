"""One atlas for each revision of a model: local directories, commits on a Hub, interruptions, existing atlases."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest

import chanfmt
from chanfmt.base.errors import UsageError
from chanfmt.building.options import BuildOptions
from chanfmt.building.series import members
from chanfmt.cli.main import main
from tests.support.hub.client import environment, run, script
from tests.support.hub.server import Hub
from tests.support.interrupted import killed_after
from tests.support.tiny import save_tiny, tiny_tokenizer

CALIBRATION = ("--calib", "pydoc", "--sequences", "4", "--seq-len", "16")
CACHED = """
from huggingface_hub import scan_cache_dir
print(*sorted(revision.commit_hash for repo in scan_cache_dir().repos for revision in repo.revisions))
"""


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the checkpoints that a trainer leaves."""
    home = tmp_path_factory.mktemp("run")
    for seed, name in enumerate(("checkpoint-10", "checkpoint-20", "checkpoint-30")):
        save_tiny(home / name, "llama", seed=seed)
        tiny_tokenizer().save_pretrained(home / name)
    return home


def test_checkpoints_of_a_directory(run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "series"
    revisions = "checkpoint-10, checkpoint-20,checkpoint-30"
    command = ["build", str(run_directory), "--revisions", revisions, "-o", str(target), *CALIBRATION]
    assert main(command) == 0
    assert f"atlas trajectory {target}/checkpoint-10.h5" in capsys.readouterr().err
    prints = []
    for name in ("checkpoint-10", "checkpoint-20", "checkpoint-30"):
        with chanfmt.open(target / f"{name}.h5", verify=True) as atlas:
            assert (atlas.model.id, atlas.status) == (name, "complete")
            prints.append((atlas.model.fingerprint, atlas.calibration.sequence_sha256))
    assert len({fingerprint for fingerprint, _ in prints}) == 3
    assert prints[0][1] == prints[1][1] == prints[2][1]
    before = (target / "checkpoint-10.h5").read_bytes()
    (target / "checkpoint-20.h5").unlink()
    assert main([*command, "--json"]) == 0
    written = capsys.readouterr()
    assert [Path(path).name for path in json.loads(written.out)] == [f"checkpoint-{n}.h5" for n in (10, 20, 30)]
    assert "checkpoint-20 (2 of 3)" in written.err
    assert (target / "checkpoint-10.h5").read_bytes() == before


def test_a_break_loses_little(run_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "series"
    command = [
        "build",
        str(run_directory),
        "--revisions",
        "checkpoint-10,checkpoint-20",
        "-o",
        str(target),
        *CALIBRATION,
        "--checkpoint-every",
        "0",
        "--batch-size",
        "1",
    ]

    with killed_after(6, monkeypatch):
        main(command)
    assert sorted(path.name for path in target.iterdir()) == ["checkpoint-10.h5", "checkpoint-20.h5.partial"]
    assert main(command) == 0
    assert sorted(path.name for path in target.iterdir()) == ["checkpoint-10.h5", "checkpoint-20.h5"]
    with chanfmt.open(target / "checkpoint-20.h5") as atlas:
        _, session = atlas.producer.history
        assert session["resumed_at_sequence"] == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"revisions": "a/b,a-b"}, "would both be written"),
        ({"revisions": " , "}, "names no revision"),
        ({"revisions": "a", "revision": "b"}, "cannot be combined"),
        ({"revisions": "a", "dry_run": True}, "cannot be combined"),
    ],
)
def test_refusals(changes: dict[str, object], reason: str, tmp_path: Path) -> None:
    options = dataclasses.replace(BuildOptions("ann/x", str(tmp_path / "o")), **changes)
    with pytest.raises(UsageError, match=reason):
        members(options) if "/" in str(changes["revisions"]) else options.check()


def test_files_of_other_models_and_texts_stay(run_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "series"
    command = ["build", str(run_directory), "--revisions", "checkpoint-10", "-o", str(target), *CALIBRATION]
    assert main(command) == 0
    shutil.copy(target / "checkpoint-10.h5", target / "checkpoint-20.h5")
    assert main([*command[:3], "checkpoint-20", *command[4:]]) == 2
    assert "made with another model: checkpoint-10" in capsys.readouterr().err
    assert main([*command[:-1], "32"]) == 2
    assert "not 4 x 32" in capsys.readouterr().err
    text = tmp_path / "other.txt"
    text.write_text("one two three four five six seven eight nine ten " * 200)
    for more, reason in (
        (("--seed", "5"), "another seed: 0, not 5"),
        (("--rho", "0.05"), "another labelling: rho 0.01"),
        (("--calib", str(text)), "measured on other text: pydoc/calibrate"),
    ):
        assert main([*command, *more]) == 2
        assert reason in capsys.readouterr().err
    few = [*command[:4], "-o", str(tmp_path / "few"), "--calib", str(text), "--sequences", "4000", "--seq-len", "16"]
    assert main(few) == 0
    assert main(few) == 0
    assert "exists already" in capsys.readouterr().err
    text.write_text("other words " * 2000)
    assert main(few) == 2
    assert "measured on other text" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main([*command[:4], "-o", str(tmp_path / "file"), *CALIBRATION]) == 2
    assert "-o names a directory" in capsys.readouterr().err
    assert main([*command[:3], "checkpoint-99", *command[4:]]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_commits_come_one_at_a_time_and_go(run_directory: Path, tmp_path: Path) -> None:
    with Hub() as hub:
        repo = hub.add_repo("ann/tiny", run_directory / "checkpoint-10")
        commits = [repo.head.id]
        for name in ("checkpoint-20", "checkpoint-30"):
            hub.change(repo, run_directory / name)
            commits.append(repo.head.id)
        env = environment(hub, tmp_path / "home")
        kept = run("chanfmt", "build", "ann/tiny", "--revision", commits[1], "-o", tmp_path / "one.h5", *CALIBRATION, env=env)
        assert kept.returncode == 0, kept.stderr
        series = tmp_path / "series"
        done = run("chanfmt", "build", "ann/tiny", "--revisions", ",".join(commits), "-o", series, *CALIBRATION, env=env)
        assert done.returncode == 0, done.stderr
        assert script(CACHED, env=env).split() == [commits[1]]
        for commit in commits:
            with chanfmt.open(series / f"{commit}.h5") as atlas:
                assert atlas.model.revision == commit
