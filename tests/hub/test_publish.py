"""Publishing a folder: the content of the Hub afterwards, or one line that says what to do."""

from __future__ import annotations

import json

import pytest

from chanfmt.base.errors import UsageError
from chanfmt.hub.names import check_repo
from tests.support.hub.client import PUBLISH, environment, script, start
from tests.support.hub.faults import Fault
from tests.support.hub.server import Hub

TOKEN = "hf_SecretTokenOfAnn123"


def make_folder(path):
    path.mkdir()
    (path / "README.md").write_text("---\ntags:\n- a\n---\n\ntext\n")
    (path / "config.json").write_text("{}")
    for index in range(3):
        (path / f"model-{index}.safetensors").write_bytes(bytes([index]) * 20_000)
    return path


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "folder")


@pytest.fixture
def ann(hub, tmp_path):
    hub.add_user(TOKEN, "ann", orgs={"lab": "read"})
    return environment(hub, tmp_path / "home", TOKEN)


def content(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def publish(folder, repo, *options, env):
    text = script(PUBLISH, folder, repo, *options, env=env)
    assert TOKEN not in text
    return json.loads(text)


def test_new_repository_is_private_and_read_back(hub, ann, folder):
    (folder / "na[m]e*.txt").write_text("a name that could be a pattern")
    done = publish(folder, "thing", env=ann)
    assert done["repo"] == "ann/thing"
    assert done["url"] == f"{hub.url}/ann/thing"
    repo = hub.repo("ann/thing")
    assert repo.private
    assert repo.head.id == done["commit"]
    assert repo.head.title == "numbers"
    assert hub.files("ann/thing") == content(folder)
    assert hub.requests("GET", rf"/tree/{done['commit']}")
    # A second call uploads nothing and changes nothing.
    assert publish(folder, "ann/thing", env=ann)["commit"] == done["commit"]
    assert set(hub.store.uploaded.values()) == {1}


def test_public_only_after_the_check(hub, ann, folder):
    hub.faults.append(Fault("PUT", "/settings", status=403, times=99))
    assert "error" in publish(folder, "ann/thing", "public", env=ann)
    assert hub.repo("ann/thing").private
    hub.faults.clear()
    assert "url" in publish(folder, "ann/thing", "public", env=ann)
    assert not hub.repo("ann/thing").private
    order = [item.path for item in hub.log if item.status == 200 and ("/tree/" in item.path or "/settings" in item.path)]
    assert "/settings" in order[-1]
    assert hub.repo("ann/thing").head.id in order[-2]


def test_other_content_is_refused(hub, ann, folder):
    hub.add_repo("ann/thing", {"mine.txt": b"mine", "config.json": b"{1}"}, private=True)
    before = hub.repo("ann/thing").head.id
    done = publish(folder, "ann/thing", env=ann)
    assert "holds other content" in done["error"]
    assert "--overwrite" in done["hint"]
    assert hub.repo("ann/thing").head.id == before
    assert "url" in publish(folder, "ann/thing", "overwrite", env=ann)
    assert hub.files("ann/thing") == content(folder)
    assert before in hub.repo("ann/thing").commits


def test_public_repository_needs_public(hub, ann, folder):
    hub.add_repo("ann/thing", {})
    done = publish(folder, "ann/thing", env=ann)
    assert "is public" in done["error"]
    assert "--public" in done["hint"]
    assert not hub.files("ann/thing")


def test_pull_request(hub, ann, folder):
    hub.add_user("hf_bob", "bob")
    hub.add_repo("bob/thing", {"theirs.txt": b"theirs"})
    done = publish(folder, "bob/thing", "create_pr", "public", env=ann)
    assert done["url"] == f"{hub.url}/bob/thing/discussions/1"
    assert hub.files("bob/thing") == {"theirs.txt": b"theirs"}
    assert hub.files("bob/thing", revision="refs/pr/1") == {"theirs.txt": b"theirs", **content(folder)}
    done = publish(folder, "ann/none", "create_pr", env=ann)
    assert "ann/none does not exist, so no pull request can be opened in it" in done["error"]


# Each fault meets a publication of its own, to the repository that is named like the fault.
PASSING = {
    "500-at-the-second-upload": ("PUT", "/lfs/whole/.*{}", {"first": 2, "status": 500}),
    "upload-cut": ("PUT", "/lfs/whole/.*{}", {"cut": 5000}),
    "upload-in-a-trickle": ("PUT", "/lfs/whole/.*{}", {"pace": 0.02}),
    "question-429": ("GET", "/api/models/.*{}", {"status": 429, "headers": {"Retry-After": "1"}}),
    "commit-409": ("POST", "{}/commit/main", {"status": 409}),
    "commit-500": ("POST", "{}/commit/main", {"status": 500}),
    "commit-cut": ("POST", "{}/commit/main", {"cut": 10}),
    "xet-upload-500": ("POST", "/cas/v1/xorbs", {"status": 500}),
    "xet-commit-409": ("POST", "{}/commit/main", {"status": 409}),
}
STAYING = {
    "question-401": (
        "GET",
        "/api/models/.*{}",
        {"status": 401, "message": "Invalid credentials in Authorization header"},
        "hf auth login",
    ),
    "commit-403": ("POST", "{}/commit/", {"status": 403}, "--pr"),
    "preupload-404": ("POST", "{}/preupload/", {"status": 404, "code": "RepoNotFound"}, "check the name"),
    "question-429-for-long": (
        "GET",
        "/api/models/.*{}",
        {"status": 429, "headers": {"RateLimit": '"api";r=0;t=3000'}},
        "in 3000 s",
    ),
    "upload-402": ("PUT", "/lfs/whole/.*{}", {"status": 402}, "--public"),
    "commit-409-for-good": ("POST", "{}/commit/", {"status": 409}, "run the same command again"),
    "xet-token-401": ("GET", "{}/xet-write-token/", {"status": 401}, "hf auth login"),
    "xet-token-403": ("GET", "{}/xet-write-token/", {"status": 403}, "token with write access"),
    "lists-of-other-hashes": ("GET", "{}/tree/", {"alter": lambda body: body.replace(b'"oid": "', b'"oid": "0')}, "--overwrite"),
}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Name of each fault to the outcome of the publication that met it, and the Hub. All run at once, because they mostly wait."""
    home = tmp_path_factory.mktemp("outcomes")
    folder = make_folder(home / "folder")
    with Hub() as hub:
        hub.add_user(TOKEN, "ann")
        env = environment(hub, home, TOKEN)
        for table, times in ((PASSING, 1), (STAYING, 99)):
            hub.faults += [
                Fault(method, path.format(f"ann/{name}\\b"), **{"times": times, **how})
                for name, (method, path, how, *_) in table.items()
            ]
        xet = env | {"HF_HUB_DISABLE_XET": "0"}
        started = {
            name: start("-c", PUBLISH, folder, f"ann/{name}", env=xet if name.startswith("xet-") else env)
            for name in PASSING | STAYING
        }
        answers = {name: process.communicate(timeout=120) for name, process in started.items()}
        assert all(fault.met.is_set() for fault in hub.faults)
        assert not [name for name, texts in answers.items() if TOKEN in "".join(texts)]
        yield hub, content(folder), {name: json.loads(out) for name, (out, _) in answers.items()}
        assert content(folder) == content(make_folder(home / "again"))


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_waited_for(outcomes, name):
    hub, files, done = outcomes
    assert "url" in done[name], done[name]
    assert hub.files(f"ann/{name}") == files
    uploads = [item.path for item in hub.requests("PUT", f"/ann/{name}/") if item.status == 200]
    assert sorted(uploads) == sorted(set(uploads))


@pytest.mark.parametrize("name", STAYING)
def test_what_stays_is_one_line_with_the_way_out(outcomes, name):
    hub, files, done = outcomes
    assert STAYING[name][3] in done[name]["hint"], done[name]
    assert "\n" not in done[name]["error"] + done[name]["hint"]
    repo = hub.store.repos.get(("model", f"ann/{name}"))
    # The repository shows nothing, or it shows everything but is private.
    assert repo is None or not hub.files(repo.id) or (repo.private and hub.files(repo.id) == files)


def test_organisation_without_rights(hub, ann, folder):
    assert "write access" in publish(folder, "lab/thing", env=ann)["hint"]
    assert not hub.store.repos


@pytest.mark.parametrize("name", ["ann/th ing", "ann/a--b", "ann/a..b", "a/b/c", "../x", "ann/.hidden", "ann/x.git", "", "é"])
def test_names_that_cannot_be(name):
    with pytest.raises(UsageError, match="cannot be the name") as caught:
        check_repo(name)
    assert "USER/NAME" in caught.value.hint


@pytest.mark.parametrize("token", [None, "hf_wrong", "hf_SecretTokenOfAnn123\x7f"])
def test_token_that_is_none(hub, ann, folder, tmp_path, token):
    done = publish(folder, "ann/thing", env=environment(hub, tmp_path / "home", token))
    assert "hf auth login" in done["hint"]
    assert not hub.store.repos


@pytest.mark.parametrize("xet", ["", "xet"])
def test_killed_and_run_again(hub, ann, folder, xet):
    env = ann | ({"HF_HUB_DISABLE_XET": "0"} if xet else {})
    # Two of three files were uploaded before; with Xet, which registers files together, all of them were.
    fault = Fault("POST", "/commit/", pace=60) if xet else Fault("PUT", "/lfs/whole", first=3, pace=60)
    hub.faults.append(fault)
    process = start("-c", PUBLISH, folder, "ann/thing", env=env)
    assert fault.met.wait(60)
    while sum(hub.store.uploaded.values()) < (1 if xet else 2):
        assert process.poll() is None
    process.kill()
    process.communicate()
    hub.faults.clear()
    assert not hub.files("ann/thing")
    assert "url" in publish(folder, "ann/thing", env=env)
    assert hub.files("ann/thing") == content(folder)
    assert set(hub.store.uploaded.values()) == {1}
