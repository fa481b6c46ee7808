"""A Hub on 127.0.0.1 for tests: repositories, revisions, LFS, tokens, and faults on request.

Speaks the part of the Hub's HTTP interface that `huggingface_hub` uses to push and to load.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".png")
RELATIONS = ("adapter", "merge", "quantized", "finetune")
REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Commit:
    """A state of a repository: contents by path."""

    oid: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A repository; branches are lists of commits, oldest first, `objects` its large files."""

    owner: str
    private: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        history = self.branches.setdefault(branch, [])
        parents = f"{branch} {len(history)} {title} {sorted(files)}"
        oid = hashlib.sha1(f"{id(self)} {parents}".encode()).hexdigest()
        history.append(Commit(oid, title, files))
        return history[-1]

    def at(self, revision: str) -> Commit | None:
        if revision in self.branches:
            return self.branches[revision][-1]
        every = (commit for history in self.branches.values() for commit in history)
        return next((commit for commit in every if commit.oid == revision), None)


@dataclass
class Fault:
    """What goes wrong the next `times` times that a request matches.

    Attributes:
        request: Pattern of the request's method and path.
        status: Status to answer with; None drops the connection after half of the body was read.
        times: How often.
        message: What the answer says.
        then: Called at each failure, such as to commit something else meanwhile.
        done: Whether the request is carried out before it fails.
    """

    request: str
    status: int | None
    times: int = 1
    message: str = "out of order"
    then: Callable[[], Any] | None = None
    done: bool = False


@dataclass
class Hub:
    """The state of the server."""

    url: str = ""
    storage: str = ""
    tokens: dict[str, str] = field(default_factory=dict)
    repos: dict[str, Repo] = field(default_factory=dict)
    datasets: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def put(self, owner: str, name: str, files: dict[str, bytes]) -> Commit:
        """Make a repository that holds some files."""
        repo = self.repos[f"{owner}/{name}"] = Repo(owner)
        for content in files.values():
            repo.objects[hashlib.sha256(content).hexdigest()] = content
        return repo.commit("main", "initial commit", files)

    def read(self, repo_id: str, name: str, revision: str = "main") -> str:
        """The text of a file."""
        commit = self.repos[repo_id].at(revision)
        assert commit is not None
        return commit.files[name].decode()

    def titles(self, repo_id: str, branch: str = "main") -> list[str]:
        """The titles of the commits of a branch, after the one that made the repository."""
        return [commit.title for commit in self.repos[repo_id].branches[branch]][1:]


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        self.status, self.message, self.code, self.body = status, message, code, body


def card_errors(content: str) -> list[str]:
    """What the Hub would refuse in the metadata of a card."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---", content, re.DOTALL)
    if block is None:
        return []
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"not YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata are no mapping"]
    errors = [f'"{key}" is empty' for key, value in data.items() if value is None]
    for key in ("base_model", "datasets"):
        names = data.get(key) or []
        for name in [names] if isinstance(names, str) else names:
            if not REPO_ID.fullmatch(str(name)):
                errors.append(f'"{key}" {name!r} is no id of the Hub')
    if data.get("base_model_relation", "finetune") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {RELATIONS}')
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append('"tags" must be a list of strings')
    for entry in data.get("model-index", []):
        if not entry.get("name"):
            errors.append('"model-index[0].name" is required')
        for result in entry.get("results", []):
            for path in ("task.type", "dataset.type", "dataset.name"):
                part, key = path.split(".")
                if not result.get(part, {}).get(key):
                    errors.append(f'"model-index[0].results[0].{path}" is required')
            for metric in result.get("metrics", [{}]):
                if not metric.get("type") or metric.get("value") is None:
                    errors.append('"model-index[0].results[0].metrics[0]" needs type and value')
    return errors


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    _answer = True

    def log_message(self, *_: Any) -> None:
        pass

    def _serve(self) -> None:
        hub = self.server.hub
        request = f"{self.command} {self.path}"
        length = int(self.headers.get("Content-Length", 0))
        with hub.lock:
            hub.requests.append(request)
            fault = next((f for f in hub.faults if f.times and re.search(f.request, request)), None)
            if fault:
                fault.times -= 1
        if fault and fault.then:
            fault.then()
        if fault and fault.status is None and not fault.done:
            self.rfile.read(length // 2)
            self._drop()
            return
        body = self.rfile.read(length)
        try:
            if fault and not fault.done:
                raise Refused(fault.status or 500, fault.message)
            with hub.lock:
                self._answer = fault is None
                self._route(hub, body)
            if fault:
                self._drop()
        except Refused as refused:
            answer = {"error": refused.message, **refused.body}
            headers = {"X-Error-Message": refused.message}
            headers |= {"X-Error-Code": refused.code} if refused.code else {}
            headers |= refused.body.get("headers", {})
            self._json(answer, refused.status, headers)

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _route(self, hub: Hub, body: bytes) -> None:
        path, _, query = self.path.partition("?")
        self.query = urllib.parse.parse_qs(query)
        for pattern, method, action in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                parts = {k: urllib.parse.unquote(v) for k, v in found.groupdict("").items()}
                action(self, hub, body, **parts)
                return
        raise Refused(404, f"no endpoint {self.command} {path}")

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._bytes(
            json.dumps(value).encode(),
            status,
            {"Content-Type": "application/json"} | (headers or {}),
        )

    def _bytes(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        if not self._answer:
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _user(self, hub: Hub) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None
        if token not in hub.tokens:
            raise Refused(401, "Invalid credentials in Authorization header")
        return hub.tokens[token]

    def _repo(self, hub: Hub, repo_id: str, write: bool = False) -> Repo:
        user, repo = self._user(hub), hub.repos.get(repo_id)
        if repo is None or (repo.private and repo.owner != user):
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write and repo.owner != user:
            raise Refused(403, "You have no write access")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision or "main")
        if commit is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def whoami(self, hub: Hub, body: bytes) -> None:
        user = self._user(hub)
        if user is None:
            raise Refused(401, "Invalid username or password.")
        self._json({"type": "user", "name": user, "orgs": []})

    def create(self, hub: Hub, body: bytes) -> None:
        asked, user = json.loads(body), self._user(hub)
        if user is None:
            raise Refused(401, "Invalid username or password.")
        owner = asked["organization"] or user
        repo_id = f"{owner}/{asked['name']}"
        if owner != user:
            raise Refused(403, f"You don't have the rights to create a model under {owner}")
        url = f"{hub.url}/{repo_id}"
        if repo_id in hub.repos:
            raise Refused(409, "You already created this model repo", url=url)
        hub.repos[repo_id] = repo = Repo(user, asked.get("visibility") == "private")
        repo.commit("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        self._json({"url": url})

    def validate(self, hub: Hub, body: bytes) -> None:
        errors = card_errors(json.loads(body)["content"])
        listed = [{"message": error} for error in errors]
        self._json({"errors": listed, "warnings": []}, 400 if errors else 200)

    def branch(self, hub: Hub, body: bytes, id: str, rev: str) -> None:
        repo = self._repo(hub, id, write=True)
        if rev in repo.branches:
            raise Refused(409, "Reference already exists")
        start = json.loads(body or b"{}").get("startingPoint", "main")
        repo.branches[rev] = [self._commit(repo, start)]
        self._json({})

    def preupload(self, hub: Hub, body: bytes, id: str, rev: str) -> None:
        commit = self._commit(self._repo(hub, id, write=True), rev)
        self._json({"files": [self._mode(commit, file) for file in json.loads(body)["files"]]})

    def _mode(self, commit: Commit, file: dict[str, Any]) -> dict[str, Any]:
        name = file["path"]
        lfs = name.endswith(LFS_SUFFIXES)
        answer = {"path": name, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        if name in commit.files:
            answer["oid"] = etag(name, commit.files[name])
        return answer

    def batch(self, hub: Hub, body: bytes, id: str) -> None:
        repo = self._repo(hub, id, write=True)
        objects = [dict(one) for one in json.loads(body)["objects"]]
        for one in objects:
            if one["oid"] not in repo.objects:
                upload = f"{hub.storage}/{id}/lfs/{one['oid']}"
                verify = f"{hub.url}/{id}/lfs-verify"
                one["actions"] = {"upload": {"href": upload}, "verify": {"href": verify}}
        self._json({"transfer": "basic", "objects": objects})

    def upload(self, hub: Hub, body: bytes, id: str, oid: str) -> None:
        if self.headers.get("Authorization"):
            raise Refused(400, "a token was sent to the storage")
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refused(400, "content does not match its hash")
        hub.repos[id].objects[oid] = body
        self._json({})

    def verify(self, hub: Hub, body: bytes, id: str) -> None:
        repo = self._repo(hub, id, write=True)
        asked = json.loads(body)
        if len(repo.objects.get(asked["oid"], b"")) != asked["size"]:
            raise Refused(400, "the object is not there")
        self._json({})

    def commit(self, hub: Hub, body: bytes, id: str, rev: str) -> None:
        repo = self._repo(hub, id, write=True)
        head = self._commit(repo, rev)
        files, title = dict(head.files), ""
        for line in body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit", head.oid) != head.oid:
                    raise Refused(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in repo.objects:
                    raise Refused(400, f"LFS object {value['oid']} is missing")
                files[value["path"]] = repo.objects[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
        errors = card_errors(files.get("README.md", b"").decode())
        if errors:
            raise Refused(400, "; ".join(errors))
        new = repo.commit(rev, title, files)
        self._json({"commitUrl": f"{hub.url}/{id}/commit/{new.oid}", "commitOid": new.oid})

    def info(self, hub: Hub, body: bytes, id: str, rev: str = "") -> None:
        repo = self._repo(hub, id)
        commit = self._commit(repo, rev)
        siblings = [{"rfilename": name} for name in sorted(commit.files)]
        answer = {"id": id, "modelId": id, "sha": commit.oid, "private": repo.private}
        self._json({**answer, "tags": [], "siblings": siblings})

    def tree(self, hub: Hub, body: bytes, id: str, rev: str, under: str = "") -> None:
        commit = self._commit(self._repo(hub, id), rev)
        if under and not any(name.startswith(f"{under}/") for name in commit.files):
            raise Refused(404, f"{under} does not exist", "EntryNotFound")
        entries = []
        for name, content in sorted(commit.files.items()):
            if name.startswith(f"{under}/" if under else ""):
                entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content)}
                entry["oid"] = hashlib.sha1(content).hexdigest()
                if name.endswith(LFS_SUFFIXES):
                    oid = etag(name, content)
                    entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 134}
                entries.append(entry)
        self._json(entries)

    def resolve(self, hub: Hub, body: bytes, id: str, rev: str, name: str) -> None:
        commit = self._commit(self._repo(hub, id), rev)
        headers = {"X-Repo-Commit": commit.oid}
        if name not in commit.files:
            raise Refused(404, f"{name} does not exist", "EntryNotFound", headers=headers)
        content = commit.files[name]
        if not name.endswith(LFS_SUFFIXES):
            headers["ETag"] = f'"{etag(name, content)}"'
            self._bytes(content, 200, headers)
            return
        oid = etag(name, content)
        headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
        self._bytes(b"", 302, headers | {"Location": f"{hub.storage}/{id}/lfs/{oid}"})

    def object(self, hub: Hub, body: bytes, id: str, oid: str) -> None:
        if self.headers.get("Authorization"):
            raise Refused(400, "a token was sent to the storage")
        content, start = hub.repos[id].objects[oid], 0
        headers = {"ETag": f'"{oid}"'}
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked:
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._bytes(content[start:], 206 if asked else 200, headers)

    def page(self, hub: Hub, body: bytes, id: str) -> None:
        self._repo(hub, id)
        self._bytes(b"a page", 200, {"Content-Type": "text/html"})

    def dataset_page(self, hub: Hub, body: bytes, id: str) -> None:
        if id not in hub.datasets:
            raise Refused(404, "Repository not found", "RepoNotFound")
        self._bytes(b"a page", 200, {"Content-Type": "text/html"})


ROUTES: tuple[tuple[str, tuple[str, ...], Callable[..., None]], ...] = (
    (r"/api/whoami-v2", ("GET",), _Handler.whoami),
    (r"/api/repos/create", ("POST",), _Handler.create),
    (r"/api/validate-yaml", ("POST",), _Handler.validate),
    (r"/api/models/(?P<id>[^/]+/[^/]+)/branch/(?P<rev>[^/]+)", ("POST",), _Handler.branch),
    (r"/api/models/(?P<id>[^/]+/[^/]+)/preupload/(?P<rev>[^/]+)", ("POST",), _Handler.preupload),
    (r"/(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", ("POST",), _Handler.batch),
    (r"/(?P<id>[^/]+/[^/]+)/lfs/(?P<oid>\w+)", ("PUT",), _Handler.upload),
    (r"/(?P<id>[^/]+/[^/]+)/lfs-verify", ("POST",), _Handler.verify),
    (r"/api/models/(?P<id>[^/]+/[^/]+)/commit/(?P<rev>[^/]+)", ("POST",), _Handler.commit),
    (r"/api/models/(?P<id>[^/]+/[^/]+)(/revision/(?P<rev>[^/]+))?", ("GET",), _Handler.info),
    (
        r"/api/models/(?P<id>[^/]+/[^/]+)/tree/(?P<rev>[^/]+)(/(?P<under>.+))?",
        ("GET",),
        _Handler.tree,
    ),
    (
        r"/(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<name>.+)",
        ("GET", "HEAD"),
        _Handler.resolve,
    ),
    (r"/(?P<id>[^/]+/[^/]+)/lfs/(?P<oid>\w+)", ("GET", "HEAD"), _Handler.object),
    (r"/datasets/(?P<id>[^/]+/[^/]+)", ("GET", "HEAD"), _Handler.dataset_page),
    (r"/(?P<id>[^/]+/[^/]+)", ("GET", "HEAD"), _Handler.page),
)


def etag(name: str, content: bytes) -> str:
    """The hash by which the Hub knows a file: SHA-256 of LFS files, git's SHA-1 of others."""
    if name.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # Of a longer queue, connections would be dropped.

    def __init__(self, hub: Hub) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        hub.url = f"http://127.0.0.1:{self.server_address[1]}"
        # Large files lie on another host than the Hub, so that tokens must not be sent there.
        hub.storage = hub.url.replace("127.0.0.1", "localhost")

    def handle_error(self, *_: Any) -> None:
        pass  # Clients that go away, and connections that a fault dropped.


@contextmanager
def serve(**tokens: str) -> Iterator[Hub]:
    """Run a Hub with users and their tokens while the block lasts."""
    hub = Hub(tokens={token: user for user, token in tokens.items()})
    server = _Server(hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
