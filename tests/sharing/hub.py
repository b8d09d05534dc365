"""A local server that speaks the Hub's HTTP protocol, for tests: models only, all in memory, one process, threads.

It keeps what makes the protocol honest: commits are snapshots with ids that are hashes of their trees, one request makes one
commit or none, large files go through the LFS batch API (basic and multipart) and are checked against their sha256 before a
commit may name them, a body that ends early is no request, private repositories do not exist for strangers.
Protocol: https://huggingface.co/docs/hub/api and https://github.com/git-lfs/git-lfs/blob/main/docs/api/batch.md
Not here: Xet, pull requests, gated repositories, pagination of listings.
"""

from __future__ import annotations

import base64
import fnmatch
import hashlib
import json
import math
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ATTRIBUTES = "".join(
    f"{p} filter=lfs diff=lfs merge=lfs -text\n" for p in ("*.safetensors", "*.bin", "*.pt", "tokenizer.json")
)
WRITER, READER, STRANGER = "hf_writer", "hf_reader", "hf_stranger"
_REPO = r"(?P<repo>[^/]+/[^/]+)"


class Dropped(Exception):
    """The connection is cut: nothing more is read or answered."""


@dataclass(frozen=True)
class Blob:
    """A file at one commit. `oid` is git's: of the content, or for a large file of the pointer that stands for it."""

    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        raw = self.data
        if self.lfs:
            raw = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(raw)}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(raw) + raw).hexdigest()


@dataclass
class Commit:
    tree: dict[str, Blob]
    parent: str | None
    title: str

    @property
    def oid(self) -> str:
        tree = sorted((path, blob.oid) for path, blob in self.tree.items())
        return hashlib.sha1(json.dumps([tree, self.parent, self.title]).encode()).hexdigest()


@dataclass
class Repo:
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, tree: dict[str, Blob], title: str) -> str:
        commit = Commit(dict(tree), self.branches.get(branch), title)
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit.oid

    def at(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)

    def history(self, revision: str = "main") -> list[str]:
        """Commit ids, newest first."""
        out, at = [], self.at(revision)
        while at is not None:
            out.append(at)
            at = self.commits[at].parent
        return out


@dataclass
class Failure:
    """The first `times` requests whose "METHOD /path" matches fail: with `status`, or by a cut after `after` bytes of body."""

    pattern: str
    status: int | None = None
    after: int | None = None
    times: int = 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients that were killed are what the tests are about
            super().handle_error(request, client_address)


class Hub:
    """`with Hub() as hub: hub.url`. Everything a test may want to look at is an attribute."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # large files by sha256, complete and checked
        self.parts: dict[tuple[str, int], bytes] = {}
        self.requests: list[str] = []  # "METHOD /path", in order of arrival
        self.uploaded: list[tuple[str, int]] = []  # (sha256, bytes) of every large file or part that was sent
        self.failures: list[Failure] = []
        self.watch: Callable[[str], None] = lambda event: None  # called with "METHOD /path begin|read|done"
        self.multipart_over: int | None = None  # larger files go in parts of this size
        self.tokens = {WRITER: ("me", "write"), READER: ("me", "read"), STRANGER: ("someone", "write")}
        self.lock = threading.RLock()
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = (
            f"http://localhost:{self._server.server_port}"  # another host, as the Hub's is: no token goes there
        )

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def put(self, repo: str, files: dict[str, bytes], private: bool = False, title: str = "put") -> str:
        """A commit made behind the protocol's back; returns its id."""
        there = self.repos.setdefault(repo, Repo(private))
        old = there.commits[there.branches["main"]].tree if "main" in there.branches else {}
        return there.add("main", {**old, **{p: Blob(d, p.endswith(".safetensors")) for p, d in files.items()}}, title)

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        there = self.repos[repo]
        return {p: b.data for p, b in there.commits[str(there.at(revision))].tree.items()}

    def fail(self, pattern: str, status: int | None = None, after: int | None = None, times: int = 1) -> None:
        self.failures.append(Failure(pattern, status, after, times))

    def calm(self) -> None:
        """Forget failures, watchers and the log; repositories stay."""
        self.failures.clear()
        self.requests.clear()
        self.uploaded.clear()
        self.watch = lambda event: None
        self.multipart_over = None

    def failure(self, request: str) -> Failure | None:
        with self.lock:
            for failure in self.failures:
                if failure.times and re.search(failure.pattern, request):
                    failure.times -= 1
                    return failure
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, format: str, *args: Any) -> None:
        pass

    # --- plumbing ---------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        self.at = urlsplit(self.path)
        self.plain = unquote(self.at.path)
        self.name = f"{self.command} {self.plain}"
        with self.hub.lock:
            self.hub.requests.append(self.name)
        self.failing = self.hub.failure(self.name)
        try:
            self.hub.watch(f"{self.name} begin")
            self.body = self._read()
            self.hub.watch(f"{self.name} read")
            if self.failing and self.failing.status:
                self.json({"error": "injected"}, self.failing.status)
            else:
                self._route()
            self.hub.watch(f"{self.name} done")
        except (Dropped, ConnectionError, TimeoutError):
            self.close_connection = True
            self.connection.close()

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _take(self, n: int) -> bytes:
        limit = (
            self.failing.after if self.failing and self.failing.after is not None and self.command == "PUT" else None
        )
        data = self.rfile.read(n if limit is None else min(n, limit))
        if len(data) < n:
            raise Dropped
        return data

    def _read(self) -> bytes:
        """The whole body, or `Dropped`: half a request is none."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self._take(int(self.headers.get("Content-Length") or 0))
        out = b""
        while True:
            line = self.rfile.readline()
            if not line.strip():
                raise Dropped
            n = int(line, 16)
            if n == 0:
                self.rfile.readline()
                return out
            out += self._take(n)
            self.rfile.readline()

    def json(self, value: Any, status: int = 200, **headers: str) -> None:
        self.send(json.dumps(value).encode(), status, {"Content-Type": "application/json", **headers})

    def send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.failing and self.failing.after is not None and self.command == "GET":
            self.wfile.write(data[: self.failing.after])
            self.wfile.flush()
            raise Dropped
        self.wfile.write(data)

    def error(self, status: int, code: str, message: str) -> None:
        self.json({"error": message}, status, X_Error_Code=code, X_Error_Message=message)

    @property
    def user(self) -> tuple[str, str] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        return self.hub.tokens.get(token)

    def _route(self) -> None:
        for method, pattern, handle in _ROUTES:
            found = re.fullmatch(pattern, self.plain)
            if found and (self.command == method or (self.command == "HEAD" and method == "GET")):
                handle(self, **found.groupdict())
                return
        self.error(404, "NotFound", "no such route")

    def repo_for(self, name: str, write: bool = False) -> Repo | None:
        """The repository if this caller may see (or change) it; else the refusal has been sent."""
        user, repo = self.user, self.hub.repos.get(name)
        if write and user is None:
            self.json({"error": "Invalid username or password."}, 401)
        elif repo is None or (repo.private and (user is None or user[0] != name.split("/")[0])):
            self.error(404 if user else 401, "RepoNotFound", "Repository not found")
        elif write and (user is None or user[1] != "write" or user[0] != name.split("/")[0]):
            self.error(403, "Forbidden", "you do not have the rights to write here")
        else:
            return repo
        return None

    def commit_of(self, repo: Repo, revision: str) -> str | None:
        found = repo.at(revision)
        if found is None:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    # --- repositories -------------------------------------------------------------------------------------------------

    def whoami(self) -> None:
        if self.user is None:
            return self.json({"error": "Invalid user token."}, 401)
        self.json({"name": self.user[0], "type": "user", "orgs": [], "auth": {"accessToken": {"role": self.user[1]}}})

    def create(self) -> None:
        asked = json.loads(self.body)
        if self.user is None:
            return self.json({"error": "Invalid username or password."}, 401)
        owner = asked.get("organization") or self.user[0]
        name = f"{owner}/{asked['name']}"
        if owner != self.user[0] or self.user[1] != "write":
            return self.error(403, "Forbidden", f'you do not have the rights to create a model under "{owner}"')
        answer = {"url": f"{self.hub.url}/{name}", "id": name, "name": name}
        with self.hub.lock:
            if name in self.hub.repos:
                return self.json({"error": "You already created this model repo", **answer}, 409)
            repo = self.hub.repos[name] = Repo(
                private=asked.get("visibility") == "private" or asked.get("private") is True
            )
            repo.add("main", {".gitattributes": Blob(ATTRIBUTES.encode())}, "initial commit")
        self.json(answer)

    def branch(self, repo: str, revision: str) -> None:
        if (there := self.repo_for(repo, write=True)) is None:
            return
        if revision in there.branches:
            return self.error(409, "Conflict", "Reference already exists")
        start = there.at(json.loads(self.body or b"{}").get("startingPoint") or "main")
        there.branches[revision] = str(start)
        self.json({})

    def info(self, repo: str, revision: str = "main") -> None:
        if (there := self.repo_for(repo)) is None or (at := self.commit_of(there, revision)) is None:
            return
        siblings = [{"rfilename": path} for path in sorted(there.commits[at].tree)]
        self.json({"_id": "1", "id": repo, "modelId": repo, "sha": at, "private": there.private, "tags": [],
                   "siblings": siblings, "downloads": 0, "likes": 0})  # fmt: skip

    def _entry(self, path: str, blob: Blob) -> dict[str, Any]:
        out: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
        if blob.lfs:
            out["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": 130}
        return out

    def tree(self, repo: str, revision: str) -> None:
        if (there := self.repo_for(repo)) is None or (at := self.commit_of(there, revision)) is None:
            return
        tree = sorted(there.commits[at].tree.items())
        if parse_qs(self.at.query).get("recursive", ["False"])[0].lower() not in ("true", "1"):
            tree = [(p, b) for p, b in tree if "/" not in p]
        self.json([self._entry(p, b) for p, b in tree])

    def paths_info(self, repo: str, revision: str) -> None:
        if (there := self.repo_for(repo)) is None or (at := self.commit_of(there, revision)) is None:
            return
        asked = parse_qs(self.body.decode()).get("paths", [])
        tree = there.commits[at].tree
        self.json([self._entry(p, tree[p]) for p in asked if p in tree])

    def history(self, repo: str, revision: str) -> None:
        if (there := self.repo_for(repo)) is None or (at := self.commit_of(there, revision)) is None:
            return
        self.json([{"id": c, "title": there.commits[c].title, "message": "", "authors": [],
                    "date": "2026-01-01T00:00:00.000Z"} for c in there.history(at)])  # fmt: skip

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if (there := self.repo_for(repo)) is None or (at := self.commit_of(there, revision)) is None:
            return
        blob = there.commits[at].tree.get(path)
        if blob is None:
            return self.json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=at)
        headers = {"ETag": f'"{blob.oid}"', "X-Repo-Commit": at, "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
            if self.command == "HEAD":  # the Hub answers with the place in its storage
                return self.send(b"", 302, {**headers, "Location": f"{self.hub.storage}/storage/{blob.sha256}"})
            self.send_response(302)
            for name, value in {**headers, "Location": f"{self.hub.storage}/storage/{blob.sha256}"}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self._bytes(blob.data, headers)

    def _bytes(self, data: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self.send(data, 200, headers)
        start, end = int(wanted[1]), int(wanted[2] or len(data) - 1)
        self.send(data[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})

    # --- writing ------------------------------------------------------------------------------------------------------

    def validate_yaml(self) -> None:
        """The few rules that matter here: a front matter that parses, and a base model that is an id."""
        import yaml

        text = json.loads(self.body)["content"]
        found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", text, re.S)
        try:
            front = yaml.safe_load(found[1]) if found else {}
        except yaml.YAMLError as e:
            return self.json({"errors": [{"message": str(e)}], "warnings": []}, 400)
        base = front.get("base_model")
        if base is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(base)):
            return self.json({"errors": [{"message": '"base_model" is not a valid model id'}], "warnings": []}, 400)
        self.json({"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        if (there := self.repo_for(repo, write=True)) is None or (at := self.commit_of(there, revision)) is None:
            return
        tree = there.commits[at].tree
        rules = tree[".gitattributes"].data.decode() if ".gitattributes" in tree else ATTRIBUTES
        patterns = [line.split()[0] for line in rules.splitlines() if "filter=lfs" in line]
        out = []
        for asked in json.loads(self.body)["files"]:
            path, there_now = asked["path"], tree.get(asked["path"])
            large = asked["size"] > 10_000_000 or any(fnmatch.fnmatch(path.split("/")[-1], p) for p in patterns)
            oid = None if there_now is None else there_now.sha256 if there_now.lfs else there_now.oid
            mode = "lfs" if large else "regular"
            out.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.json({"files": out, "commitOid": at})

    def lfs_batch(self, repo: str) -> None:
        if self.repo_for(repo, write=True) is None:
            return
        asked = json.loads(self.body)
        objects = []
        for item in asked["objects"]:
            answer: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.hub.stored:
                answer["actions"] = {"upload": self._upload_action(repo, item["oid"], item["size"])}
            objects.append(answer)
        self.json({"transfer": "basic", "objects": objects}, Content_Type="application/vnd.git-lfs+json")

    def _upload_action(self, repo: str, oid: str, size: int) -> dict[str, Any]:
        part = self.hub.multipart_over
        if part is None or size <= part:
            return {"href": f"{self.hub.storage}/storage/{oid}?size={size}"}
        urls = {str(i + 1): f"{self.hub.storage}/part/{oid}/{i + 1}" for i in range(math.ceil(size / part))}
        return {"href": f"{self.hub.url}/complete/{oid}?size={size}", "header": {"chunk_size": str(part), **urls}}

    def _store(self, oid: str, data: bytes) -> bool:
        if hashlib.sha256(data).hexdigest() != oid or str(len(data)) != parse_qs(self.at.query).get("size", [""])[0]:
            self.error(400, "BadDigest", "the bytes sent are not those announced")
            return False
        with self.hub.lock:
            self.hub.stored[oid] = data
        return True

    def storage_put(self, oid: str) -> None:
        self.hub.uploaded.append((oid, len(self.body)))
        if self._store(oid, self.body):
            self.send(b"")

    def storage_get(self, oid: str) -> None:
        blobs = (b for r in self.hub.repos.values() for c in r.commits.values() for b in c.tree.values() if b.lfs)
        data = self.hub.stored.get(oid) or next((b.data for b in blobs if b.sha256 == oid), None)
        if data is None:
            return self.error(404, "NotFound", "no such object")
        self._bytes(data, {"ETag": f'"{oid}"'})

    def part_put(self, oid: str, number: str) -> None:
        self.hub.uploaded.append((oid, len(self.body)))
        self.hub.parts[oid, int(number)] = self.body
        self.send(b"", 200, {"ETag": hashlib.md5(self.body).hexdigest()})

    def complete(self, oid: str) -> None:
        parts = json.loads(self.body)["parts"]
        data = [self.hub.parts.get((oid, p["partNumber"]), b"") for p in parts]
        if any(hashlib.md5(d).hexdigest() != p["etag"] for d, p in zip(data, parts, strict=True)):
            return self.error(400, "InvalidPart", "a part is not the one that was sent")
        if self._store(oid, b"".join(data)):
            self.json({"success": True})

    def commit(self, repo: str, revision: str) -> None:
        if (there := self.repo_for(repo, write=True)) is None or (at := self.commit_of(there, revision)) is None:
            return
        lines = [json.loads(line) for line in self.body.decode().splitlines() if line]
        with self.hub.lock:
            tree, title = dict(there.commits[at].tree), ""
            for line in lines:
                key, value = line["key"], line["value"]
                if key == "header":
                    title = value["summary"]
                    if value.get("parentCommit") not in (None, there.at(revision)):
                        return self.error(412, "PreconditionFailed", "A commit has happened since. Please refresh")
                elif key == "file":
                    tree[value["path"]] = Blob(base64.b64decode(value["content"]))
                elif key == "lfsFile":
                    if value["oid"] not in self.hub.stored:
                        return self.error(400, "LfsMissing", f"LFS pointer of {value['path']} points to nothing stored")
                    tree[value["path"]] = Blob(self.hub.stored[value["oid"]], lfs=True)
                elif key == "deletedFile":
                    if tree.pop(value["path"], None) is None:
                        return self.error(404, "EntryNotFound", "A file with this name doesn't exist")
                else:
                    return self.error(400, "BadRequest", f"unknown operation {key}")
            if revision not in there.branches:
                return self.error(400, "BadRequest", "commits go to branches")
            oid = there.add(revision, tree, title)
        self.json(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}", "hookOutput": ""}
        )


_H = _Handler
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/whoami-v2", _H.whoami),
    ("POST", "/api/repos/create", _H.create),
    ("POST", "/api/validate-yaml", _H.validate_yaml),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<revision>.+)", _H.branch),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>.+)", _H.preupload),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>.+)", _H.commit),
    ("POST", rf"/api/models/{_REPO}/paths-info/(?P<revision>.+)", _H.paths_info),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", _H.tree),
    ("GET", rf"/api/models/{_REPO}/commits/(?P<revision>.+)", _H.history),
    ("GET", rf"/api/models/{_REPO}/revision/(?P<revision>.+)", _H.info),
    ("GET", rf"/api/models/{_REPO}", _H.info),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _H.lfs_batch),
    ("PUT", r"/storage/(?P<oid>[0-9a-f]{64})", _H.storage_put),
    ("GET", r"/storage/(?P<oid>[0-9a-f]{64})", _H.storage_get),
    ("PUT", r"/part/(?P<oid>[0-9a-f]{64})/(?P<number>\d+)", _H.part_put),
    ("POST", r"/complete/(?P<oid>[0-9a-f]{64})", _H.complete),
    ("GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _H.resolve),
]
