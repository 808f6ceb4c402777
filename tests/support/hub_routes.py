"""What the addresses of the loopback Hub answer."""

import base64
import hashlib
import json
import re
import secrets
from collections.abc import Callable
from typing import Any, NamedTuple

USER = "alice"


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


def _create(hub: Any, body: bytes, headers: Any) -> Any:
    wanted = json.loads(body)
    name = f"{wanted.get('organization') or USER}/{wanted['name']}"
    status = 409 if name in hub.repositories else 200
    hub.repositories.setdefault(name, Repository())
    return status, {}, {"url": f"{hub.url}/{name}", "name": name}


def _validate_card(hub: Any, body: bytes, headers: Any) -> Any:
    if not json.loads(body)["content"].startswith("---\n"):
        return 200, {}, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}
    return {"errors": [], "warnings": []}


def _preupload(hub: Any, body: bytes, headers: Any, name: str, revision: str) -> Any:
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


def _lfs_batch(hub: Any, body: bytes, headers: Any, name: str) -> Any:
    return {"transfer": "basic", "objects": [_lfs_actions(hub, wanted) for wanted in json.loads(body)["objects"]]}


def _lfs_actions(hub: Any, wanted: dict[str, Any]) -> dict[str, Any]:
    oid, size, part = wanted["oid"], wanted["size"], hub.part_size
    if oid in hub.objects:
        return {"oid": oid, "size": size}
    upload: dict[str, Any] = {"href": f"{hub.url}/lfs/{oid}"}
    if part is not None and size > part:
        urls = {str(i + 1): f"{hub.url}/lfs/{oid}/{i + 1}" for i in range(-(-size // part))}
        upload = {"href": f"{hub.url}/lfs/{oid}/complete", "header": {"chunk_size": str(part)} | urls}
    return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": f"{hub.url}/lfs/{oid}/verify"}}}


def _upload(hub: Any, body: bytes, headers: Any, oid: str) -> Any:
    if hashlib.sha256(body).hexdigest() != oid:
        raise Refused(400, f"The content is not that of {oid}")
    hub.objects[oid] = body
    return b""


def _upload_part(hub: Any, body: bytes, headers: Any, oid: str, part: str) -> Any:
    hub.parts.setdefault(oid, {})[int(part)] = body
    return 200, {"ETag": f'"{hashlib.md5(body).hexdigest()}"'}, b""


def _complete(hub: Any, body: bytes, headers: Any, oid: str) -> Any:
    parts = hub.parts.pop(oid)
    if [part["partNumber"] for part in json.loads(body)["parts"]] != sorted(parts):
        raise Refused(400, "There are other parts")
    return _upload(hub, b"".join(parts[number] for number in sorted(parts)), headers, oid)


def _verify(hub: Any, body: bytes, headers: Any, oid: str) -> Any:
    if len(hub.objects.get(oid, b"")) != json.loads(body)["size"]:
        raise Refused(404, f"{oid} was not uploaded whole")
    return {}


def _commit(hub: Any, body: bytes, headers: Any, name: str, revision: str) -> Any:
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


def _branch(hub: Any, body: bytes, headers: Any, name: str, branch: str) -> Any:
    repository = hub.repository(name)
    status = 409 if branch in repository.branches else 201
    repository.branches.setdefault(branch, repository.branches["main"])
    return status, {}, {}


def _info(hub: Any, body: bytes, headers: Any, name: str, revision: str | None) -> Any:
    oid, files = hub.repository(name).resolve(revision or "main")
    return {"id": name, "sha": oid, "private": False, "siblings": [{"rfilename": path} for path in sorted(files)]}


def _tree(hub: Any, body: bytes, headers: Any, name: str, revision: str, folder: str | None) -> Any:
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


def _resolve(hub: Any, body: bytes, headers: Any, name: str, revision: str, path: str) -> Any:
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


def _storage(hub: Any, body: bytes, headers: Any, oid: str) -> Any:
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
