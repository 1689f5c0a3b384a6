"""The real client against the test Hub, without anything of ours: what other tests here stand on."""

from __future__ import annotations

import json

import pytest

from tests.hub.client import environment, script
from tests.hub.faults import Fault

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
    # The same again moves nothing.
    if not create_pr:
        assert json.loads(script(UPLOAD, "ann/thing", folder, kind, "", env=env))["oid"] == done["oid"]
        assert set(hub.store.uploaded.values()) == {1}


@pytest.mark.parametrize("fault", [
    Fault("PUT", "/lfs/whole", first=2, status=500),
    Fault("POST", "/preupload/", status=429, headers={"Retry-After": "0"}),
    Fault("PUT", "/lfs/whole", cut=2000),
    Fault("PUT", "/lfs/whole", pace=0.01),
], ids=["500 at the second upload", "429", "cut", "trickle"])
def test_client_gets_past(hub, tmp_path, folder, fault):
    hub.add_user(TOKEN, "ann")
    hub.faults.append(fault)
    script(UPLOAD, "ann/thing", folder, "model", "", env=environment(hub, tmp_path / "home", TOKEN))
    assert fault.met.is_set()
    assert hub.files("ann/thing") == content(folder)


def test_download_resumes_by_range(hub, tmp_path):
    # The client keeps what arrived in pieces of 10 MiB.
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
try:
    hf_hub_download(sys.argv[1], sys.argv[2], revision=sys.argv[3])
except Exception as error:
    print(type(error).__name__)
"""


@pytest.mark.parametrize(("token", "repo", "path", "revision", "name"), [
    (None, "ann/none", "a.txt", "main", "RepositoryNotFoundError"),
    ("hf_bob", "ann/none", "a.txt", "main", "RepositoryNotFoundError"),
    ("hf_bob", "ann/private", "a.txt", "main", "RepositoryNotFoundError"),
    (None, "ann/gated", "a.txt", "main", "GatedRepoError"),
    ("hf_bob", "ann/gated", "a.txt", "main", "GatedRepoError"),
    ("hf_bob", "ann/open", "b.txt", "main", "RemoteEntryNotFoundError"),
    ("hf_bob", "ann/open", "a.txt", "v9", "RevisionNotFoundError"),
])
def test_refusals_are_the_clients_own(hub, tmp_path, token, repo, path, revision, name):
    hub.add_user("hf_bob", "bob")
    hub.add_repo("ann/private", {"a.txt": b"a"}, private=True)
    hub.add_repo("ann/gated", {"a.txt": b"a"}, gated=True)
    hub.add_repo("ann/open", {"a.txt": b"a"})
    assert script(REFUSED, repo, path, revision, env=environment(hub, tmp_path / "home", token)).strip() == name
