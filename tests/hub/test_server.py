"""The real client against the test Hub, without code of chanfmt: the other tests of the Hub rely on this."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.support.hub.client import environment, script
from tests.support.hub.faults import Fault

TOKEN = "hf_test_ann"

UPLOAD = """
import json, sys
from huggingface_hub import HfApi
api = HfApi()
repo, folder, kind, create_pr = sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "pr"
assert api.whoami()["name"] == "ann"
url = api.create_repo(repo, repo_type=kind, private=True, exist_ok=True)
info = api.upload_folder(repo_id=repo, folder_path=folder, repo_type=kind, commit_message="numbers", create_pr=create_pr)
revision = info.pr_revision or "main"
files = {item.path: (item.lfs.sha256 if item.lfs else item.blob_id)
         for item in api.list_repo_tree(repo, recursive=True, revision=revision, repo_type=kind) if hasattr(item, "size")}
again = api.repo_info(repo, repo_type=kind, revision=revision, files_metadata=True)
print(json.dumps({"oid": info.oid, "files": files, "url": str(url), "revision": revision, "private": again.private,
                  "sha": again.sha, "sizes": {item.rfilename: item.size for item in again.siblings}}))
"""
DOWNLOAD = """
import json, sys
from pathlib import Path
from huggingface_hub import snapshot_download
folder = Path(snapshot_download(sys.argv[1], repo_type=sys.argv[2], revision=sys.argv[3] if len(sys.argv) > 3 else None))
print(json.dumps([folder.name, {path.relative_to(folder).as_posix(): path.read_bytes().hex()
                                for path in folder.rglob("*") if path.is_file()}]))
"""


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "folder"
    (path / "sub").mkdir(parents=True)
    (path / "README.md").write_text("---\ntags:\n- a\n---\n\ntext\n")
    (path / "sub" / "notes.txt").write_text("notes")
    (path / "empty.txt").write_text("")
    (path / "weights.safetensors").write_bytes(bytes(range(256)) * 40)
    (path / "other.safetensors").write_bytes(b"\1" * 5000)
    return path


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["model", "dataset"])
@pytest.mark.parametrize("create_pr", ["", "pr"])
def test_folder_goes_up_and_comes_back(hub, tmp_path, folder, kind, create_pr):
    hub.add_user(TOKEN, "ann")
    hub.part_bytes, hub.page = 6000, 2
    env = environment(hub, tmp_path / "home", TOKEN)
    done = json.loads(script(UPLOAD, "ann/thing", folder, kind, create_pr, env=env))
    assert done["private"]
    assert done["revision"] == ("refs/pr/1" if create_pr else "main")
    assert hub.files("ann/thing", kind, done["revision"]) == content(folder)
    assert hub.files("ann/thing", kind) == ({} if create_pr else content(folder))
    assert done["files"] == {path: file.etag for path, file in hub.repo("ann/thing", kind).at(done["revision"]).files.items()}
    assert done["oid"] == done["sha"]
    assert set(hub.store.uploaded.values()) == {1}
    # The storage never sees the token.
    assert not [item for item in hub.log if item.path.startswith(("/lfs/whole", "/lfs/part", "/cdn")) and item.authorized]
    name, files = json.loads(script(DOWNLOAD, "ann/thing", kind, done["revision"], env=env))
    assert name == done["sha"]
    assert {path: bytes.fromhex(text) for path, text in files.items() if path != ".gitattributes"} == content(folder)
    # A second upload of the same files moves nothing.
    if not create_pr:
        assert json.loads(script(UPLOAD, "ann/thing", folder, kind, "", env=env))["oid"] == done["oid"]
        assert set(hub.store.uploaded.values()) == {1}


@pytest.mark.parametrize("create_pr", ["", "pr"])
def test_folder_goes_up_through_xet(hub, tmp_path, folder, create_pr):
    pytest.importorskip("hf_xet")
    hub.add_user(TOKEN, "ann")
    numbers = np.random.default_rng(0)
    for name, values in (
        ("noise", numbers.bytes(300_000)),
        ("floats", numbers.normal(0, 1, 50_000).astype("<f4").tobytes()),
        ("runs", b"abc" * 90_000 + bytes(100_000)),
    ):
        (folder / f"{name}.safetensors").write_bytes(values)
    env = environment(hub, tmp_path / "home", TOKEN, HF_HUB_DISABLE_XET="0")
    done = json.loads(script(UPLOAD, "ann/thing", folder, "model", create_pr, env=env))
    assert hub.files("ann/thing", revision=done["revision"]) == content(folder)
    assert hub.requests("POST", "/cas/v1/shards")
    assert not hub.requests("PUT", "/lfs")


def test_download_resumes_by_range(hub, tmp_path):
    # The client keeps data that arrived, in pieces of 10 MiB.
    blob = bytes(range(251)) * 44_000
    hub.add_repo("ann/thing", {"weights.bin": blob})
    fault = Fault("GET", "/cdn/", cut=11_000_000)
    hub.faults.append(fault)
    _, files = json.loads(script(DOWNLOAD, "ann/thing", "model", env=environment(hub, tmp_path / "home")))
    assert fault.met.is_set()
    assert bytes.fromhex(files["weights.bin"]) == blob
    assert [item.status for item in hub.requests("GET", "/cdn/")] == [0, 206]


REFUSED = """
import json, sys
from huggingface_hub import hf_hub_download
names = []
for repo, path, revision, token in json.loads(sys.argv[1]):
    try:
        hf_hub_download(repo, path, revision=revision, token=token)
    except Exception as error:
        names.append(type(error).__name__)
print(json.dumps(names))
"""


def test_refusals_are_the_clients_own(hub, tmp_path):
    hub.add_user("hf_bob", "bob")
    hub.add_repo("ann/private", {"a.txt": b"a"}, private=True)
    hub.add_repo("ann/gated", {"a.txt": b"a"}, gated=True)
    hub.add_repo("ann/open", {"a.txt": b"a"})
    wanted = {
        ("ann/none", "a.txt", "main", False): "RepositoryNotFoundError",
        ("ann/none", "a.txt", "main", "hf_bob"): "RepositoryNotFoundError",
        ("ann/private", "a.txt", "main", "hf_bob"): "RepositoryNotFoundError",
        ("ann/gated", "a.txt", "main", False): "GatedRepoError",
        ("ann/gated", "a.txt", "main", "hf_bob"): "GatedRepoError",
        ("ann/open", "b.txt", "main", "hf_bob"): "RemoteEntryNotFoundError",
        ("ann/open", "a.txt", "v9", "hf_bob"): "RevisionNotFoundError",
    }
    names = script(REFUSED, json.dumps([*wanted]), env=environment(hub, tmp_path / "home"))
    assert json.loads(names) == [*wanted.values()]
