"""The commit of a model that is measured, recorded, cut, and downloaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import chanfmt
from tests.support.hub.client import environment, run, script
from tests.support.hub.faults import Fault
from tests.support.hub.server import Hub
from tests.support.repeated import repeated
from tests.support.tiny import save_tiny, tiny_tokenizer

TOKEN = "hf_SecretTokenOfAnn123"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A Hub with a private tiny model, an environment that may see it, and its atlas, built by id."""
    home = tmp_path_factory.mktemp("identity")
    save_tiny(home / "tiny", "llama")
    tiny_tokenizer().save_pretrained(home / "tiny")
    with Hub() as hub:
        hub.add_user(TOKEN, "ann")
        repo = hub.add_repo("ann/tiny", home / "tiny", private=True)
        commit = repo.head.id
        env = environment(hub, home / "home", TOKEN)
        done = run(
            "chanfmt",
            "build",
            "ann/tiny",
            "-o",
            home / "a.h5",
            "--calib",
            "pydoc",
            "--sequences",
            "4",
            "--seq-len",
            "16",
            env=env,
        )
        assert done.returncode == 0, done.stderr
        # Later commits change first the README, then the weights.
        hub.change(repo, {"README.md": b"words"})
        other = home / "other"
        save_tiny(other, "llama", seed=1)
        hub.change(repo, other)
        yield hub, env, home / "a.h5", commit


FIND = """
import logging, sys
import chanfmt
from chanfmt.base.errors import ChanfmtError
from surgery.cut.source import find_model
logging.basicConfig(level=logging.WARNING, stream=sys.stdout, format="%(message)s")
logging.getLogger("chanfmt").setLevel(logging.INFO)
with chanfmt.open(sys.argv[1]) as atlas:
    try:
        print(find_model(atlas.model, sys.argv[2] or None, *sys.argv[3:]).revision)
    except ChanfmtError as error:
        print(error)
"""
"""Finds a model as every command does that needs the model of an atlas, but without loading torch as `prune` does."""


def prune(atlas, output, *arguments, env):
    return run("surgery", "prune", atlas, "--sparsity", "0.5", "-o", output, "--no-verify", *arguments, env=env)


def test_the_commit_is_recorded(measured):
    hub, _, path, commit = measured
    with chanfmt.open(path) as atlas:
        assert (atlas.model.id, atlas.model.revision, atlas.model.source) == ("ann/tiny", commit, "hub")
    assert hub.repo("ann/tiny").head.id != commit


def test_prune_takes_that_commit_and_says_that_there_is_another(measured, tmp_path):
    hub, env, path, commit = measured
    done = prune(path, tmp_path / "out", "--model", "ann/tiny", env=env)
    assert done.returncode == 0, done.stderr
    main = hub.repo("ann/tiny").head.id
    assert f"ann/tiny has moved on: its main branch is at {main[:12]}, and this uses {commit[:12]}" in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "surgery.json").read_text())
    assert record["source"]["revision"] == commit
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_another_commit_has_to_be_asked_for_and_to_hold_the_same_weights(measured, tmp_path):
    hub, env, path, commit = measured
    words = hub.repo("ann/tiny").head.parent
    lines = script(FIND, path, "", words, env=env).splitlines()
    assert lines[0] == f"using ann/tiny at {words[:12]}; the atlas was measured at {commit[:12]}"
    assert lines[-1] == words
    done = prune(path, tmp_path / "weights", "--revision", "main", env=env)
    assert done.returncode == 2
    assert "its weights differ" in done.stderr
    assert not (tmp_path / "weights").exists()


@pytest.mark.parametrize(
    ("named", "changes"),
    [
        ("", {"HF_HUB_OFFLINE": "1"}),
        ("ann/tiny", {"HF_ENDPOINT": "http://127.0.0.1:9"}),
        *repeated(("ann/tiny", {"HF_HUB_OFFLINE": "1"}), ("", {"HF_ENDPOINT": "http://127.0.0.1:9"})),
    ],
)
def test_what_is_cached_needs_no_network(measured, changes, named):
    _, env, path, commit = measured
    assert script(FIND, path, named, env=env | changes).splitlines() == [commit]


def test_what_is_not_cached_says_how_to_get_it(measured, tmp_path):
    _, env, path, commit = measured
    text = script(FIND, path, "", env=env | {"HF_HOME": str(tmp_path / "empty"), "HF_HUB_OFFLINE": "1"})
    assert "HF_HUB_OFFLINE is set" in text
    assert f"hf download ann/tiny --revision {commit}" in text
    text = script(FIND, path, "ann/other", env=env | {"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert "cannot be reached" in text
    assert "hf download ann/other" in text


def test_a_model_that_is_not_to_be_seen(measured, tmp_path):
    hub, _, path, _ = measured
    nobody = environment(hub, tmp_path / "home")
    hub.add_repo("bob/gated", {"config.json": b"{}"}, gated=True)
    assert "log in with: hf auth login" in script(FIND, path, "", env=nobody)
    text = script(FIND, path, "bob/gated", env=nobody)
    assert "bob/gated is gated" in text
    assert f"request access at {hub.url}/bob/gated" in text


def test_a_model_that_was_damaged_on_the_way(measured, tmp_path):
    hub, env, path, commit = measured
    fresh = env | {"HF_HOME": str(tmp_path / "home")}
    hub.faults.append(Fault("GET", "/cdn/", alter=lambda body: body[:-1] + bytes([body[-1] ^ 1])))
    text = script(FIND, path, "", env=fresh)
    assert "arrived damaged" in text
    assert "run the same command again" in text
    assert script(FIND, path, "", env=fresh).splitlines()[-1] == commit


def test_the_modules_of_a_sentence_transformer_are_fetched(measured, tmp_path):
    """Their directories are named in modules.json. Other directories stay on the Hub."""
    hub, _, path, _ = measured
    env = environment(hub, tmp_path / "home")
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_De[n]se"}]
    files = {
        "config.json": b"{}",
        "modules.json": json.dumps(modules).encode(),
        "1_Pooling/config.json": b"{}",
        "2_De[n]se/config.json": b"{}",
        "2_De[n]se/model.safetensors": b"weights",
        "2_De[n]se/pytorch_model.bin": b"pickle",
        "onnx/config.json": b"{}",
    }
    hub.add_repo("bob/sentences", files)
    code = "import sys; from chanfmt.hub.locate import locate_model; print(locate_model('bob/sentences').directory)"
    directory = Path(script(code, env=env).splitlines()[-1])
    found = {item.relative_to(directory).as_posix() for item in directory.rglob("*") if item.is_file()}
    assert found == set(files) - {"2_De[n]se/pytorch_model.bin", "onnx/config.json"}
    hub.add_repo("bob/hostile", {"config.json": b"{}", "modules.json": json.dumps([{"path": "../x"}]).encode()})
    text = script(FIND, path, "bob/hostile", env=env)
    assert "not a directory below the model's own" in text
