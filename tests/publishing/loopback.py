"""A small Hub on 127.0.0.1: the HTTP endpoints that huggingface_hub calls to create, fill, describe and read a repo.

It speaks the plain protocols (git blobs in commits, Git LFS for the rest), not Xet: its clients set
`HF_HUB_DISABLE_XET=1`.
Everything lies in memory. `requests` lists what was asked, `before_store` may delay or break an upload, and a commit
gets the files of `replaced` in place of those that were sent.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

import yaml

TOKENS = {"hf_owner": "owner", "hf_other": "other"}
READ_ONLY = {"hf_reader": "owner"}
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.png filter=lfs diff=lfs merge=lfs -text\n"
SPACE = "@space"
LFS_SUFFIXES = (".safetensors", ".png", ".bin", ".pt", ".gguf")


class Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        self.status, self.message, self.code = status, message, code


@dataclass
class Repo:
    private: bool
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit -> path -> content
    refs: dict[str, str] = field(default_factory=dict)  # branch, or refs/pr/N -> commit
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes], message: str) -> str:
        parent = self.refs.get(ref, "")
        listing = json.dumps([parent, message, {path: hashlib.sha1(data).hexdigest() for path, data in files.items()}])
        oid = hashlib.sha1(listing.encode()).hexdigest()
        self.files[oid], self.refs[ref], self.messages[oid] = files, oid, message
        return oid

    def resolve(self, revision: str) -> str:
        revision = unquote(revision)
        oid = self.refs.get(revision, revision)
        if oid not in self.files:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def at(self, revision: str) -> dict[str, bytes]:
        return self.files[self.resolve(revision)]


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def oid_of(path: str, data: bytes) -> str:
    """As the Hub: sha256 of a file in LFS, the git blob's sha1 of any other."""
    if is_lfs(path):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def card_errors(content: str) -> list[str]:
    """What is wrong with a card's metadata, by the Hub's published rules for `license`, `tags` and `model-index`."""
    found = re.match(r"---\r?\n(.*?)\r?\n---\r?\n", content, re.DOTALL)
    data = yaml.safe_load(found[1]) if found else None
    if not isinstance(data, dict):
        return ["the card has no metadata block"]
    errors = []
    if not all(isinstance(tag, str) for tag in data.get("tags", [])):
        errors.append('"tags" must be a list of strings')
    if "license" in data and data["license"] not in {"apache-2.0", "mit", "openrail", "other", "unknown"}:
        errors.append(f'"license" must be one of the known ids, not {data["license"]!r}')
    for number, model in enumerate(data.get("model-index", [])):
        where = f'"model-index[{number}]'
        if not isinstance(model.get("name"), str) or not model["name"]:
            errors.append(f'{where}.name" is required')
        for row in model.get("results", [{}]):
            if not row.get("task", {}).get("type"):
                errors.append(f'{where}.results.task.type" is required')
            if not row.get("dataset", {}).get("name") or not row.get("dataset", {}).get("type"):
                errors.append(f'{where}.results.dataset" needs name and type')
            for metric in row.get("metrics") or [{}]:
                if not isinstance(metric.get("type"), str):
                    errors.append(f'{where}.results.metrics.type" is required')
                value = metric.get("value")
                if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                    errors.append(f'{where}.results.metrics.value" is not a finite number: {value!r}')
    return errors


class Hub:
    """The server; use as a context manager. `endpoint` is its address."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # LFS objects by sha256
        self.requests: list[str] = []
        self.before_store: Callable[[str, int], None] = lambda oid, size: None
        self.replaced: dict[str, bytes] = {}
        hub = self

        class Bound(Handler):
            pass

        Bound.hub = hub
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Bound)
        self._server.daemon_threads = True
        self._server.handle_error = lambda *broken: None  # type: ignore[method-assign]  # a client that went away
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self.storage = self.endpoint.replace("127.0.0.1", "localhost")  # another host, as the real one has

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        return self.repos[name].at(revision)

    def asked(self, pattern: str) -> list[str]:
        return [line for line in self.requests if re.search(pattern, line)]


def _as_space(found: re.Match[str]) -> str:
    return f"{'/api/models' if found[1] else ''}/{found[2]}{SPACE}"


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    _body: bytes | None = None
    protocol_version = "HTTP/1.1"

    def log_message(self, *words: object) -> None:
        pass

    # ------------------------------------------------------------------------------------------------- plumbing

    def _answer(self, value: Any = None, status: int = 200, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", headers.pop("size", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _read(self) -> bytes:
        """The body, once from the line and then from memory: an answer before it is read would end the connection."""
        if self._body is None:
            self._body = self._receive()
        return self._body

    def _receive(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self) -> Any:
        return json.loads(self._read() or b"{}")

    def _user(self) -> str | None:
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None
        user = TOKENS.get(token) or READ_ONLY.get(token)
        if user is None:
            raise Refused(401, "Invalid credentials in Authorization header")
        return user

    def _repo(self, name: str, *, write: bool = False) -> Repo:
        user = self._user()
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and user != name.partition("/")[0]):
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        if write:
            self._check_may_write(name.partition("/")[0])
        return repo

    def _check_may_write(self, namespace: str) -> None:
        user, token = self._user(), self.headers.get("Authorization", "").partition(" ")[2]
        if user is None:
            raise Refused(401, "Invalid username or password.")
        if user != namespace or token in READ_ONLY:
            raise Refused(403, f'You don\'t have the rights to create a model under the namespace "{namespace}"')

    def _serve(self) -> None:
        self._body = None
        # a Space is kept beside the models, under a name that none of them can have
        path = re.sub(r"^(/api)?/spaces/([^/]+/[^/.]+)", _as_space, self.path.partition("?")[0])
        self.hub.requests.append(f"{self.command} {path}")
        for methods, pattern, action in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in methods.split():
                try:
                    action(self, *found.groups())
                except Refused as error:
                    self._read()
                    code = {"X_Error_Code": error.code} if error.code else {}
                    self._answer({"error": error.message}, error.status, X_Error_Message=error.message, **code)
                return
        self._read()
        self._answer({"error": f"no route for {self.command} {path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    # ---------------------------------------------------------------------------------------------------- routes

    def whoami(self) -> None:
        user = self._user()
        if user is None:
            raise Refused(401, "Invalid username or password.")
        self._answer({"type": "user", "name": user, "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self) -> None:
        wanted = self._json()
        namespace = wanted.get("organization") or self._user()
        if namespace is None:
            raise Refused(401, "Invalid username or password.")
        self._check_may_write(namespace)
        name = f"{namespace}/{wanted['name']}" + (SPACE if wanted.get("type") == "space" else "")
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repos:
            return self._answer({"error": "You already created this model repo", **url}, 409)
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        repo = self.hub.repos[name] = Repo(private)
        repo.commit("main", {".gitattributes": GITATTRIBUTES}, "initial commit")
        return self._answer(url)

    def info(self, name: str, revision: str | None = None) -> None:
        repo = self._repo(name)
        sha = repo.resolve(revision or "main")
        files = [{"rfilename": path} for path in sorted(repo.files[sha])]
        self._answer(
            {
                "_id": "0",
                "id": name,
                "modelId": name,
                "sha": sha,
                "private": repo.private,
                "tags": [],
                "siblings": files,
            }
        )

    def tree(self, name: str, revision: str, folder: str | None = None) -> None:
        rows = []
        for path, data in sorted(self._repo(name).at(revision).items()):
            if folder and not path.startswith(folder.strip("/") + "/"):
                continue
            row: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": oid_of(path, data)}
            if is_lfs(path):
                row["lfs"] = {"oid": row["oid"], "size": len(data), "pointerSize": 130}
            rows.append(row)
        self._answer(rows)

    def paths_info(self, name: str, revision: str) -> None:
        wanted, files = self._json()["paths"], self._repo(name).at(revision)
        rows = [
            {"type": "file", "path": path, "size": len(files[path]), "oid": oid_of(path, files[path])}
            for path in wanted
            if path in files
        ]
        self._answer(rows)

    def refs(self, name: str) -> None:
        repo = self._repo(name)
        rows = [
            {"name": ref, "ref": ref if ref.startswith("refs/") else f"refs/heads/{ref}", "targetCommit": oid}
            for ref, oid in repo.refs.items()
        ]
        pulls = [row for row in rows if row["ref"].startswith("refs/pr/")]
        branches = [row for row in rows if row not in pulls]
        self._answer({"branches": branches, "tags": [], "converts": [], "pullRequests": pulls})

    def branch(self, name: str, branch: str) -> None:
        repo = self._repo(name, write=True)
        start = self._json().get("startingPoint") or "main"
        if unquote(branch) in repo.refs:
            raise Refused(409, "Reference already exists")
        repo.refs[unquote(branch)] = repo.resolve(start)
        self._answer({})

    def preupload(self, name: str, revision: str) -> None:
        wanted, files = self._json()["files"], self._repo(name, write=True).at(revision)
        rows = []
        for file in wanted:
            path = file["path"]
            row = {"path": path, "uploadMode": "lfs" if is_lfs(path) else "regular", "shouldIgnore": False}
            if path in files:
                row["oid"] = oid_of(path, files[path])
            rows.append(row)
        self._answer({"files": rows})

    def lfs_batch(self, name: str) -> None:
        self._repo(name, write=True)
        rows = []
        for wanted in self._json()["objects"]:
            row = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.stored:
                row["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}
            rows.append(row)
        self._answer({"transfer": "basic", "objects": rows})

    def store(self, oid: str) -> None:
        self.hub.before_store(oid, int(self.headers.get("Content-Length") or 0))
        data = self._read()
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refused(400, "the content is not what its oid says")
        self.hub.stored[oid] = data
        self._answer({})

    def stored(self, oid: str) -> None:
        self._answer(self.hub.stored[oid], ETag=f'"{oid}"')

    def commit(self, name: str, revision: str) -> None:
        repo = self._repo(name, write=True)
        ref = unquote(revision)
        files = dict(repo.at(ref))
        message = ""
        for line in self._read().splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.stored:
                    raise Refused(400, f"LFS pointer of {value['path']} points to a file that does not exist")
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        files |= {path: data for path, data in self.hub.replaced.items() if path in files}
        if errors := card_errors(files["README.md"].decode()) if "README.md" in files else []:
            raise Refused(400, errors[0])
        answer: dict[str, Any] = {}
        if "create_pr=1" in self.path:
            ref = self._open_pull_request(repo)
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/{ref.rpartition('/')[2]}"
        oid = repo.commit(ref, files, message)
        self._answer({"commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}", "commitOid": oid, **answer})

    def _open_pull_request(self, repo: Repo) -> str:
        ref = f"refs/pr/{1 + sum(ref.startswith('refs/pr/') for ref in repo.refs)}"
        repo.refs[ref] = repo.refs["main"]
        return ref

    def open_discussion(self, name: str) -> None:
        repo = self._repo(name, write=True)
        self._json()
        self._answer({"num": int(self._open_pull_request(repo).rpartition("/")[2])})

    def discussion(self, name: str, number: str) -> None:
        self._repo(name)
        changes = {"base": "refs/heads/main"}
        named = {"name": name, "type": "model"}
        row = {"title": "upload", "num": int(number), "createdAt": "2026-01-01T00:00:00.000Z", "status": "draft"}
        row |= {"repo": named, "isPullRequest": True, "changes": changes, "filesWithConflicts": [], "events": []}
        self._answer(row)

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        sha = repo.resolve(revision)
        data = repo.files[sha].get(unquote(path))
        if data is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        oid = oid_of(path, data)
        headers = {"X_Repo_Commit": sha, "ETag": f'"{oid}"'}
        if not is_lfs(path):
            return self._answer(data, **headers)
        headers |= {"X_Linked_Size": str(len(data)), "X_Linked_Etag": f'"{oid}"'}
        return self._answer(b"", 302, Location=f"{self.hub.storage}/lfs/{oid}", **headers)

    def validate_yaml(self) -> None:
        errors = card_errors(self._json()["content"])
        self._answer({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)


NAME = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate_yaml),
    ("GET", rf"/api/models/{NAME}", Handler.info),
    ("GET", rf"/api/models/{NAME}/revision/([^/]+)", Handler.info),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)(/.*)?", Handler.tree),
    ("POST", rf"/api/models/{NAME}/paths-info/([^/]+)", Handler.paths_info),
    ("GET", rf"/api/models/{NAME}/refs", Handler.refs),
    ("POST", rf"/api/models/{NAME}/branch/([^/]+)", Handler.branch),
    ("POST", rf"/api/models/{NAME}/preupload/([^/]+)", Handler.preupload),
    ("POST", rf"/api/models/{NAME}/commit/([^/]+)", Handler.commit),
    ("POST", rf"/api/models/{NAME}/discussions", Handler.open_discussion),
    ("GET", rf"/api/models/{NAME}/discussions/(\d+)", Handler.discussion),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", Handler.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", Handler.store),
    ("GET HEAD", r"/lfs/([0-9a-f]{64})", Handler.stored),
    ("GET HEAD", rf"/{NAME}/resolve/([^/]+)/(.+)", Handler.resolve),
]
