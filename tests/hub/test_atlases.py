"""Atlases on the Hub: `atlas push`, `atlas pull`, and hf:// in every command that reads an atlas."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import yaml

import chanfmt
from chanfmt.cli.info import layer_rows, layer_table
from chanfmt.format.writer import write_atlas
from chanfmt.hub.atlases import atlas_card
from chanfmt.hub.names import HubFile
from surgery.planning.file import load_plan
from tests.support.factory import random_atlas, random_content
from tests.support.hub.client import environment, run, session, start
from tests.support.hub.faults import Fault

TOKEN = "hf_SecretTokenOfAnn123"


@pytest.fixture
def ann(hub, tmp_path):
    hub.add_user(TOKEN, "ann")
    return environment(hub, tmp_path / "home", TOKEN)


@pytest.fixture
def anyone(hub, tmp_path):
    """Someone who is not logged in, with an empty cache."""
    return environment(hub, tmp_path / "other")


@pytest.fixture
def path(tmp_path):
    return random_atlas(tmp_path / "a.h5")


def atlas(*arguments, env, code=0):
    done = run("chanfmt", *arguments, env=env)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done


def refusal(*arguments, env, code):
    """Error text of a command that must fail with one line and a hint."""
    done = atlas(*arguments, env=env, code=code)
    first, hint = done.stderr.splitlines()[-2:]
    assert first.startswith("atlas: error: ")
    assert hint.startswith("  ")
    assert done.stdout == ""
    return done.stderr


def test_push_and_pull(hub, ann, path, tmp_path):
    done = json.loads(atlas("push", path, "tiny-atlas", "--json", env=ann).stdout)
    commit = hub.repo("ann/tiny-atlas", "dataset").head.id
    assert done == {
        "repo": "ann/tiny-atlas",
        "url": f"{hub.url}/datasets/ann/tiny-atlas",
        "commit": commit,
        "address": f"hf://datasets/ann/tiny-atlas@{commit}/a.h5",
    }
    files = hub.files("ann/tiny-atlas", "dataset")
    assert files["a.h5"] == path.read_bytes()
    assert hub.repo("ann/tiny-atlas", "dataset").private
    _, front, card = files["README.md"].decode().split("---\n", 2)
    assert "chanfmt" in yaml.safe_load(front)["tags"]
    with chanfmt.open(path) as opened:
        for text in (opened.content_sha256, opened.model.id, opened.model.fingerprint, "n_eff", opened.calibration.loss):
            assert text in card
        assert len([line for line in card.splitlines() if line.startswith(tuple(f"| {n} |" for n in range(4)))]) == 4
    assert TOKEN not in files["README.md"].decode()
    # A pull that names a commit gives the file of that commit, also after later commits.
    hub.change(hub.repo("ann/tiny-atlas", "dataset"), {"a.h5": random_atlas(tmp_path / "b.h5", seed=1).read_bytes()})
    atlas("pull", f"ann/tiny-atlas@{commit}", "-o", tmp_path / "c.h5", env=ann)
    assert (tmp_path / "c.h5").read_bytes() == path.read_bytes()
    pulled = json.loads(atlas("pull", "ann/tiny-atlas", "a.h5", "-o", tmp_path / "d.h5", "--json", env=ann).stdout)
    assert (tmp_path / "d.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    assert pulled["source"] == f"hf://datasets/ann/tiny-atlas@{hub.repo('ann/tiny-atlas', 'dataset').head.id}/a.h5"
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("atlas build me/model -o a.h5", False),
        ("atlas build /home/me/model -o a.h5", True),
    ],
)
def test_the_card_tells_no_directories(command, told, tmp_path):
    content = random_content()
    history = ({"command": command, "sources": ["a.h5"]},)
    producer = dataclasses.replace(content.producer, command=command, history=history)
    write_atlas(dataclasses.replace(content, producer=producer), tmp_path / "a.h5")
    with chanfmt.open(tmp_path / "a.h5") as opened:
        card = atlas_card(opened, HubFile("ann/a", file="a.h5"), layer_table(opened, layer_rows(opened)))
    assert ("/home/me" in card, card.count(command)) == (False, 0 if told else 2)
    assert card.count("names directories of a machine") == (2 if told else 0)


def test_push_refuses_what_is_no_atlas(hub, ann, path, tmp_path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert "is not a valid atlas" in refusal("push", path, "ann/x", env=ann, code=2)
    assert "cannot be the name" in refusal("push", path, "ann/x y", env=ann, code=2)
    assert not hub.store.repos
    assert not hub.requests("POST", "")


def test_pull_refuses_what_is_no_atlas(hub, anyone, path, tmp_path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    hub.add_repo("ann/bad", {"a.h5": bytes(data)}, kind="dataset")
    hub.add_repo("ann/two", {"a.h5": b"1", "sub/b.h5": b"2"}, kind="dataset")
    assert "is not a valid atlas" in refusal("pull", "ann/bad", "-o", tmp_path / "o.h5", env=anyone, code=2)
    assert "a.h5, sub/b.h5" in refusal("pull", "ann/two", "-o", tmp_path / "o.h5", env=anyone, code=2)
    assert not (tmp_path / "o.h5").exists()


def test_what_was_damaged_on_the_way(hub, anyone, path, tmp_path):
    hub.add_repo("ann/x", {"a.h5": path.read_bytes()}, kind="dataset")
    hub.faults.append(Fault("GET", "/cdn/", alter=lambda body: bytes([body[0] ^ 1]) + body[1:]))
    error = refusal("pull", "ann/x", "-o", tmp_path / "o.h5", env=anyone, code=1)
    assert "arrived damaged" in error
    assert "run the same command again" in error
    assert not (tmp_path / "o.h5").exists()
    atlas("pull", "ann/x", "-o", tmp_path / "o.h5", env=anyone)
    assert (tmp_path / "o.h5").read_bytes() == path.read_bytes()


def test_addresses_wherever_an_atlas_is_read(hub, anyone, path, tmp_path):
    repo = hub.add_repo("ann/x", {"sub/a.h5": path.read_bytes()}, kind="dataset")
    hub.add_repo("ann/model", {"a.h5": path.read_bytes()})
    address, pinned = "hf://ann/x/sub/a.h5", f"hf://datasets/ann/x@{repo.head.id}/sub/a.h5"
    info, model, valid, compared, refused, _, planned, shown = session(
        ("chanfmt.cli.main", "info", address, "--json"),
        ("chanfmt.cli.main", "info", "hf://models/ann/model/a.h5", "--json"),
        ("chanfmt.cli.main", "validate", pinned),
        ("chanfmt.cli.main", "compare", address, path),
        ("chanfmt.cli.main", "label", address, "--rho", "0.05"),
        ("chanfmt.cli.main", "label", address, "--rho", "0.05", "-o", tmp_path / "l.h5"),
        ("surgery.cli.main", "plan", address, "--sparsity", "0.5", "-o", tmp_path / "p.safetensors", "--json"),
        ("tui.cli", "hf://ann/x"),
        env=anyone,
    )
    assert json.loads(info.stdout)["file"] == pinned
    assert json.loads(model.stdout)["layers"] == json.loads(info.stdout)["layers"]
    assert valid.stdout.startswith(f"{pinned}: valid")
    assert "both files hold the same atlas" in compared.stderr
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "add -o FILE" in refused.stderr
    with chanfmt.open(tmp_path / "l.h5") as labelled:
        assert labelled.producer.history[-1]["sources"] == [pinned]
    assert json.loads(planned.stdout)["atlas_source"] == pinned
    assert load_plan(tmp_path / "p.safetensors").atlas_source == pinned
    assert "atlas-tui needs a terminal" in shown.stderr


@pytest.mark.parametrize("offline", ["HF_HUB_OFFLINE", "no network"])
def test_offline(hub, anyone, path, offline):
    repo = hub.add_repo("ann/x", {"a.h5": path.read_bytes()}, kind="dataset")
    first = atlas("info", "hf://ann/x/a.h5", env=anyone).stdout
    changes = {"HF_HUB_OFFLINE": "1"} if offline == "HF_HUB_OFFLINE" else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    *cached, missing = session(
        *(
            ("chanfmt.cli.main", "info", address)
            for address in ("hf://ann/x/a.h5", "hf://ann/x", f"hf://datasets/ann/x@{repo.head.id}/a.h5", "hf://ann/y")
        ),
        env=anyone | changes,
    )
    assert [done.stdout for done in cached] == [first] * 3
    assert missing.returncode == 1
    assert ("HF_HUB_OFFLINE is set" if offline == "HF_HUB_OFFLINE" else "cannot be reached") in missing.stderr
    assert "hf download ann/y --repo-type dataset" in missing.stderr


def test_addresses_that_lead_nowhere(hub, anyone):
    hub.add_repo("ann/x", {"a.h5": b"1"}, kind="dataset")
    hub.add_repo("ann/gated", {"a.h5": b"1"}, kind="dataset", gated=True)
    wanted = {
        "hf://ann/none/a.h5": ("hf auth login", 1),
        "hf://ann/gated/a.h5": ("request access at", 1),
        "hf://ann/x/b.h5": ("has no such file", 1),
        "hf://ann/x@v9/a.h5": ("has no branch, tag or commit 'v9'", 1),
        "hf://ann": ("is not the address of a file on the Hub", 2),
        "hf://ann/x/../a.h5": ("is not a path in a repository", 2),
        "hf://ann/x y/a.h5": ("cannot be the name of a repository", 2),
    }
    for (text, code), done in zip(
        wanted.values(), session(*(("chanfmt.cli.main", "info", address) for address in wanted), env=anyone), strict=True
    ):
        assert text in done.stderr
        assert done.returncode == code
        first, hint = done.stderr.splitlines()
        assert first.startswith("atlas: error: ")
        assert hint.startswith("  ")


def test_the_token_is_nowhere(hub, path, tmp_path):
    hub.add_user(TOKEN, "ann")
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(TOKEN)
    env = environment(hub, home, HF_DEBUG="1")
    fault = Fault("PUT", "/lfs/whole", pace=0.004)
    hub.faults.append(fault)
    process = start("-m", "chanfmt", "push", path, "ann/x", env=env)
    assert fault.met.wait(60)
    seen = Path(f"/proc/{process.pid}/cmdline").read_bytes() if sys.platform == "linux" else b""
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    atlas("pull", "ann/x", "-o", tmp_path / "o.h5", env=env)
    hub.faults.append(Fault("POST", "/commit/", status=403, message=f"the token {TOKEN} may not", times=9))
    hub.faults.append(Fault("GET", "/api/datasets/ann/z", status=418, message=f"the token {TOKEN} is a teapot", times=9))
    failed = [run("chanfmt", "push", path, "ann/y", env=env), run("chanfmt", "push", path, "ann/z", env=env)]
    assert [done.returncode for done in failed] == [1, 1]
    assert "is a teapot" in failed[1].stderr
    texts = [out, err, seen.decode(), *(done.stdout + done.stderr for done in failed)]
    assert not [text for text in texts if TOKEN in text]
    files = [item.read_bytes() for item in tmp_path.rglob("*") if item.is_file() and item != home / "token"]
    files += [file.content for repo in hub.store.repos.values() for file in repo.head.files.values()]
    assert len(files) > 3
    assert not [content for content in files if TOKEN.encode() in content]
