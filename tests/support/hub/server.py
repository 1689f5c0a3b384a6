"""The test Hub: what the real `huggingface_hub` client asks of the Hub, answered over loopback.

Large files are stored on another host name than the API, as on the Hub, so that a client that sent its
token there would be seen.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.hub import xet
from tests.support.hub.store import File, Refused, Repo, Store, User, stored

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from tests.support.hub.faults import Fault

PAGE = 1000


@dataclass(frozen=True)
class Request:
    """One line of the log; ``status`` is 0 if the connection was cut."""

    method: str
    path: str
    status: int
    user: str
    authorized: bool


@dataclass(frozen=True)
class Answer:
    """The response to a request."""

    body: bytes = b""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    kind: str = "application/json"


def as_json(value: Any, *headers: tuple[str, str]) -> Answer:
    return Answer(json.dumps(value).encode(), headers=headers)


class Hub:
    """A running test Hub; a context manager.

    Attributes:
        url: What ``HF_ENDPOINT`` should be.
        store: Its users and repositories.
        log: Every request, in the order in which they were answered.
        faults: What goes wrong; tests append.
        part_bytes: Large files above this are uploaded in parts of it.
        page: Entries in a page of a listing.
    """

    def __init__(self) -> None:
        self.store = Store()
        self.log: list[Request] = []
        self.faults: list[Fault] = []
        self.part_bytes = 8 << 20
        self.page = PAGE
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        self.storage = f"http://localhost:{port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Hub:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add_user(self, token: str, name: str, *, role: str = "write", orgs: Mapping[str, str] | None = None) -> User:
        """Let ``token`` stand for the user ``name``."""
        self.store.users[token] = User(name, role, dict(orgs or {}))
        return self.store.users[token]

    def add_repo(
        self,
        repo_id: str,
        files: Path | Mapping[str, bytes],
        *,
        kind: str = "model",
        private: bool = False,
        gated: bool = False,
    ) -> Repo:
        """A repository with ``files``, a directory or path to content."""
        namespace, _, name = repo_id.partition("/")
        with self.store.lock:
            repo = self.store.create(User(namespace), namespace, name, kind, private=private)
            repo.gated = gated
            self.change(repo, files)
        return repo

    def change(self, repo: Repo, files: Path | Mapping[str, bytes], *, title: str = "change", revision: str = "main") -> str:
        """Commit ``files`` onto a revision of ``repo``, past all rights. Returns the commit id."""
        if not hasattr(files, "items"):
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        with self.store.lock:
            new = {path: stored(path, content) for path, content in files.items()}
            repo.objects |= {file.sha256: file.content for file in new.values() if file.lfs}
            return repo.commit({**repo.at(revision).files, **new}, title, repo.namespace, revision).id

    def repo(self, repo_id: str, kind: str = "model") -> Repo:
        return self.store.repos[kind, repo_id]

    def files(self, repo_id: str, kind: str = "model", revision: str = "main") -> dict[str, bytes]:
        """Path to content, without ``.gitattributes``."""
        return {
            path: file.content for path, file in self.repo(repo_id, kind).at(revision).files.items() if path != ".gitattributes"
        }

    def requests(self, method: str, path: str) -> list[Request]:
        """Requests in the log whose path matches a pattern."""
        return [item for item in self.log if item.method == method and re.search(path, item.path)]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Do nothing: the tests let clients disconnect on purpose."""
        import sys

        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Cut(Exception):
    """The connection ends here."""


class _Handler(BaseHTTPRequestHandler):
    """Reads a request, finds its answer, and applies the faults that meet it."""

    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._respond()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, format: str, *arguments: Any) -> None:
        """No line on stderr for each request."""

    def _respond(self) -> None:
        hub, path = self.server.hub, urlsplit(self.path).path
        with hub.store.lock:
            fault = next((fault for fault in hub.faults if fault.meets(self.command, unquote(path))), None)
        name, status = "", 0
        try:
            body = self._read_body(fault, path)
            try:
                user = hub.store.user(self.headers.get("Authorization"))
                name = user.name if user else ""
                if fault and fault.status:
                    raise Refused(fault.status, fault.message, fault.code)
                with hub.store.lock:
                    answer = _answer(hub, self.command, self.path, user, self.headers, body)
            except Refused as refusal:
                answer = _refusal(refusal, fault.headers if fault else {})
            self._send(answer, fault, has_body=bool(body))
            status = answer.status
        except (_Cut, ConnectionError):
            self.close_connection = True
        finally:
            hub.log.append(Request(self.command, unquote(self.path), status, name, "Authorization" in self.headers))

    def _read_body(self, fault: Fault | None, path: str) -> bytes:
        """The request's body. What arrives of a large file is counted as it arrives."""
        store, oid = self.server.hub.store, path.rpartition("/")[2] if self.command == "PUT" else ""
        body = bytearray()
        # Small pieces, so that what goes wrong can do so anywhere.
        for piece in self._pieces(1 << 10 if fault else 1 << 16):
            if fault:
                time.sleep(fault.pace)
                if fault.cut is not None and len(body) + len(piece) > fault.cut:
                    raise _Cut
            body += piece
            if oid:
                store.received[oid] += len(piece)
        return bytes(body)

    def _pieces(self, size: int) -> Any:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while length := int(self.rfile.readline().split(b";")[0], 16):
                left = length
                while left:
                    piece = self._piece(min(left, size))
                    left -= len(piece)
                    yield piece
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length", 0))
        while left:
            piece = self._piece(min(left, size))
            left -= len(piece)
            yield piece

    def _piece(self, length: int) -> bytes:
        piece = self.rfile.read(length)
        if not piece:
            raise _Cut
        return piece

    def _send(self, answer: Answer, fault: Fault | None, *, has_body: bool) -> None:
        body = fault.alter(answer.body) if fault and fault.alter else answer.body
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in answer.headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        slow = fault is not None and not has_body
        for start in range(0, len(body), 1 << 10):
            piece = body[start : start + (1 << 10)]
            if slow and fault:
                time.sleep(fault.pace)
                if fault.cut is not None and start + len(piece) > fault.cut:
                    self.wfile.write(piece[: fault.cut - start])
                    raise _Cut
            self.wfile.write(piece)


def _refusal(refusal: Refused, headers: Mapping[str, str]) -> Answer:
    named = [("X-Error-Message", refusal.message), *([("X-Error-Code", refusal.code)] if refusal.code else [])]
    body = json.dumps({"error": refusal.message, **refusal.body}).encode()
    return Answer(body, refusal.status, (*named, *headers.items()))


@dataclass(frozen=True)
class _Call:
    """A request that was understood."""

    hub: Hub
    method: str
    url: str
    query: Mapping[str, list[str]]
    user: User | None
    headers: Mapping[str, str]
    body: bytes
    groups: Mapping[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def kind(self) -> str:
        return "dataset" if self.groups["kind"] in ("datasets", "datasets/") else "model"

    def repo(self) -> Repo:
        return self.hub.store.repo(self.user, self.kind, self.groups["repo"])

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")


def _answer(hub: Hub, method: str, target: str, user: User | None, headers: Mapping[str, str], body: bytes) -> Answer:
    split = urlsplit(target)
    for methods, pattern, respond in _ROUTES:
        match = re.fullmatch(pattern, split.path)
        if match and method in methods.split():
            groups = {name: unquote(text) if text else "" for name, text in match.groupdict().items()}
            return respond(_Call(hub, method, target, parse_qs(split.query), user, headers, body, groups))
    raise Refused(404, f"the test Hub knows no {method} {split.path}")


def _whoami(call: _Call) -> Answer:
    if call.user is None:
        raise Refused(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in call.user.orgs.items()]
    return as_json(
        {
            "type": "user",
            "name": call.user.name,
            "fullname": call.user.name,
            "orgs": orgs,
            "auth": {"type": "access_token", "accessToken": {"displayName": "test", "role": call.user.role}},
        }
    )


def _create(call: _Call) -> Answer:
    data = call.json
    namespace = data.get("organization") or (call.user.name if call.user else "")
    private = data.get("visibility") == "private" or bool(data.get("private"))
    repo = call.hub.store.create(call.user, namespace, data["name"], data.get("type") or "model", private=private)
    return as_json({"url": f"{call.hub.url}/{Store.page(repo)}", "name": repo.id, "id": repo.id})


def _validate_yaml(call: _Call) -> Answer:
    import yaml

    match = re.match(r"---\n(.*?)\n---\n", call.json["content"], re.DOTALL)
    try:
        data = yaml.safe_load(match[1]) if match else None
    except yaml.YAMLError as error:
        return Answer(json.dumps({"errors": [{"message": str(error)}], "warnings": []}).encode(), 400)
    warnings = [] if data else [{"message": "empty or missing yaml metadata in repo card"}]
    return as_json({"errors": [], "warnings": warnings})


def _info(call: _Call) -> Answer:
    repo = call.repo()
    commit = repo.at(call.groups.get("revision") or "main")
    siblings: list[dict[str, Any]] = []
    for path, file in sorted(commit.files.items()):
        siblings.append({"rfilename": path})
        if call.flag("blobs"):
            siblings[-1] |= {"size": len(file.content), "blobId": file.blob_id}
            if file.lfs:
                siblings[-1]["lfs"] = {"sha256": file.sha256, "size": len(file.content), "pointerSize": 134}
    return as_json(
        {
            "_id": repo.id,
            "id": repo.id,
            "author": repo.namespace,
            "sha": commit.id,
            "private": repo.private,
            "gated": "manual" if repo.gated else False,
            "disabled": False,
            "lastModified": commit.date,
            "createdAt": commit.date,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": siblings,
        }
    )


def _entry(path: str, file: File) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
    if file.lfs:
        entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": 134}
    return entry


def _tree(call: _Call) -> Answer:
    repo = call.repo()
    files = repo.at(call.groups["revision"]).files
    folder = f"{call.groups['path']}/" if call.groups.get("path") else ""
    entries, folders = [], set()
    for path, file in sorted(files.items()):
        if not path.startswith(folder):
            continue
        inner = path.removeprefix(folder).split("/")[:-1]
        for depth in range(len(inner)):
            folders.add(folder + "/".join(inner[: depth + 1]))
        if not inner or call.flag("recursive"):
            entries.append(_entry(path, file))
    if folder and not entries and not folders:
        raise Refused(404, f'{folder} does not exist on "{call.groups["revision"]}"', "EntryNotFound")
    entries += [
        {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
        for path in sorted(folders)
        if call.flag("recursive") or "/" not in path.removeprefix(folder)
    ]
    start = int(call.query.get("cursor", ["0"])[0])
    end = start + call.hub.page
    flags = "&".join(f"{name}={call.query[name][0]}" for name in ("recursive", "expand") if name in call.query)
    following = f'<{call.hub.url}{urlsplit(call.url).path}?{flags}&cursor={end}>; rel="next"'
    return as_json(entries[start:end], *([("Link", following)] if end < len(entries) else []))


def _paths_info(call: _Call) -> Answer:
    files = call.repo().at(call.groups["revision"]).files
    paths = parse_qs(call.body.decode()).get("paths", [])
    return as_json([_entry(path, files[path]) for path in paths if path in files])


def _preupload(call: _Call) -> Answer:
    repo = call.repo()
    if not call.flag("create_pr"):
        call.hub.store.check_write(call.user, repo)
    there = repo.at(call.groups["revision"]).files
    return as_json(
        {
            "files": [
                {
                    "path": item["path"],
                    "shouldIgnore": False,
                    "oid": there[item["path"]].etag if item["path"] in there else None,
                    "uploadMode": "lfs" if stored(item["path"], bytes(min(item["size"], 1))).lfs else "regular",
                }
                for item in call.json["files"]
            ]
        }
    )


def _lfs_batch(call: _Call) -> Answer:
    repo = call.repo()
    if call.user is None:
        raise Refused(401, "Invalid username or password.")
    if "ref" in call.json:
        call.hub.store.check_write(call.user, repo)
    objects = []
    for item in call.json["objects"]:
        oid, size = item["oid"], item["size"]
        objects.append({"oid": oid, "size": size})
        if oid in repo.objects:
            continue
        place = f"{repo.kind}/{repo.id}/{oid}"
        verify = {"href": f"{call.hub.url}/lfs/verify/{place}"}
        if size <= call.hub.part_bytes:
            upload: dict[str, Any] = {"href": f"{call.hub.storage}/lfs/whole/{place}"}
        else:
            parts = -(-size // call.hub.part_bytes)
            upload = {
                "href": f"{call.hub.url}/lfs/complete/{place}",
                "header": {
                    "chunk_size": str(call.hub.part_bytes),
                    **{str(number): f"{call.hub.storage}/lfs/part/{number}/{place}" for number in range(1, parts + 1)},
                },
            }
        objects[-1]["actions"] = {"upload": upload, "verify": verify}
    return as_json({"transfer": "basic", "objects": objects})


def _lfs_whole(call: _Call) -> Answer:
    repo = call.hub.repo(call.groups["repo"], call.groups["kind"])
    call.hub.store.receive(repo, call.groups["oid"], call.body)
    return Answer(headers=(("ETag", f'"{call.groups["oid"]}"'),))


def _lfs_part(call: _Call) -> Answer:
    number = int(call.groups["number"])
    call.hub.store.add_part(call.groups["repo"] + call.groups["oid"], number, call.body)
    return Answer(headers=(("ETag", f'"part-{number}"'),))


def _lfs_complete(call: _Call) -> Answer:
    repo = call.hub.repo(call.groups["repo"], call.groups["kind"])
    call.hub.store.receive(repo, call.groups["oid"], call.hub.store.complete(call.groups["repo"] + call.groups["oid"]))
    return as_json({"success": True})


def _lfs_verify(call: _Call) -> Answer:
    repo = call.hub.repo(call.groups["repo"], call.groups["kind"])
    content = repo.objects.get(call.json["oid"])
    if content is None or len(content) != call.json["size"]:
        raise Refused(404, "the object is not there")
    return as_json({"success": True})


def _xet_token(call: _Call) -> Answer:
    """A token for the Xet storage, good for one repository."""
    repo = call.repo()
    if not call.flag("create_pr"):
        call.hub.store.check_write(call.user, repo)
    if call.user is None:
        raise Refused(401, "Invalid username or password.")
    token = call.hub.store.grant(call.user, repo)
    place, expires = f"{call.hub.storage}/cas", int(time.time()) + 3600
    return as_json(
        {"casUrl": place, "accessToken": token, "exp": expires},
        ("X-Xet-Cas-Url", place),
        ("X-Xet-Access-Token", token),
        ("X-Xet-Token-Expiration", str(expires)),
    )


def _xet_xorb(call: _Call) -> Answer:
    new = call.groups["hash"] not in call.hub.store.xorbs
    call.hub.store.xorbs[call.groups["hash"]] = call.body
    call.hub.store.uploaded[call.groups["hash"]] += 1
    return as_json({"was_inserted": new})


def _xet_shard(call: _Call) -> Answer:
    repo = call.hub.store.granted(call.headers.get("Authorization") or "")
    try:
        for oid, content in xet.files(call.body, call.hub.store.xorbs):
            repo.objects[oid] = content
    except (KeyError, ValueError) as error:
        raise Refused(400, f"the shard does not fit: {error}") from None
    return as_json({"result": 1})


def _commit(call: _Call) -> Answer:
    repo = call.repo()
    store, revision, create_pr = call.hub.store, call.groups["revision"], call.flag("create_pr")
    lines = [json.loads(line) for line in call.body.splitlines() if line]
    header = lines[0]["value"]
    if call.user is None:
        raise Refused(401, "Invalid username or password.")
    if not create_pr and not revision.startswith("refs/pr/"):
        store.check_write(call.user, repo)
    parent = repo.at(revision)
    if header.get("parentCommit", parent.id) != parent.id:
        raise Refused(412, "A commit has happened since. Please refresh and try again.")
    files = dict(parent.files)
    for line in lines[1:]:
        _apply(repo, files, line["key"], line["value"])
    answer: dict[str, Any] = {"success": True}
    if create_pr:
        number = repo.open_pull(header["summary"])
        revision = f"refs/pr/{number}"
        answer["pullRequestUrl"] = f"{call.hub.url}/{store.page(repo)}/discussions/{number}"
    new = repo.commit(files, header["summary"], call.user.name, revision)
    return as_json({**answer, "commitOid": new.id, "commitUrl": f"{call.hub.url}/{store.page(repo)}/commit/{new.id}"})


def _apply(repo: Repo, files: dict[str, File], key: str, value: Mapping[str, Any]) -> None:
    """One operation of a commit."""
    path = value["path"]
    if key == "file":
        try:
            files[path] = File(base64.b64decode(value["content"], validate=True), lfs=False)
        except binascii.Error:
            raise Refused(400, f"{path} is not base64") from None
    elif key == "lfsFile":
        if value["oid"] not in repo.objects:
            raise Refused(400, f"LFS pointer pointed to a file that does not exist: {path}")
        files[path] = File(repo.objects[value["oid"]], lfs=True)
    elif key == "deletedFile" and path in files:
        del files[path]
    elif key == "deletedFolder":
        for name in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
            del files[name]
    else:
        raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")


def _refs(call: _Call) -> Answer:
    repo = call.repo()
    pulls = {name: commit for name, commit in repo.refs.items() if name.startswith("refs/pr/")}
    branches = {name: commit for name, commit in repo.refs.items() if name not in pulls}
    return as_json(
        {
            "branches": [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commit} for name, commit in branches.items()
            ],
            "pullRequests": [
                {"name": name.removeprefix("refs/"), "ref": name, "targetCommit": commit} for name, commit in pulls.items()
            ],
            "converts": [],
            "tags": [],
        }
    )


def _commits(call: _Call) -> Answer:
    repo = call.repo()
    commit = repo.at(call.groups["revision"])
    rows = []
    while True:
        rows.append(
            {"id": commit.id, "title": commit.title, "message": "", "date": commit.date, "authors": [{"user": commit.author}]}
        )
        if not commit.parent:
            return as_json(rows)
        commit = repo.commits[commit.parent]


def _open_discussion(call: _Call) -> Answer:
    repo = call.repo()
    if call.user is None:
        raise Refused(401, "Invalid username or password.")
    return as_json({"num": repo.open_pull(call.json["title"])})


def _discussion(call: _Call) -> Answer:
    repo, number = call.repo(), int(call.groups["number"])
    if number > len(repo.pulls):
        raise Refused(404, "Discussion not found")
    return as_json(
        {
            "num": number,
            "title": repo.pulls[number - 1],
            "status": "draft",
            "isPullRequest": True,
            "createdAt": repo.head.date,
            "author": {"name": call.user.name if call.user else ""},
            "repo": {"name": repo.id, "type": repo.kind},
            "events": [],
            "changes": {"base": "refs/heads/main"},
            "filesWithConflicts": [],
        }
    )


def _settings(call: _Call) -> Answer:
    repo = call.repo()
    call.hub.store.check_write(call.user, repo)
    if "visibility" in call.json:
        repo.private = call.json["visibility"] == "private"
    return as_json({"private": repo.private})


def _auth_check(call: _Call) -> Answer:
    repo = call.repo()
    if call.groups.get("write"):
        call.hub.store.check_write(call.user, repo)
    call.hub.store.check_files(call.user, repo)
    return as_json({})


def _resolve(call: _Call) -> Answer:
    repo = call.repo()
    call.hub.store.check_files(call.user, repo)
    commit = repo.at(call.groups["revision"])
    file = commit.files.get(call.groups["path"])
    pinned = ("X-Repo-Commit", commit.id)
    if file is None:
        refusal = _refusal(Refused(404, "Entry not found", "EntryNotFound"), {})
        return Answer(refusal.body, 404, (*refusal.headers, pinned))
    if not file.lfs:
        return _content(call, file.content, pinned, ("ETag", f'"{file.blob_id}"'))
    place = f"{call.hub.storage}/cdn/{repo.kind}/{repo.id}/{file.sha256}"
    return Answer(
        b"Found",
        302,
        (
            pinned,
            ("ETag", f'"{file.sha256}"'),
            ("X-Linked-Etag", f'"{file.sha256}"'),
            ("X-Linked-Size", str(len(file.content))),
            ("Location", place),
        ),
    )


def _cdn(call: _Call) -> Answer:
    oid = call.groups["oid"]
    return _content(call, call.hub.repo(call.groups["repo"], call.groups["kind"]).objects[oid], ("ETag", f'"{oid}"'))


def _content(call: _Call, content: bytes, *headers: tuple[str, str]) -> Answer:
    """``content``, or the range of it that was asked for."""
    kind = "application/octet-stream"
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range") or "")
    headers = (*headers, ("Accept-Ranges", "bytes"))
    if match is None:
        return Answer(content, headers=headers, kind=kind)
    start, end = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
    if start >= len(content):
        return Answer(b"", 416, (*headers, ("Content-Range", f"bytes */{len(content)}")), kind)
    return Answer(content[start : end + 1], 206, (*headers, ("Content-Range", f"bytes {start}-{end}/{len(content)}")), kind)


_API = r"/api/(?P<kind>models|datasets)/(?P<repo>[^/]+/[^/]+)"
_PAGE = r"/(?P<kind>datasets/)?(?P<repo>[^/]+/[^/]+)"
_OBJECT = r"(?P<kind>model|dataset)/(?P<repo>[^/]+/[^/]+)/(?P<oid>[0-9a-f]{64})"
_ROUTES: tuple[tuple[str, str, Callable[[_Call], Answer]], ...] = (
    ("GET", r"/api/whoami-v2", _whoami),
    ("POST", r"/api/repos/create", _create),
    ("POST", r"/api/validate-yaml", _validate_yaml),
    ("PUT", rf"/lfs/whole/{_OBJECT}", _lfs_whole),
    ("PUT", rf"/lfs/part/(?P<number>\d+)/{_OBJECT}", _lfs_part),
    ("POST", rf"/lfs/complete/{_OBJECT}", _lfs_complete),
    ("POST", rf"/lfs/verify/{_OBJECT}", _lfs_verify),
    ("GET HEAD", rf"/cdn/{_OBJECT}", _cdn),
    ("GET", rf"{_API}/xet-write-token/(?P<revision>[^/]+)", _xet_token),
    ("POST", r"/cas/v1/xorbs/default/(?P<hash>[0-9a-f]{64})", _xet_xorb),
    ("POST", r"/cas/v1/shards", _xet_shard),
    ("GET", _API, _info),
    ("GET", rf"{_API}/revision/(?P<revision>[^/]+)", _info),
    ("GET", rf"{_API}/tree/(?P<revision>[^/]+)(?:/(?P<path>.+))?", _tree),
    ("POST", rf"{_API}/paths-info/(?P<revision>[^/]+)", _paths_info),
    ("POST", rf"{_API}/preupload/(?P<revision>[^/]+)", _preupload),
    ("POST", rf"{_API}/commit/(?P<revision>[^/]+)", _commit),
    ("GET", rf"{_API}/refs", _refs),
    ("GET", rf"{_API}/commits/(?P<revision>[^/]+)", _commits),
    ("POST", rf"{_API}/discussions", _open_discussion),
    ("GET", rf"{_API}/discussions/(?P<number>\d+)", _discussion),
    ("PUT", rf"{_API}/settings", _settings),
    ("GET", rf"{_API}/auth-check(?P<write>/write)?", _auth_check),
    ("POST", rf"{_PAGE}\.git/info/lfs/objects/batch", _lfs_batch),
    ("GET HEAD", rf"{_PAGE}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _resolve),
)
