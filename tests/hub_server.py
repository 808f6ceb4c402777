"""A small Hub on loopback: it speaks what `huggingface_hub` asks of the real one, and can fail on purpose."""

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

USER, OWNER, READER = "alice", "hf_OwnerTokenOfTheLoopbackHub", "hf_ReaderTokenOfTheLoopbackHub"
CUT = "cut"  # the connection is closed in the middle of the request's body, or of the answer's if it has none
Fault = int | str | threading.Event


class Request(NamedTuple):
    """One that a client made, and what came of it."""

    method: str
    path: str
    status: int
    fault: str = ""


class StoredFile(NamedTuple):
    """A file of a commit."""

    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        """What git, or LFS, calls the content."""
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


Files = dict[str, StoredFile]


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class Repository:
    """Commits, each with all of its files, and the branches that point to them."""

    def __init__(self) -> None:
        self.commits: dict[str, Files] = {}
        self.titles: list[str] = []
        self.branches: dict[str, str] = {}
        self.commit("main", "initial commit", {})

    def commit(self, branch: str, title: str, files: Files) -> str:
        """Put all files on a branch; the name of the commit."""
        oid = secrets.token_hex(20)
        self.commits[oid] = files
        self.titles.append(title)
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> tuple[str, Files]:
        """The commit of a branch, or of its own name, and its files."""
        oid = self.branches.get(revision, revision)
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, self.commits[oid]


class HubServer(ThreadingHTTPServer):
    """
    Repositories of one user, in memory.

    `requests` lists what clients asked. The files whose name ends as one of `large` are kept by LFS; with `part_size`
    those that are larger are uploaded in parts.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.large: tuple[str, ...] = (".safetensors", ".bin", ".pt", ".pth")
        self.part_size: int | None = None
        self.requests: list[Request] = []
        self.faults: list[tuple[str, list[Fault]]] = []

    def fail(self, pattern: str, *faults: Fault) -> None:
        """The next requests of which "METHOD path" has the pattern get a status, are `CUT`, or wait for an event."""
        self.faults.append((pattern, list(faults)))

    def next_fault(self, line: str) -> Fault | None:
        """What this request is to suffer."""
        for pattern, faults in self.faults:
            if faults and re.search(pattern, line):
                return faults.pop(0)
        return None

    def repository(self, name: str) -> Repository:
        """The repository of a name, with its owner."""
        if name not in self.repositories:
            raise Refused(404, "Repository not found", "RepoNotFound")
        return self.repositories[name]

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        """What a clone of the repository would hold."""
        return {path: file.content for path, file in self.repository(name).resolve(revision)[1].items()}

    def uploaded(self) -> bytes:
        """All that was ever uploaded, one after the other."""
        commits = [commit for repository in self.repositories.values() for commit in repository.commits.values()]
        return b"\n".join([*self.objects.values(), *(file.content for commit in commits for file in commit.values())])


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def handle_request(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fault = self.server.next_fault(f"{self.command} {path}")
        if isinstance(fault, threading.Event):
            fault.wait(timeout=30)
        length = int(self.headers.get("Content-Length", 0))
        if fault == CUT and length:
            self.rfile.read(length // 2)
            self._cut(path)
            return
        body = self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        status, headers, content = 200, {}, b""
        try:
            if isinstance(fault, int):
                raise Refused(fault, "The loopback Hub was told to fail")
            action, found = self._route(path)
            if found.re.pattern not in PUBLIC:
                self._authorize(writes=self.command in ("POST", "PUT") and "paths-info" not in path)
            answer = action(self.server, body, self.headers, *found.groups())
            status, headers, content = answer if isinstance(answer, tuple) else (200, {}, answer)
        except Refused as error:
            status, content = error.status, {"error": error.message}
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), headers | {"Content-Type": "application/json"}
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if fault == CUT:
            self.wfile.write(content[: len(content) // 2])
            self._cut(path)
            return
        if self.command != "HEAD":
            self.wfile.write(content)
        note = "" if fault is None else "delayed" if isinstance(fault, threading.Event) else "refused"
        self.server.requests.append(Request(self.command, path, status, note))

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _cut(self, path: str) -> None:
        self.close_connection = True
        self.server.requests.append(Request(self.command, path, 0, CUT))

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, path: str) -> tuple[Callable[..., Any], re.Match[str]]:
        for methods, pattern, action in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in methods.split():
                return action, found
        raise Refused(404, f"The loopback Hub has no {self.command} {path}")

    def _authorize(self, writes: bool) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if (token and token not in (OWNER, READER)) or (writes and not token):
            raise Refused(401, "Invalid credentials in Authorization header")
        if writes and token == READER:
            raise Refused(403, "You need write access to this repository")


def _create(hub: HubServer, body: bytes, headers: Any) -> Any:
    wanted = json.loads(body)
    name = f"{wanted.get('organization') or USER}/{wanted['name']}"
    status = 409 if name in hub.repositories else 200
    hub.repositories.setdefault(name, Repository())
    return status, {}, {"url": f"{hub.url}/{name}", "name": name}


def _validate_card(hub: HubServer, body: bytes, headers: Any) -> Any:
    if not json.loads(body)["content"].startswith("---\n"):
        return 200, {}, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    return {"errors": [], "warnings": []}


def _preupload(hub: HubServer, body: bytes, headers: Any, name: str, revision: str) -> Any:
    present = hub.repository(name).resolve(revision)[1]
    return {
        "files": [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(hub.large) else "regular",
                "shouldIgnore": False,
                "oid": present[file["path"]].oid if file["path"] in present else None,
            }
            for file in json.loads(body)["files"]
        ]
    }


def _lfs_batch(hub: HubServer, body: bytes, headers: Any, name: str) -> Any:
    return {"transfer": "basic", "objects": [_lfs_actions(hub, wanted) for wanted in json.loads(body)["objects"]]}


def _lfs_actions(hub: HubServer, wanted: dict[str, Any]) -> dict[str, Any]:
    oid, size, part = wanted["oid"], wanted["size"], hub.part_size
    if oid in hub.objects:
        return {"oid": oid, "size": size}
    upload: dict[str, Any] = {"href": f"{hub.url}/lfs/{oid}"}
    if part is not None and size > part:
        urls = {str(i + 1): f"{hub.url}/lfs/{oid}/{i + 1}" for i in range(-(-size // part))}
        upload = {"href": f"{hub.url}/lfs/{oid}/complete", "header": {"chunk_size": str(part)} | urls}
    return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": f"{hub.url}/lfs/{oid}/verify"}}}


def _upload(hub: HubServer, body: bytes, headers: Any, oid: str) -> Any:
    if hashlib.sha256(body).hexdigest() != oid:
        raise Refused(400, f"The content is not that of {oid}")
    hub.objects[oid] = body
    return b""


def _upload_part(hub: HubServer, body: bytes, headers: Any, oid: str, part: str) -> Any:
    hub.parts.setdefault(oid, {})[int(part)] = body
    return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""


def _complete(hub: HubServer, body: bytes, headers: Any, oid: str) -> Any:
    parts = hub.parts.pop(oid)
    if [part["partNumber"] for part in json.loads(body)["parts"]] != sorted(parts):
        raise Refused(400, "There are other parts")
    return _upload(hub, b"".join(parts[number] for number in sorted(parts)), headers, oid)


def _verify(hub: HubServer, body: bytes, headers: Any, oid: str) -> Any:
    if len(hub.objects.get(oid, b"")) != json.loads(body)["size"]:
        raise Refused(404, f"{oid} was not uploaded whole")
    return {}


def _commit(hub: HubServer, body: bytes, headers: Any, name: str, revision: str) -> Any:
    repository = hub.repository(name)
    files, title = dict(repository.resolve(revision)[1]), ""
    for line in body.splitlines():
        key, value = json.loads(line).values()
        if key == "header":
            title = value["summary"]
        elif key == "file":
            files[value["path"]] = StoredFile(base64.b64decode(value["content"]), large=False)
        elif key == "lfsFile":
            if value["oid"] not in hub.objects:
                raise Refused(400, f"There is no LFS object {value['oid']}")
            files[value["path"]] = StoredFile(hub.objects[value["oid"]], large=True)
        elif key == "deletedFile":
            del files[value["path"]]
        else:
            raise Refused(400, f"The loopback Hub does not know {key}")
    oid = repository.commit(revision, title, files)
    return {"commitUrl": f"{hub.url}/{name}/commit/{oid}", "commitOid": oid}


def _branch(hub: HubServer, body: bytes, headers: Any, name: str, branch: str) -> Any:
    repository = hub.repository(name)
    status = 409 if branch in repository.branches else 201
    repository.branches.setdefault(branch, repository.branches["main"])
    return status, {}, {}


def _info(hub: HubServer, body: bytes, headers: Any, name: str, revision: str | None) -> Any:
    oid, files = hub.repository(name).resolve(revision or "main")
    return {"id": name, "sha": oid, "private": False, "siblings": [{"rfilename": path} for path in sorted(files)]}


def _tree(hub: HubServer, body: bytes, headers: Any, name: str, revision: str, folder: str | None) -> Any:
    files, folder = hub.repository(name).resolve(revision)[1], folder or ""
    found = [
        {"type": "file", "path": path, "size": len(file.content), "oid": file.oid}
        | ({"lfs": {"oid": file.oid, "size": len(file.content), "pointerSize": 134}} if file.large else {})
        for path, file in sorted(files.items())
        if path.startswith(folder)
    ]
    if folder and not found:
        raise Refused(404, f"{folder} does not exist on {revision}", "EntryNotFound")
    return found


def _resolve(hub: HubServer, body: bytes, headers: Any, name: str, revision: str, path: str) -> Any:
    oid, files = hub.repository(name).resolve(revision)
    commit = {"X-Repo-Commit": oid}
    if path not in files:
        refusal = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return 404, commit | refusal, b"Entry not found"
    file = files[path]
    if file.large:
        linked = {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        return 302, commit | linked | {"Location": f"{hub.url.replace('127.0.0.1', 'localhost')}/cdn/{file.oid}"}, b""
    return _content(file, headers, commit)


def _storage(hub: HubServer, body: bytes, headers: Any, oid: str) -> Any:
    return _content(StoredFile(hub.objects[oid], large=True), headers, {})


def _content(file: StoredFile, headers: Any, more: dict[str, str]) -> Any:
    content, size = file.content, len(file.content)
    more = more | {"ETag": f'"{file.oid}"', "Accept-Ranges": "bytes"}
    if found := re.fullmatch(r"bytes=(\d+)-", headers.get("Range", "")):
        start = int(found[1])
        return 206, more | {"Content-Range": f"bytes {start}-{size - 1}/{size}"}, content[start:]
    return 200, more, content


STORAGE = (r"/lfs/(\w+)", r"/lfs/(\w+)/(\d+)", r"/lfs/(\w+)/complete", r"/cdn/(\w+)")
PUBLIC = frozenset(STORAGE)  # their addresses are signed
ROUTES: tuple[tuple[str, str, Callable[..., Any]], ...] = (
    ("POST", r"/api/repos/create", _create),
    ("POST", r"/api/validate-yaml", _validate_card),
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/(.+)", _preupload),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", _lfs_batch),
    ("PUT", STORAGE[0], _upload),
    ("PUT", STORAGE[1], _upload_part),
    ("POST", STORAGE[2], _complete),
    ("POST", r"/lfs/(\w+)/verify", _verify),
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/(.+)", _commit),
    ("POST", r"/api/models/([^/]+/[^/]+)/branch/(.+)", _branch),
    ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", _info),
    ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", _tree),
    ("GET HEAD", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _resolve),
    ("GET HEAD", STORAGE[3], _storage),
)
