"""A small Hub on loopback: it speaks what `huggingface_hub` asks of the real one, and can fail on purpose."""

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from support.hub_routes import PUBLIC, ROUTES, Refused, Repository

OWNER, READER = "hf_OwnerTokenOfTheLoopbackHub", "hf_ReaderTokenOfTheLoopbackHub"
CUT = "cut"  # the connection is closed in the middle of the request's body, or of the answer's if it has none
Fault = int | str | threading.Event


class Request(NamedTuple):
    """One that a client made, the status that it got if it was answered, and what was done to it on purpose."""

    method: str
    path: str
    status: int | None
    fault: str


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
        answer: tuple[int, dict[str, str], bytes] | None = None
        if fault == CUT and length:
            self.rfile.read(length // 2)
        else:
            body = self._chunks() if self.headers.get("Transfer-Encoding") == "chunked" else self.rfile.read(length)
            answer = self._answer(path, body, fault)
        note = "" if fault is None else "delayed" if isinstance(fault, threading.Event) else str(fault)
        self.server.requests.append(Request(self.command, path, answer[0] if answer else None, note))
        if answer:
            self._send(*answer, cut=fault == CUT)
        if fault == CUT:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, path: str, body: bytes, fault: Fault | None) -> tuple[int, dict[str, str], bytes]:
        try:
            if isinstance(fault, int):
                raise Refused(fault, "The loopback Hub was told to fail")
            action, found = self._route(path)
            if found.re.pattern not in PUBLIC:
                self._authorize(writes=self.command in ("POST", "PUT"))
            answer = action(self.server, body, self.headers, *found.groups())
            status, headers, content = answer if isinstance(answer, tuple) else (200, {}, answer)
        except Refused as error:
            status, content = error.status, {"error": error.message}
            headers = {"X-Error-Message": error.message} | ({"X-Error-Code": error.code} if error.code else {})
        if isinstance(content, bytes):
            return status, headers, content
        return status, headers | {"Content-Type": "application/json"}, json.dumps(content).encode()

    def _send(self, status: int, headers: dict[str, str], content: bytes, cut: bool) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)

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
